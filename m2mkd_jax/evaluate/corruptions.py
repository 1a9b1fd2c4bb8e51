"""Corrupted test images: six kinds at five severities, for any data set.

Axes: B batch, H height, W width, S pixels of a block.

The kinds are of those of Hendrycks and Dietterich 2019 (arXiv 1903.12261), written out for images
of any size: lengths are shares of the image's side. Severities are those at which a small network
loses a little (1) to much (5) of its accuracy, not the published constants of ImageNet-C.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

SEVERITIES = (1, 2, 3, 4, 5)
# By severity: standard deviation of the noise and amount of brightness, of pixels from 0 to 1; what
# is left of the contrast; blur, shift and block as shares of the image's side.
NOISE = (0.04, 0.08, 0.12, 0.18, 0.26)
BLUR = (0.015, 0.025, 0.04, 0.06, 0.09)
CONTRAST = (0.6, 0.45, 0.3, 0.2, 0.12)
BRIGHTNESS = (0.1, 0.2, 0.3, 0.4, 0.5)
SHIFT = (0.04, 0.08, 0.12, 0.16, 0.2)
PIXELATE = (1 / 16, 1 / 12, 1 / 8, 1 / 6, 1 / 4)


def noise(images: jax.Array, keys: jax.Array, level: int) -> jax.Array:
    """Gaussian noise, of its own in every pixel and channel."""
    drawn = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:]))(keys)
    return images + NOISE[level] * drawn


def blur(images: jax.Array, keys: jax.Array, level: int) -> jax.Array:
    """Gaussian blur; pixels beyond the border are those at the border."""
    del keys
    sigma = BLUR[level] * images.shape[1]
    radius = max(int(np.ceil(3 * sigma)), 1)
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    for axis in (1, 2):
        pads = [(radius, radius) if i == axis else (0, 0) for i in range(4)]
        padded, size = jnp.pad(images, pads, mode="edge"), images.shape[axis]
        parts = (
            weight * jax.lax.slice_in_dim(padded, i, i + size, axis=axis)
            for i, weight in enumerate(weights)
        )
        images = sum(parts, jnp.zeros_like(images))
    return images


def contrast(images: jax.Array, keys: jax.Array, level: int) -> jax.Array:
    """Less distance of every pixel to the image's mean, per channel."""
    del keys
    mean = images.mean((1, 2), keepdims=True)
    return mean + CONTRAST[level] * (images - mean)


def brightness(images: jax.Array, keys: jax.Array, level: int) -> jax.Array:
    """A constant added to every pixel."""
    del keys
    return images + BRIGHTNESS[level]


def shift(images: jax.Array, keys: jax.Array, level: int) -> jax.Array:
    """Moved down and to the right; what comes in is the pixel at the border."""
    del keys
    by = max(round(SHIFT[level] * images.shape[1]), 1)
    padded = jnp.pad(images, ((0, 0), (by, 0), (by, 0), (0, 0)), mode="edge")
    return padded[:, : images.shape[1], : images.shape[2]]


def pixelate(images: jax.Array, keys: jax.Array, level: int) -> jax.Array:
    """Blocks of S by S pixels have their mean; blocks at the border may be smaller."""
    del keys
    side = max(round(PIXELATE[level] * images.shape[1]), 2)
    height, width = images.shape[1:3]
    more = (-height % side, -width % side)
    padded = jnp.pad(images, ((0, 0), (0, more[0]), (0, more[1]), (0, 0)), mode="edge")
    shape = (len(images), padded.shape[1] // side, side, padded.shape[2] // side, side, -1)
    means = padded.reshape(shape).mean((2, 4))
    blocks = jnp.repeat(jnp.repeat(means, side, axis=1), side, axis=2)
    return blocks[:, :height, :width]


KINDS: dict[str, Callable[[jax.Array, jax.Array, int], jax.Array]] = {
    "noise": noise,
    "blur": blur,
    "contrast": contrast,
    "brightness": brightness,
    "shift": shift,
    "pixelate": pixelate,
}


def corrupt(
    images: jax.Array, key: jax.Array, first: jax.Array | int, kind: str, severity: int
) -> jax.Array:
    """Corrupts images; what it draws for an image depends on the image's number alone.

    Args:
        images: uint8 (B, H, W, C).
        key: of the noise.
        first: number of the first image; the others follow.
        kind: of KINDS.
        severity: of SEVERITIES.

    Returns:
        uint8 (B, H, W, C).
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(len(images)))
    pixels = KINDS[kind](images.astype(jnp.float32) / 255, keys, SEVERITIES.index(severity))
    return jnp.round(255 * jnp.clip(pixels, 0, 1)).astype(jnp.uint8)
