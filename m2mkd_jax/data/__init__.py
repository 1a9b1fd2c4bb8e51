"""Images in, batches out: numpy and Grain only; nothing here knows a `jax.Array`."""
