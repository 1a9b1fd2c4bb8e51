"""How well a propagator by fused kernels agrees with XLA's, on the device at hand.

Axes: B batch, I input latents, U mediators, V = I + U senders, D state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from m2mkd_jax.models import chain
from m2mkd_jax.models.nac.attention import LatentLayer
from m2mkd_jax.models.nac.fused.propagator import propagate, weights_of
from m2mkd_jax.models.nac.spec import NACSpec

# Images of the check, and how much farther than XLA's 16-bit results the kernels' may be from
# float32's: as a multiple, and as a share of the norm.
CHECKED = 8
MULTIPLE, SHARE = 4.0, 0.01


def distances(spec: NACSpec, dtype: jnp.dtype) -> dict[str, tuple[float, float]]:
    """How far a propagator's result and gradients by the kernels are from float32's.

    Args:
        spec: of the NAC.
        dtype: a 16-bit type.

    Returns:
        By name of an array: the norm of the difference, and what is allowed.
    """
    compute = _propagator(spec)
    exact, plain, own = (
        compute(fused=fused, dtype=kind)
        for fused, kind in ((False, jnp.float32), (False, dtype), (True, dtype))
    )
    result = {}
    for (path, want), a, b in zip(
        jax.tree_util.tree_leaves_with_path(exact),
        jax.tree.leaves(plain),
        jax.tree.leaves(own),
        strict=True,
    ):
        if want.size == 1:  # a sum of rounding errors of both signs tells nothing
            continue
        by_xla, by_kernels = (float(jnp.linalg.norm((x - want).ravel())) for x in (a, b))
        allowed = MULTIPLE * by_xla + SHARE * float(jnp.linalg.norm(want.ravel()))
        result[jax.tree_util.keystr(path)] = by_kernels, allowed
    return result


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
