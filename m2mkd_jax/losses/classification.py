"""Classification losses and counts.

Axes: B batch, K classes.
"""

import jax
import jax.numpy as jnp


def soft_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Cross entropy against a distribution over the classes (reference section 5).

    logits: (B, K), any float type. targets: (B, K), rows that sum to 1 (one-hot, smoothed or
    mixed labels). Returns the mean over the batch, a float32 scalar in nats.
    """
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.sum(targets.astype(jnp.float32) * log_probabilities, axis=-1).mean()


def top_k_correct(logits: jax.Array, labels: jax.Array, k: int) -> jax.Array:
    """Whether each label is among the k largest logits.

    logits: (B, K). labels: (B,) integers. Returns (B,) booleans: the caller sums them, so that
    padded examples can be left out. With k > K every valid label counts as found. Ties go to the
    lower class number, so that constant logits do not count as right.
    """
    _, best = jax.lax.top_k(logits, min(k, logits.shape[-1]))
    return jnp.any(best == labels[:, None], axis=-1)
