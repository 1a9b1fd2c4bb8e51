"""Kernels on signatures: which latent may listen to which (reference section 3).

Axes: B batch, U receivers, V senders, C signature.

A distance of 0 means the same direction. Distances beyond the truncation become +inf, so the link
does not exist. A receiver all of whose senders are truncated has a row of -inf in the log kernel:
its attention weights are defined as zero (attention.py), where the original gives NaN.

The original divides a kernel by its sum over senders before it is added to the attention scores.
That shifts all scores of a receiver alike and drops out of the softmax: it is left out.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from m2mkd_jax.models.nac.modulation import l2_normalise

# torch.distributions clamps probabilities to [eps, 1 - eps] with the float32 eps.
PROBABILITY_EPS = 1.1920929e-07


def distance(receivers: jax.Array, senders: jax.Array) -> jax.Array:
    """1 - cosine: signatures (..., U, C) and (..., V, C) -> (..., U, V)."""
    return 1.0 - jnp.einsum("...uc,...vc->...uv", l2_normalise(receivers), l2_normalise(senders))


def log_kernel(
    distance: jax.Array,
    bandwidth: jax.Array | float,
    truncation: float | None,
    implementation: str = "direct",
) -> jax.Array:
    """-distance / bandwidth, -inf beyond the truncation; same shape as `distance`.

    'direct' compares the scaled distance with truncation / bandwidth (the bandwidth in that
    comparison without gradient), 'masked' the plain distance with the truncation.
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
    """exp of the log kernel, 0 beyond the truncation.

    With 'masked' the gradient passes straight through the truncation, as published.
    """
    log = log_kernel(distance, bandwidth, truncation, implementation)
    if implementation == "masked" and truncation is not None:
        full = jnp.exp(-distance / bandwidth)
        return full + jax.lax.stop_gradient(jnp.where(jnp.isneginf(log), 0.0, full) - full)
    inside = ~jnp.isneginf(log)
    return jnp.where(inside, jnp.exp(jnp.where(inside, log, 0.0)), 0.0)


def sample(log_kernel: jax.Array, uniform: jax.Array, temperature: float) -> jax.Array:
    """Log of a relaxed Bernoulli sample per batch element: (U, V) and (B, U, V) -> (B, U, V).

    The probability is exp(log kernel) clipped to [0, 1] with a straight-through gradient, then
    clamped as torch.distributions does, so that truncated links leak a little in training.
    """
    inside = ~jnp.isneginf(log_kernel)
    p = jnp.where(inside, jnp.exp(jnp.where(inside, log_kernel, 0.0)), 0.0)
    p = p + jax.lax.stop_gradient(jnp.clip(p, 0.0, 1.0) - p)
    p, u = _clamp(p), _clamp(uniform)
    logits = jnp.log(p) - jnp.log1p(-p)
    return jax.nn.log_sigmoid((jnp.log(u) - jnp.log1p(-u) + logits) / temperature)


def _clamp(p: jax.Array) -> jax.Array:
    # jnp.clip would give half the gradient where p sits exactly on a bound; torch gives all of it.
    low, high = PROBABILITY_EPS, 1.0 - PROBABILITY_EPS
    return jnp.where(p < low, low, jnp.where(p > high, high, p))
