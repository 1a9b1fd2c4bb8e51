"""Mixup and cutmix of a batch, inside the jitted step.

Each image is mixed with its mirror in the batch (the batch reversed); one draw serves the whole
batch. Axes: B batch, H height, W width, C channels, K classes.

Recipe fields: mixup and cutmix (alphas of the Beta distributions, 0 = off), switch_prob (share of
cutmix when both are on), mix_prob (share of batches that are mixed), smoothing.

Source: docs/reference.md#mixing.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp


def smooth_one_hot(labels: jax.Array, classes: int, smoothing: float) -> jax.Array:
    """Smoothed targets: 1 - smoothing + smoothing / K on the label, smoothing / K elsewhere.

    Args:
        labels: (B,), integers.
        classes: K.
        smoothing: 0 to 1.

    Returns:
        float32 (B, K).

    Source: docs/reference.md#mixing.
    """
    return jax.nn.one_hot(labels, classes) * (1.0 - smoothing) + smoothing / classes


def cut_box(lam: jax.Array, centre: jax.Array, image_shape: Sequence[int]) -> jax.Array:
    """The box of cutmix, clipped to the image.

    Args:
        lam: float scalar, share of the image to keep: the box has sqrt(1 - lam) of each side,
            rounded down to an even number of pixels.
        centre: int (2,), row and column in pixels.
        image_shape: (..., H, W, C).

    Returns:
        int32 (4,): top, bottom, left, right, upper bounds exclusive.

    Source: docs/reference.md#mixing.
    """
    size = jnp.asarray(image_shape[-3:-1], jnp.int32)
    half = (size.astype(jnp.float32) * jnp.sqrt(1.0 - lam)).astype(jnp.int32) // 2
    low = jnp.clip(centre - half, 0, size)
    high = jnp.clip(centre + half, 0, size)
    return jnp.stack([low[0], high[0], low[1], high[1]])


def draw(
    key: jax.Array, recipe: Any, image_shape: Sequence[int]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Draws how to mix a batch.

    Args:
        key: random key.
        recipe: see the top of the file.
        image_shape: (..., H, W, C).

    Returns:
        lam, float32 scalar: the share of the image itself, for cutmix the true share after clipping
            the box; 1 for an unmixed batch.
        use_cutmix, bool scalar: False for an unmixed batch.
        box, int32 (4,): see `cut_box`.

    Source: docs/reference.md#mixing.
    """
    kind_key, mixup_key, cutmix_key, centre_key, on_key = jax.random.split(key, 5)
    mixup, cutmix = float(recipe.mixup), float(recipe.cutmix)
    share = recipe.switch_prob if mixup and cutmix else float(cutmix > 0)
    on = jax.random.bernoulli(on_key, recipe.mix_prob if mixup or cutmix else 0.0)
    use_cutmix = on & jax.random.bernoulli(kind_key, share)
    lam = jnp.ones(())
    if mixup or cutmix:
        # One draw for both: it is three loops, for whose ends a GPU makes its host wait.
        alpha = jnp.where(use_cutmix, cutmix or 1.0, mixup or 1.0)
        beta_key = jnp.where(use_cutmix, cutmix_key, mixup_key)
        lam = jnp.where(on, jax.random.beta(beta_key, alpha, alpha), 1.0)
    height, width = image_shape[-3:-1]
    centre = jax.random.randint(centre_key, (2,), 0, jnp.asarray([height, width]))
    box = cut_box(lam, centre, image_shape)
    area = (box[1] - box[0]) * (box[3] - box[2])
    lam = jnp.where(use_cutmix, 1.0 - area.astype(jnp.float32) / (height * width), lam)
    return lam, use_cutmix, box


def apply(
    images: jax.Array, targets: jax.Array, lam: jax.Array, use_cutmix: jax.Array, box: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Mixes images and targets with their mirror in the batch.

    In a batch of odd size the middle image is its own partner.

    Args:
        images: (B, H, W, C), float.
        targets: (B, K).
        lam: from `draw`; for cutmix the true share.
        use_cutmix: from `draw`.
        box: from `draw`.

    Returns:
        Images and targets of the same shapes and dtypes.

    Source: docs/reference.md#mixing.
    """
    height, width = images.shape[-3:-1]
    y, x = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    inside = (y >= box[0]) & (y < box[1]) & (x >= box[2]) & (x < box[3])
    # One weight per pixel serves both kinds: lam everywhere, or 0 in the box and 1 outside.
    weight = jnp.where(use_cutmix, jnp.where(inside, 0.0, 1.0), lam)
    weight = weight[None, :, :, None].astype(images.dtype)
    mixed = images * weight + images[::-1] * (1 - weight)
    return mixed, targets * lam + targets[::-1] * (1.0 - lam)


def mix(
    key: jax.Array, images: jax.Array, labels: jax.Array, classes: int, recipe: Any
) -> tuple[jax.Array, jax.Array]:
    """Smooths the labels and mixes the batch; with both alphas 0 only the labels are smoothed.

    Args:
        key: random key.
        images: (B, H, W, C), float.
        labels: (B,), integers.
        classes: K.
        recipe: see the top of the file.

    Returns:
        Images of the same shape and dtype, and targets, float32 (B, K).
    """
    targets = smooth_one_hot(labels, classes, recipe.smoothing)
    if not (recipe.mixup or recipe.cutmix):
        return images, targets
    return apply(images, targets, *draw(key, recipe, images.shape))
