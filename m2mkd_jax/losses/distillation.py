"""Distillation of logits, and of tokens.

Axes: B batch, N tokens, D channels, K classes. No gradient reaches the teacher.

Source: arXiv 2402.16918, section 3.2; docs/reference.md#distillation.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from m2mkd_jax.errors import UserError

KINDS = ("none", "soft", "hard")
EPS = 1e-6  # of the layer norm of tokens


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


def token_distillation(student: jax.Array, teacher: jax.Array) -> jax.Array:
    """Mean squared error between tokens, each normalised over its channels without scale and shift.

    A hint of the teacher's inner layer, as in FitNets (Romero et al. 2014, arXiv 1412.6550), here
    behind the student's stitch, which brings its tokens to the teacher's width; normalised as
    in feature distillation (Wei et al. 2022, arXiv 2205.14141), so that a few channels with large
    values do not decide it. Not in the paper of m2mKD.

    Args:
        student: (B, N, D).
        teacher: (B, N, D).

    Returns:
        The mean over batch, tokens and channels, a float32 scalar.
    """
    difference = _normalised(student) - _normalised(jax.lax.stop_gradient(teacher))
    return jnp.mean(jnp.square(difference))


def _normalised(tokens: jax.Array) -> jax.Array:
    """(B, N, D) -> float32 (B, N, D), each token with mean 0 and variance 1."""
    tokens = tokens.astype(jnp.float32)
    mean, variance = tokens.mean(-1, keepdims=True), tokens.var(-1, keepdims=True)
    return (tokens - mean) * jax.lax.rsqrt(variance + EPS)


def linear_alpha(
    step: jax.Array | int, *, first: float, last: float, updates: int, accumulate: int
) -> jax.Array:
    """Alpha of a training step: linear in the number of the optimizer update.

    Args:
        step: its number, from 0.
        first: alpha of the first update.
        last: alpha of the last one.
        updates: of the whole job.
        accumulate: steps of an update.

    Returns:
        A float32 scalar.
    """
    done = (jnp.asarray(step) // accumulate).astype(jnp.float32) / max(updates - 1, 1)
    return first + (last - first) * jnp.minimum(done, 1.0)


def distill(
    classification_loss: jax.Array,
    student_logits: jax.Array,
    teacher_logits: jax.Array | None,
    kind: str,
    alpha: float | jax.Array,
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
