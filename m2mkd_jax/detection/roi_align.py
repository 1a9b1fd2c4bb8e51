"""RoIAlign and mask pasting, as products with interpolation matrices.

Axes: R regions, P bins on a side, H rows, W columns, C channels, M side of a mask.

Bilinear sampling on a grid that is parallel to the axes is separable: the average of the samples
of bin (i, j) is sum_yx rows[i, y] columns[j, x] map[y, x]. There is no gather, forward or backward,
and the samples, whose number varies by region, are summed up in the matrices.

Source: He et al. 2017 (arXiv 1703.06870), section 3; docs/detection.md#roi-heads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from m2mkd_jax.detection.spec import STRIDES

FIRST_LEVEL, LAST_LEVEL = 2, 5
# Regions are pooled in parts of at most so many intermediate numbers.
LARGEST_PART = 2**26


def levels(boxes: jax.Array) -> jax.Array:
    """The pyramid's level of each box by its area, from 0 for p2: (R, 4) -> (R) int32.

    Source: Lin et al. 2017 (arXiv 1612.03144), section 4.2; docs/detection.md#roi-heads.
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    level = jnp.floor(4 + jnp.log2(jnp.sqrt(jnp.maximum(area, 0.0)) / 224 + 1e-8))
    return (jnp.clip(level, FIRST_LEVEL, LAST_LEVEL) - FIRST_LEVEL).astype(jnp.int32)


def bin_weights(low: jax.Array, high: jax.Array, length: int, bins: int) -> jax.Array:
    """The weight of each position of an axis in each bin.

    A bin of s positions has ceil(s) samples; those further than 1 outside count 0, others are moved
    inside. Regions longer than the axis get no more samples than one as long as the axis.

    Args:
        low, high: (R), ends of the regions in units of the axis; position i lies at i.
        length: of the axis, L.
        bins: P.

    Returns:
        (R, P, L).
    """
    size = (high - low) / bins
    most = math.ceil(length / bins) + 1
    count = jnp.clip(jnp.ceil(size), 0, most)
    number = jnp.arange(most, dtype=jnp.float32)
    bin_number = jnp.arange(bins, dtype=jnp.float32)
    step = size / jnp.maximum(count, 1.0)
    starts = low[:, None] + bin_number[None, :] * size[:, None]
    at = starts[:, :, None] + (number[None, None] + 0.5) * step[:, None, None]
    inside = (at >= -1.0) & (at <= float(length)) & (number[None] < count[:, None])[:, None]
    at = jnp.clip(at, 0.0, length - 1.0)[..., None]
    position = jnp.arange(length, dtype=jnp.float32)[None, None, None]
    weights = jnp.maximum(1.0 - jnp.abs(at - position), 0.0)
    weights = jnp.sum(jnp.where(inside[..., None], weights, 0.0), axis=2)
    return weights / jnp.maximum(count, 1.0)[:, None, None]


def roi_align(feature: jax.Array, boxes: jax.Array, stride: float, bins: int) -> jax.Array:
    """RoIAlign on one map, "aligned": positions are the centres of pixels.

    Args:
        feature: (H, W, C).
        boxes: (R, 4) in pixels.
        stride: pixels per position.
        bins: P.

    Returns:
        (R, P, P, C).
    """
    rows, columns = _matrices(boxes, stride, bins, feature.shape[:2])
    return _products(rows, columns, feature)


def _matrices(
    boxes: jax.Array, stride: float, bins: int, shape: Sequence[int]
) -> tuple[jax.Array, jax.Array]:
    edges = boxes.astype(jnp.float32) / stride - 0.5
    rows = bin_weights(edges[:, 1], edges[:, 3], shape[0], bins)
    return rows, bin_weights(edges[:, 0], edges[:, 2], shape[1], bins)


def _products(rows: jax.Array, columns: jax.Array, feature: jax.Array) -> jax.Array:
    part = jnp.einsum("rph,hwc->rpwc", rows.astype(feature.dtype), feature)
    return jnp.einsum("rpwc,rqw->rpqc", part, columns.astype(feature.dtype))


def pool(features: Sequence[jax.Array], boxes: jax.Array, bins: int) -> jax.Array:
    """RoIAlign of each box on its own level.

    Args:
        features: p2 to p5 of one image, (H, W, C) each.
        boxes: (R, 4) in pixels; they have no gradient.
        bins: P.

    Returns:
        (R, P, P, C).
    """
    boxes = jax.lax.stop_gradient(boxes)

    @jax.checkpoint
    def pooled(box: jax.Array) -> jax.Array:
        level, total = levels(box[None]), jnp.zeros(())
        for i, feature in enumerate(features):
            rows, columns = _matrices(box[None], STRIDES[i], bins, feature.shape[:2])
            rows = jnp.where((level == i)[:, None, None], rows, 0.0)
            part = _products(rows, columns, feature)[0]
            total = part if i == 0 else total + part
        return total

    _, width, channels = features[0].shape
    part = max(1, LARGEST_PART // (bins * width * channels))
    if len(boxes) <= part:
        return jax.vmap(pooled)(boxes)
    return jax.lax.map(pooled, boxes, batch_size=part)


def crop_masks(masks: jax.Array, boxes: jax.Array, side: int) -> jax.Array:
    """The part of each mask in its box, as a mask of another size.

    Args:
        masks: (R, H, W), bool or numbers from 0 to 1.
        boxes: (R, 4) in pixels.
        side: M.

    Returns:
        (R, M, M) bool.

    Source: docs/detection.md#roi-heads.
    """

    def crop(mask: jax.Array, box: jax.Array) -> jax.Array:
        return roi_align(mask.astype(jnp.float32)[..., None], box[None], 1.0, side)[0, ..., 0]

    return jax.vmap(crop)(masks, boxes) >= 0.5


def paste_masks(masks: jax.Array, boxes: jax.Array, height: int, width: int) -> jax.Array:
    """The probability of each pixel of an image, 0 outside the box.

    Args:
        masks: (R, M, M), probabilities within the boxes.
        boxes: (R, 4) in pixels.
        height, width: of the image.

    Returns:
        (R, height, width).

    Source: docs/detection.md#inference.
    """
    side = masks.shape[-1]

    def weights(low: jax.Array, high: jax.Array, length: int) -> jax.Array:
        pixel = jnp.arange(length, dtype=jnp.float32)[None] + 0.5
        at = (pixel - low[:, None]) / (high - low)[:, None] * side - 0.5
        position = jnp.arange(side, dtype=jnp.float32)[None, None]
        return jnp.maximum(1.0 - jnp.abs(at[..., None] - position), 0.0)

    rows = weights(boxes[:, 1], boxes[:, 3], height)
    columns = weights(boxes[:, 0], boxes[:, 2], width)
    return jnp.einsum("rhm,rmn,rwn->rhw", rows, masks, columns)
