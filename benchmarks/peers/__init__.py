"""The same work in plain PyTorch, to be timed against: see benchmarks/speed.py, --peer."""
