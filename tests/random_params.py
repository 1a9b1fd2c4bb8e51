"""Parameters in which nothing is trivial, without compiling an initialiser."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def random_params(shapes, seed: int, scale: float = 0.3):
    """A tree of arrays like `shapes`: kernels normal / sqrt(fan-in), the rest normal around the
    value they usually start from, so that norms, gains and layer scales act as in training."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = path[-1].key
        noise = rng.normal(size=leaf.shape)
        if name in ("codes", "signatures", "states", "grid"):
            value = noise
        elif name == "kernel":
            value = noise / np.sqrt(leaf.shape[-2] if leaf.ndim > 1 else 1)
        else:
            start = {"scale": 1.0, "gamma": 0.5, "gain": 0.5, "bandwidth": 1.0}.get(name, 0.0)
            value = start + scale * (noise if start != 1.0 else np.clip(noise, -1, 1))
        return jnp.asarray(value, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)
