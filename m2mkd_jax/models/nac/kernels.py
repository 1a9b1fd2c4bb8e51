"""Kernels on signatures: which latents receive from which.

Axes: B batch, U receivers, V senders, C signature.

A distance of 0 means the same direction. Distances beyond the truncation become +inf, which removes
the link. A receiver whose senders are all truncated has a row of -inf in the log kernel: its
attention weights are defined as zero (attention.py), where the published code gives NaN.

The published code divides a kernel by its sum over senders before it is added to the attention
scores. That shifts all scores of a receiver equally and cancels in the softmax, so it is omitted.

Source: Weiss et al. 2022 (arXiv 2210.08031); docs/reference.md#nac-kernel.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from m2mkd_jax.models import layers
from m2mkd_jax.models.batching import sum_over_images
from m2mkd_jax.models.nac.modulation import l2_normalise

# torch.distributions clamps probabilities to [eps, 1 - eps] with the float32 eps.
PROBABILITY_EPS = 1.1920929e-07


def distance(receivers: jax.Array, senders: jax.Array) -> jax.Array:
    """1 - cosine: signatures (..., U, C) and (..., V, C) -> (..., U, V).

    Source: docs/reference.md#nac-kernel.
    """
    return 1.0 - jnp.einsum("...uc,...vc->...uv", l2_normalise(receivers), l2_normalise(senders))


def log_kernel(
    distance: jax.Array,
    bandwidth: jax.Array | float,
    truncation: float | None,
    implementation: str = "direct",
) -> jax.Array:
    """-distance / bandwidth, and -inf beyond the truncation.

    Source: docs/reference.md#nac-kernel.

    Args:
        distance: (..., U, V).
        bandwidth: scalar.
        truncation: largest distance of a link; None for no truncation.
        implementation: 'direct' compares the scaled distance with truncation / bandwidth, without
            a gradient through that bandwidth; 'masked' compares the unscaled distance.

    Returns:
        (..., U, V).
    """
    log = -distance / bandwidth
    if truncation is None:
        return log
    if implementation == "direct":
        outside = -log > truncation / jax.lax.stop_gradient(bandwidth)
    else:
        outside = distance >= truncation
    return jnp.where(outside, -jnp.inf, log)


def affinity(
    distance: jax.Array,
    bandwidth: jax.Array | float,
    truncation: float | None,
    implementation: str = "direct",
) -> jax.Array:
    """exp of the log kernel, and 0 beyond the truncation.

    With 'masked' the gradient passes straight through the truncation, as published.

    Source: docs/reference.md#nac-kernel.

    Args:
        distance, bandwidth, truncation, implementation: as for `log_kernel`.

    Returns:
        (..., U, V).
    """
    log = log_kernel(distance, bandwidth, truncation, implementation)
    if implementation == "masked" and truncation is not None:
        full = jnp.exp(-distance / bandwidth)
        return full + jax.lax.stop_gradient(jnp.where(jnp.isneginf(log), 0.0, full) - full)
    inside = ~jnp.isneginf(log)
    return jnp.where(inside, jnp.exp(jnp.where(inside, log, 0.0)), 0.0)


def sample(
    log_kernel: jax.Array, uniform: jax.Array, temperature: float, dtype: Any = jnp.float32
) -> jax.Array:
    """Log of a relaxed Bernoulli sample per image.

    Source: docs/reference.md#nac-kernel.

    Args:
        log_kernel: (U, V).
        uniform: uniform noise (B, U, V).
        temperature: of the relaxation.
        dtype: of the result, which is computed in float32.

    Returns:
        (B, U, V).
    """
    return relax(link_logits(log_kernel), uniform, temperature, dtype)


def link_logits(log_kernel: jax.Array) -> jax.Array:
    """Log odds of the links' probabilities: (U, V) -> (U, V).

    The probability is exp(log kernel) clipped to [0, 1] with a straight-through gradient, then
    clamped as torch.distributions does, so that truncated links leak a little in training.
    """
    inside = ~jnp.isneginf(log_kernel)
    p = jnp.where(inside, jnp.exp(jnp.where(inside, log_kernel, 0.0)), 0.0)
    p = p + jax.lax.stop_gradient(jnp.clip(p, 0.0, 1.0) - p)
    return _logit(_clamp(p))


def relax(
    logits: jax.Array, uniform: jax.Array, temperature: float, dtype: Any = jnp.float32
) -> jax.Array:
    """`sample` of links with given log odds (U, V)."""
    return _relaxed(logits, _logit(_clamp(uniform)), temperature, dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _relaxed(logits: jax.Array, noise: jax.Array, temperature: float, dtype: Any) -> jax.Array:
    """log sigmoid((logits + noise) / temperature): logits (U, V), noise (B, U, V) -> (B, U, V).

    The backward pass needs the result alone, and neither the noise nor the numbers behind it. Noise
    is drawn, not computed: it gets no gradient.
    """
    log = jax.nn.log_sigmoid((noise + layers.align_rank(logits, noise)) / temperature)
    return log.astype(dtype)


def _relaxed_forward(
    logits: jax.Array, noise: jax.Array, temperature: float, dtype: Any
) -> tuple[jax.Array, jax.Array]:
    log = checkpoint_name(_relaxed(logits, noise, temperature, dtype), layers.KEPT)
    if log.dtype.itemsize == 2:
        # Without this XLA keeps a float32 array beside it, which differs in what is rounded off.
        log = jax.lax.optimization_barrier(log)
    return log, log


def _relaxed_backward(
    temperature: float, dtype: Any, log: jax.Array, grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del dtype
    # The derivative of log sigmoid is one minus the sigmoid.
    grad = grad.astype(jnp.float32) * (-jnp.expm1(log.astype(jnp.float32)) / temperature)
    return sum_over_images(grad), jnp.zeros_like(grad)


_relaxed.defvjp(_relaxed_forward, _relaxed_backward)


def _logit(p: jax.Array) -> jax.Array:
    # A division costs less than a second logarithm; p is clamped.
    return jnp.log(p / (1.0 - p))


def _clamp(p: jax.Array) -> jax.Array:
    # jnp.clip halves the gradient where p is exactly at a bound; torch passes all of it.
    low, high = PROBABILITY_EPS, 1.0 - PROBABILITY_EPS
    return jnp.where(p < low, low, jnp.where(p > high, high, p))
