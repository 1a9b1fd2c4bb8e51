"""How well a propagator by fused kernels agrees with XLA's, on the device at hand.

Axes: B batch, I input latents, U mediators, V = I + U senders, D state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from m2mkd_jax.models import chain
from m2mkd_jax.models.nac.attention import LatentLayer
from m2mkd_jax.models.nac.fused.propagator import propagate, weights_of
from m2mkd_jax.models.nac.spec import NACSpec

CHECKED = 8  # images


class Distance(NamedTuple):
    """Norms of the differences between an array in 16 bits and the same in float32.

    Attributes:
        own: of the fused kernels'.
        by_xla: of XLA's.
        whole: norm of the array.
    """

    own: float
    by_xla: float
    whole: float

    @property
    def is_rounding(self) -> bool:
        """Whether the kernels are about as near as XLA; NaN is not."""
        return self.own <= 4.0 * self.by_xla + 0.01 * self.whole


def distances(spec: NACSpec, dtype: jnp.dtype) -> dict[str, Distance]:
    """How far a propagator's result and gradients in 16 bits are from float32's.

    Single numbers are left out: a sum of rounding errors of both signs tells nothing.

    Args:
        spec: of the NAC.
        dtype: a 16-bit type.

    Returns:
        By name of an array.
    """
    compute = _propagator(spec)
    exact = compute(fused=False, dtype=jnp.float32)
    rounded = (compute(fused=fused, dtype=dtype) for fused in (True, False))
    found = {}
    for (path, whole), *both in zip(
        jax.tree_util.tree_leaves_with_path(exact), *map(jax.tree.leaves, rounded), strict=True
    ):
        if whole.size > 1:
            norms = (jnp.linalg.norm(a.ravel()) for a in (*(b - whole for b in both), whole))
            found[jax.tree_util.keystr(path)] = Distance(*map(float, norms))
    return found


def _propagator(spec: NACSpec) -> Callable[..., Any]:
    """A function of `fused` and `dtype` -> a propagator's result and gradients, in float32."""
    layer = LatentLayer(spec, share_norm=True, residual=True, kernel=True, rngs=nnx.Rngs(0))
    split = chain.split(layer)
    i, u, d = spec.input_latents, spec.mediator_latents, spec.state_dim
    keys = iter(jax.random.split(jax.random.key(0), 64))

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape)

    params = jax.tree.map(lambda p: p + 0.1 * normal(*p.shape), split.params)
    states = normal(CHECKED, i, d), normal(CHECKED, u, d)
    log_kernel = jax.nn.log_sigmoid(4.0 * normal(CHECKED, u, i + u))
    codes, direction = normal(i + u, spec.code_dim), normal(CHECKED, u, d)

    def loss(arguments: Any, fused: bool, dtype: Any) -> tuple[jax.Array, jax.Array]:
        params, *rest = arguments
        (inputs, mediators), log_kernel = jax.tree.map(lambda a: a.astype(dtype), rest)
        layer = chain.merge(split.graph, chain.cast_compute(params, dtype), {})
        if fused:
            weights = weights_of(layer, codes[i:], codes)
            y = propagate(weights, inputs, mediators, log_kernel, spec.heads)
        else:
            senders = jnp.concatenate([inputs, mediators], axis=1)
            y = layer(mediators, codes[i:], senders, codes, log_kernel)
        y = y.astype(jnp.float32)
        return (y * direction).sum(), y

    @functools.partial(jax.jit, static_argnames=("fused", "dtype"))
    def compute(arguments: Any, fused: bool, dtype: Any) -> Any:
        grads, y = jax.grad(loss, has_aux=True)(arguments, fused, dtype)
        return y, grads

    return functools.partial(compute, (params, states, log_kernel))
