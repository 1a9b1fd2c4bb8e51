"""Logit distillation.

Axes: B batch, K classes. No gradient reaches the teacher.

Source: arXiv 2402.16918, section 3.2; docs/reference.md#distillation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from m2mkd_jax.errors import UserError

KINDS = ("none", "soft", "hard")


def soft_distillation(student: jax.Array, teacher: jax.Array, temperature: float) -> jax.Array:
    """T^2 * sum KL(teacher_T || student_T) / (B * K).

    The sum is divided by all B * K elements, not by B, as published: the balance between the two
    losses depends on it.

    Source: arXiv 2402.16918, section 3.2; docs/reference.md#distillation.

    Args:
        student: logits (B, K).
        teacher: logits (B, K).
        temperature: T > 0.

    Returns:
        A float32 scalar in nats.
    """
    student = student.astype(jnp.float32)
    teacher = jax.lax.stop_gradient(teacher.astype(jnp.float32))
    log_p = jax.nn.log_softmax(teacher / temperature, axis=-1)
    log_q = jax.nn.log_softmax(student / temperature, axis=-1)
    divergence = jnp.sum(jnp.exp(log_p) * (log_p - log_q))
    return divergence * (temperature**2) / student.size


def hard_distillation(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Cross entropy with the teacher's most likely class as the label.

    Source: docs/reference.md#distillation-hard.

    Args:
        student: logits (B, K).
        teacher: logits (B, K).

    Returns:
        The mean over the batch, a float32 scalar in nats.
    """
    log_q = jax.nn.log_softmax(student.astype(jnp.float32), axis=-1)
    choice = jnp.argmax(teacher, axis=-1)
    return -jnp.take_along_axis(log_q, choice[:, None], axis=-1).mean()


def distill(
    classification_loss: jax.Array,
    student_logits: jax.Array,
    teacher_logits: jax.Array | None,
    kind: str,
    alpha: float,
    temperature: float = 1.0,
) -> jax.Array:
    """(1 - alpha) * classification loss + alpha * distillation loss.

    Source: arXiv 2402.16918, section 3.2; docs/reference.md#distillation.

    Args:
        classification_loss: scalar.
        student_logits: (B, K).
        teacher_logits: (B, K); None for kind 'none'.
        kind: 'soft', 'hard', or 'none', which returns the classification loss as it is.
        alpha: weight of the distillation loss.
        temperature: of 'soft'.

    Returns:
        A float32 scalar.

    Raises:
        UserError: an unknown kind, or no teacher.
    """
    if kind == "none":
        return classification_loss
    if teacher_logits is None:
        raise UserError(f"distillation kind {kind!r} needs the logits of a teacher")
    if kind == "soft":
        distillation_loss = soft_distillation(student_logits, teacher_logits, temperature)
    elif kind == "hard":
        distillation_loss = hard_distillation(student_logits, teacher_logits)
    else:
        raise UserError(f"distillation kind {kind!r} is unknown: use one of {', '.join(KINDS)}")
    return (1.0 - alpha) * classification_loss + alpha * distillation_loss
