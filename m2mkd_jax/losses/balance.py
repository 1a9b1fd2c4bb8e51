"""Losses that keep the experts of a mixture evenly used (Riquelme et al. 2021, appendix A).

Axes: ... tokens, in any number of axes; E experts.

Both are squared coefficients of variation over the experts, (std / mean)^2: 0 when all experts get
the same, E - 1 when one gets everything. The paper adds half of each, weighted by 0.01.
"""

import jax
import jax.numpy as jnp


def squared_variation(amounts: jax.Array) -> jax.Array:
    """(E,) -> (std / mean)^2, a scalar."""
    return jnp.var(amounts) / jnp.square(jnp.mean(amounts))


def importance_loss(gates: jax.Array) -> jax.Array:
    """How unevenly the weights are spread.

    gates: (..., E), a softmax over all experts, without noise. Returns a scalar.
    """
    return squared_variation(jnp.mean(gates, axis=tuple(range(gates.ndim - 1))))


def load_loss(logits: jax.Array, threshold: jax.Array, noise_std: float) -> jax.Array:
    """How unevenly the tokens would be spread if the noise were drawn again.

    The number of tokens of an expert has no gradient; the probability that it stays among a token's
    best K, under fresh noise on its own logit alone, has.

    logits: (..., E), without noise. threshold: (..., 1), the K-th largest logit with the noise of
    this step; as in the paper's code the gradient flows through it too. noise_std: above 0. Returns
    a scalar.
    """
    probability = jax.scipy.stats.norm.cdf((logits - threshold) / noise_std)
    return squared_variation(jnp.mean(probability, axis=tuple(range(logits.ndim - 1))))
