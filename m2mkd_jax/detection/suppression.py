"""Non-maximum suppression with static shapes.

Axes: N boxes.

Source: docs/detection.md#rpn.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from m2mkd_jax.detection import boxes as box_ops


def nms(boxes: jax.Array, scores: jax.Array, valid: jax.Array, threshold: float) -> jax.Array:
    """Greedy non-maximum suppression by falling score; the first of equal scores goes first.

    Solves keep[j] = valid[j] and no kept i before j overlaps it, by iteration. After k rounds the
    first k answers are right whatever the start, so the fixed point is the greedy answer; chains of
    boxes that suppress each other are short, and so is the iteration.

    Args:
        boxes: (N, 4).
        scores: (N).
        valid: (N), which boxes take part.
        threshold: a box is suppressed by a better one if their IoU is above it.

    Returns:
        (N) bool, which boxes are kept.
    """
    order = jnp.argsort(jnp.where(valid, -scores, jnp.inf), stable=True)
    ranked, present = boxes[order], valid[order]
    place = jnp.arange(len(order))
    before = place[:, None] < place[None, :]
    suppresses = (box_ops.iou(ranked, ranked) > threshold) & before

    def refine(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        keep, _ = state
        new = present & ~jnp.any(suppresses & keep[:, None], axis=0)
        return new, jnp.any(new != keep)

    keep, _ = jax.lax.while_loop(lambda state: state[1], refine, (present, jnp.any(present)))
    return jnp.zeros_like(valid).at[order].set(keep)
