"""Experts: E multilayer perceptrons with their weights along one axis.

Axes: E experts, C channels in, D channels out, R rows (tokens).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from m2mkd_jax.models import layers


def expert_init(key, shape, dtype=jnp.float32):
    """Uniform within 1/sqrt(in * out): the published layer counts in * out inputs (section 2)."""
    bound = (shape[-1] * shape[-2]) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class ExpertLinear(nnx.Module):
    """Kernels (E, C, D) and biases (E, D), which start at zero."""

    def __init__(self, experts: int, c: int, d: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(expert_init(rngs.params(), (experts, c, d)))
        self.bias = nnx.Param(jnp.zeros((experts, d)))

    def weights(self) -> dict[str, jax.Array]:
        return {"kernel": self.kernel[...], "bias": self.bias[...]}


class Experts(nnx.Module):
    """Linear D -> 4D, exact GELU, linear 4D -> D, in every expert."""

    def __init__(self, experts: int, width: int, *, rngs: nnx.Rngs):
        self.fc1 = ExpertLinear(experts, width, 4 * width, rngs=rngs)
        self.fc2 = ExpertLinear(experts, 4 * width, width, rngs=rngs)

    def weights(self) -> dict[str, dict[str, jax.Array]]:
        return {"fc1": self.fc1.weights(), "fc2": self.fc2.weights()}


def mlp(weights: dict, rows: jax.Array, linear: Callable) -> jax.Array:
    """Every row through its own expert; `linear(rows, layer)` knows which that is."""
    return linear(layers.gelu(linear(rows, weights["fc1"])), weights["fc2"])
