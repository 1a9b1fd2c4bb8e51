"""Mixup and cutmix of a batch, inside the jitted step (reference section 6).

Axes: B batch, H height, W width, C channels, K classes. The partner of each image is its mirror
in the batch (the batch reversed); one draw serves the whole batch.

recipe fields read here: mixup and cutmix (the alphas of the Beta distributions, 0 = off),
switch_prob (share of cutmix when both are on), mix_prob (share of batches mixed at all), smoothing.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def smooth_one_hot(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
    """labels (B,) integers -> targets (B, K) float32.

    smoothing / K off the label, 1 - smoothing + smoothing / K on it.
    """
    return jax.nn.one_hot(labels, classes) * (1.0 - smoothing) + smoothing / classes


def cut_box(lam: jax.Array, centre: jax.Array, image_shape: Sequence[int]) -> jax.Array:
    """Cutmix's box: int32 (4,) = yl, yh, xl, xh, upper bounds exclusive, clipped to the image.

    lam: share of the image to keep, so the box has sqrt(1 - lam) of each side, rounded down to an
    even number of pixels. centre: (cy, cx) pixels. image_shape: (..., H, W, C).
    """
    size = jnp.asarray(image_shape[-3:-1], jnp.int32)
    half = (size * jnp.sqrt(1.0 - lam)).astype(jnp.int32) // 2
    low = jnp.clip(centre - half, 0, size)
    high = jnp.clip(centre + half, 0, size)
    return jnp.stack([low[0], high[0], low[1], high[1]])


def draw(
    key: jax.Array, recipe: Any, image_shape: Sequence[int]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How to mix the next batch: lam float32 scalar, use_cutmix bool scalar, box int32 (4,).

    image_shape: (..., H, W, C). lam is the share of the image itself, for cutmix the true one
    after clipping the box. An unmixed batch has lam 1 and use_cutmix False.
    """
    kind_key, mixup_key, cutmix_key, centre_key, on_key = jax.random.split(key, 5)
    mixup, cutmix = float(recipe.mixup), float(recipe.cutmix)
    share = recipe.switch_prob if mixup and cutmix else float(cutmix > 0)
    on = jax.random.bernoulli(on_key, recipe.mix_prob if mixup or cutmix else 0.0)
    use_cutmix = on & jax.random.bernoulli(kind_key, share)
    lam = jnp.ones(())
    if mixup:
        lam = jax.random.beta(mixup_key, mixup, mixup)
    if cutmix:
        lam = jnp.where(use_cutmix, jax.random.beta(cutmix_key, cutmix, cutmix), lam)
    lam = jnp.where(on, lam, 1.0)
    height, width = image_shape[-3:-1]
    centre = jax.random.randint(centre_key, (2,), 0, jnp.asarray([height, width]))
    box = cut_box(lam, centre, image_shape)
    area = (box[1] - box[0]) * (box[3] - box[2])
    lam = jnp.where(use_cutmix, 1.0 - area / (height * width), lam)
    return lam, use_cutmix, box


def apply(
    images: jax.Array, targets: jax.Array, lam: jax.Array, use_cutmix: jax.Array, box: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mix images (B, H, W, C) float and targets (B, K) with their mirror in the batch.

    lam, use_cutmix, box: from `draw`; for cutmix lam must be the true share. Types and shapes
    stay. In an odd batch the middle image is its own partner.
    """
    height, width = images.shape[-3:-1]
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    inside = (y >= box[0]) & (y < box[1]) & (x >= box[2]) & (x < box[3])
    # One weight per pixel covers both kinds: lam everywhere, or 0 in the box and 1 outside.
    weight = jnp.where(use_cutmix, jnp.where(inside, 0.0, 1.0), lam)[..., None].astype(images.dtype)
    mixed = images * weight + images[::-1] * (1 - weight)
    return mixed, targets * lam + targets[::-1] * (1.0 - lam)


def mix(
    key: jax.Array, images: jax.Array, labels: jax.Array, classes: int, recipe: Any
) -> tuple[jax.Array, jax.Array]:
    """Smooth the labels and mix the batch.

    images: (B, H, W, C) float. labels: (B,) integers. Returns images as they came in shape and
    type, and targets (B, K) float32. With both alphas 0 only the labels are smoothed.
    """
    targets = smooth_one_hot(labels, classes, recipe.smoothing)
    if not (recipe.mixup or recipe.cutmix):
        return images, targets
    return apply(images, targets, *draw(key, recipe, images.shape))
