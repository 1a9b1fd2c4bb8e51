"""Measurements; benchmarks/RESULTS.md has their results."""
