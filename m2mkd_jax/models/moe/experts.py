"""Experts: E multilayer perceptrons whose weights are stacked along one axis.

Axes: E experts, C channels in, D channels out, R rows (tokens).

Source: FastMoE (arXiv 2103.13262); docs/reference.md#vmoe-experts, docs/reference.md#vmoe-init.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from m2mkd_jax import tree_paths
from m2mkd_jax.models import layers
from m2mkd_jax.models.moe import grouped

# (rows, layer) -> rows, where layer is {"kernel": (E, C, D), "bias": (E, D)}; the kernel may be a
# gradients_in_place.LayerArray.
Linear = Callable[[jax.Array, dict[str, Any]], jax.Array]


def expert_init(key: jax.Array, shape: Sequence[int], dtype: Any = jnp.float32) -> jax.Array:
    """Uniform within 1/sqrt(C * D): the published layer takes C * D for its fan-in.

    Source: docs/reference.md#vmoe-init.
    """
    bound = (shape[-1] * shape[-2]) ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class ExpertLinear(nnx.Module):
    """Kernels (E, C, D) and biases (E, D), which start at zero."""

    def __init__(self, experts: int, c: int, d: int, *, rngs: nnx.Rngs):
        self.kernel = nnx.Param(expert_init(rngs.params(), (experts, c, d)))
        self.bias = nnx.Param(jnp.zeros((experts, d)))

    def weights(self) -> dict[str, Any]:
        """Kernel and bias as plain arrays; the kernel in its stack where `reads_in_stack`."""
        return {"kernel": self.kernel[...], "bias": self.bias[...]}


class Experts(nnx.Module):
    """Linear D -> 4D, exact GELU, linear 4D -> D, in every expert."""

    def __init__(self, experts: int, width: int, *, rngs: nnx.Rngs):
        self.fc1 = ExpertLinear(experts, width, 4 * width, rngs=rngs)
        self.fc2 = ExpertLinear(experts, 4 * width, width, rngs=rngs)

    def weights(self) -> dict[str, dict[str, Any]]:
        """Both layers' kernels and biases, see `ExpertLinear.weights`."""
        return {"fc1": self.fc1.weights(), "fc2": self.fc2.weights()}


def reads_in_stack(names: Sequence[Any]) -> bool:
    """Whether a block's parameter is not copied out of the stack of blocks: experts' kernels.

    Where they are read one at a time, see `grouped.grouped_linear`.

    Args:
        names: on the parameter's path.
    """
    return tree_paths.is_experts_kernel(names) and grouped.default_method() == "chunks"


def mlp(weights: dict[str, dict[str, Any]], rows: jax.Array, linear: Linear) -> jax.Array:
    """Applies each row's own expert to it.

    Args:
        weights: as `Experts.weights` returns them.
        rows: (..., D) in the dispatch's layout.
        linear: applies to each row the given layer of its own expert.

    Returns:
        (..., D).
    """
    hidden = checkpoint_name(linear(rows, weights["fc1"]), layers.KEPT)
    return checkpoint_name(linear(layers.gelu(hidden), weights["fc2"]), layers.KEPT)
