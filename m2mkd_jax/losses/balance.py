"""Auxiliary losses that balance the load of the experts of a mixture.

Axes: ... tokens, in any number of axes; E experts.

Both are squared coefficients of variation over the experts, (std / mean)^2: 0 when all experts get
the same, E - 1 when one gets everything. Riquelme et al. add half of each, weighted by 0.01.

Source: Riquelme et al. 2021 (arXiv 2106.05974), appendix A; docs/reference.md#vmoe-balance.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def squared_variation(amounts: jax.Array) -> jax.Array:
    """(std / mean)^2 of (E,), a scalar.

    Source: Riquelme et al. 2021 (arXiv 2106.05974), appendix A; docs/reference.md#vmoe-balance.
    """
    return jnp.var(amounts) / jnp.square(jnp.mean(amounts))


def importance_loss(gates: jax.Array) -> jax.Array:
    """Imbalance of the experts' total weights.

    Source: Riquelme et al. 2021 (arXiv 2106.05974), appendix A; docs/reference.md#vmoe-balance.

    Args:
        gates: (..., E), a softmax over all experts, without noise.

    Returns:
        A scalar.
    """
    return squared_variation(jnp.mean(gates, axis=tuple(range(gates.ndim - 1))))


def load_loss(logits: jax.Array, threshold: jax.Array, noise_std: float) -> jax.Array:
    """Imbalance of the experts' expected numbers of tokens under fresh noise.

    The number of tokens of an expert has no gradient. Its surrogate does: the probability that an
    expert stays among a token's K best when the noise on its own logit alone is drawn again.

    Source: Riquelme et al. 2021 (arXiv 2106.05974), appendix A; docs/reference.md#vmoe-balance.

    Args:
        logits: (..., E), without noise.
        threshold: (..., 1), the K-th largest logit with the noise of this step. As in the code of
            Riquelme et al. the gradient flows through it too.
        noise_std: standard deviation of the noise, above 0.

    Returns:
        A scalar.
    """
    probability = jax.scipy.stats.norm.cdf((logits - threshold) / noise_std)
    return squared_variation(jnp.mean(probability, axis=tuple(range(logits.ndim - 1))))
