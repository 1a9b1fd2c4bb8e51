"""Classification loss and accuracy.

Axes: B batch, K classes.

Source: docs/reference.md#cross-entropy.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def soft_cross_entropy(
    logits: jax.Array, targets: jax.Array, class_weights: Sequence[float] = ()
) -> jax.Array:
    """Cross entropy against a distribution over the classes.

    With weights w it is -sum_k w_k t_k log p_k, as PyTorch's for targets t that are distributions.

    Source: docs/reference.md#cross-entropy.

    Args:
        logits: (B, K), any float type.
        targets: (B, K), rows that sum to 1 (one-hot, smoothed or mixed labels).
        class_weights: (K,); (): all 1.

    Returns:
        The mean over the batch, a float32 scalar in nats.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    targets = targets.astype(jnp.float32)
    if len(class_weights):
        targets = targets * jnp.asarray(class_weights, jnp.float32)[None]
    return -jnp.sum(targets * log_probabilities, axis=-1).mean()


def top_k_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether each label is among the k largest logits.

    Ties go to the lower class number, so that constant logits do not count as correct. With k > K
    every valid label counts as found.

    Args:
        logits: (B, K).
        labels: (B,), integers.
        k: number of largest logits.

    Returns:
        (B,) booleans, one per example, so that the caller can exclude padding.
    """
    _, best = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.any(best == labels[:, None], axis=-1)
