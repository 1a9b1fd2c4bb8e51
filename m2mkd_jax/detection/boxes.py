"""Boxes: anchors, coding, overlap.

Axes: N, M boxes. A box is x0 y0 x1 y1 in continuous pixel coordinates.

Source: docs/detection.md#anchors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

# Largest logarithm of a side's growth.
MOST_GROWTH = math.log(1000 / 16)


def anchors(
    height: int, width: int, stride: int, size: float, ratios: Sequence[float]
) -> np.ndarray:
    """The anchors of one level, ordered by row, column and ratio.

    Args:
        height: rows of the level's map.
        width: its columns.
        stride: pixels from one position to the next; the first lies at (0, 0).
        size: side of the square of the same area.
        ratios: height over width.

    Returns:
        (height * width * len(ratios), 4) float32.

    Source: docs/detection.md#anchors.
    """
    widths = np.sqrt(size * size / np.asarray(ratios, np.float64))
    heights = widths * np.asarray(ratios, np.float64)
    corners = np.stack([-widths, -heights, widths, heights], 1) / 2
    y, x = np.meshgrid(np.arange(height) * stride, np.arange(width) * stride, indexing="ij")
    centres = np.stack([x, y, x, y], -1).reshape(-1, 1, 4)
    # Rounded before the sum, as the published code does: ties between anchors depend on it.
    cells = centres.astype(np.float32) + corners.astype(np.float32)[None]
    return cells.reshape(-1, 4)


def areas(boxes: jax.Array) -> jax.Array:
    """(N, 4) -> (N)."""
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def iou(a: jax.Array, b: jax.Array) -> jax.Array:
    """Intersection over union of all pairs; 0 where they do not overlap.

    Args:
        a: (N, 4).
        b: (M, 4).

    Returns:
        (N, M).
    """
    low = jnp.maximum(a[:, None, :2], b[None, :, :2])
    high = jnp.minimum(a[:, None, 2:], b[None, :, 2:])
    sides = jnp.maximum(high - low, 0.0)
    common = sides[..., 0] * sides[..., 1]
    union = areas(a)[:, None] + areas(b)[None, :] - common
    return jnp.where(common > 0, common / jnp.where(common > 0, union, 1.0), 0.0)


def encode(boxes: jax.Array, targets: jax.Array, weights: Sequence[float]) -> jax.Array:
    """The deltas (dx, dy, dw, dh) that lead from boxes to targets.

    Args:
        boxes, targets: (N, 4).
        weights: factor of each delta.

    Returns:
        (N, 4).

    Source: docs/detection.md#anchors.
    """
    (x, y, w, h), (tx, ty, tw, th) = _centred(boxes), _centred(targets)
    deltas = ((tx - x) / w, (ty - y) / h, jnp.log(tw / w), jnp.log(th / h))
    return jnp.stack([f * d for f, d in zip(weights, deltas, strict=True)], -1)


def decode(deltas: jax.Array, boxes: jax.Array, weights: Sequence[float]) -> jax.Array:
    """The inverse of `encode`; a side grows by at most 1000/16.

    Args:
        deltas, boxes: (N, 4).
        weights: as for `encode`.

    Returns:
        (N, 4) float32.
    """
    boxes = boxes.astype(jnp.float32)
    x, y, w, h = _centred(boxes)
    dx, dy, dw, dh = (deltas[:, i].astype(jnp.float32) / weights[i] for i in range(4))
    x, y = x + dx * w, y + dy * h
    w = w * jnp.exp(jnp.minimum(dw, MOST_GROWTH))
    h = h * jnp.exp(jnp.minimum(dh, MOST_GROWTH))
    return jnp.stack([x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h], -1)


def _centred(boxes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Centres and sides, (N) each."""
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    return boxes[:, 0] + 0.5 * w, boxes[:, 1] + 0.5 * h, w, h


def clip(boxes: jax.Array, size: jax.Array) -> jax.Array:
    """Boxes (N, 4) within an image of size (2): height and width, float32."""
    x, y = (jnp.clip(boxes[:, i::2], 0.0, size[1 - i]) for i in (0, 1))
    return jnp.stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]], -1)


def nonempty(boxes: jax.Array) -> jax.Array:
    """Whether both sides are above 0: (N, 4) -> (N)."""
    return (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
