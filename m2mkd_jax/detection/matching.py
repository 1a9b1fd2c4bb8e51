"""Which object a candidate box stands for, and which candidates a loss looks at.

Axes: G objects of an image (padded), A candidates, S sampled ones.

Source: docs/detection.md#matcher.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

POSITIVE, NEGATIVE, IGNORED = 1, 0, -1


def match(
    iou: jax.Array, valid: jax.Array, low: float, high: float, *, low_quality: bool
) -> tuple[jax.Array, jax.Array]:
    """Matches each candidate with the object that it overlaps most.

    Args:
        iou: (G, A).
        valid: (G), whether a row is an object.
        low: candidates with a lower IoU are negative.
        high: from this IoU on they are positive; those between are ignored.
        low_quality: an object's best candidates are positive too, if they overlap at all.

    Returns:
        The number of each candidate's object (A), meaningless where there is none, and its label
        (A): POSITIVE, NEGATIVE or IGNORED.

    Source: docs/detection.md#matcher.
    """
    iou = jnp.where(valid[:, None], iou, -1.0)
    best = jnp.max(iou, axis=0)
    labels = jnp.where(best < high, IGNORED, POSITIVE)
    labels = jnp.where(best < low, NEGATIVE, labels)
    if low_quality:
        own_best = jnp.max(iou, axis=1, keepdims=True)
        labels = jnp.where(jnp.any((iou == own_best) & (iou > 0), axis=0), POSITIVE, labels)
    return jnp.argmax(iou, axis=0), labels


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sample:
    """Sampled candidates, positive ones first.

    Attributes:
        index: (S), their numbers.
        positive: (S) bool.
        valid: (S) bool; an image may have fewer than S.
    """

    index: jax.Array
    positive: jax.Array
    valid: jax.Array


def sample(labels: jax.Array, priority: jax.Array, budget: int, fraction: float) -> Sample:
    """Samples candidates: those with the lowest priorities.

    With random priorities these are random ones; with given priorities, given ones.

    Args:
        labels: (A), see `match`.
        priority: (A) float32, any finite numbers.
        budget: S, if there are as many candidates.
        fraction: at most this share are positive ones.
    """
    most = int(budget * fraction)
    first, is_first = _lowest(labels == POSITIVE, priority, most)
    others, is_other = _lowest(labels == NEGATIVE, priority, budget)
    left = budget - jnp.sum(is_first, dtype=jnp.int32)
    is_other &= jnp.arange(len(others), dtype=jnp.int32) < left
    index, valid = jnp.concatenate([first, others]), jnp.concatenate([is_first, is_other])
    positive = jnp.arange(len(index)) < len(first)
    order = jnp.argsort(~valid, stable=True)[:budget]
    return Sample(index[order], positive[order] & valid[order], valid[order])


def _lowest(mask: jax.Array, priority: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The masked candidates of lowest priority, and whether there are as many."""
    key = jnp.where(mask, -priority, -jnp.inf)
    values, index = jax.lax.top_k(key, min(count, len(mask)))
    return index, values > -jnp.inf
