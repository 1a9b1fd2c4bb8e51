"""Data sets on disk to batches of numpy arrays. Nothing here imports jax."""
