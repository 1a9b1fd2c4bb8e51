"""Random erasing of normalised images, inside the jitted step.

It runs on the device because it fills with normal noise after normalisation, and images come from
the host as bytes. Axes: B batch, H height, W width, C channels, T tries (10).

Source: docs/reference.md#erasing.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from m2mkd_jax.parallel import backend

TRIES = 10
AREA = (0.02, 0.33)  # share of the image
ASPECT = 0.3  # height / width lies between this and 1 / 0.3


def draw_boxes(key: jax.Array, probability: float, image_shape: Sequence[int]) -> jax.Array:
    """Draws the box of each image.

    Each try draws an area uniform in AREA and an aspect log-uniform in ASPECT..1/ASPECT; the first
    box smaller than the image in both directions is placed uniformly. The box is empty if the image
    is not selected or no try fits.

    Args:
        key: random key.
        probability: that an image is selected.
        image_shape: (B, H, W, C).

    Returns:
        int32 (4, B): top, bottom, left, right, upper bounds exclusive.

    Source: docs/reference.md#erasing.
    """
    batch, height, width = image_shape[:3]
    # One call for all numbers, because each call takes long to compile.
    draws = jax.random.uniform(key, (2 * TRIES + 3, batch))
    area, aspect, place, on = draws[:TRIES], draws[TRIES : 2 * TRIES], draws[-3:-1], draws[-1]
    pixels = (AREA[0] + (AREA[1] - AREA[0]) * area) * height * width
    aspect = jnp.exp((2 * aspect - 1) * -math.log(ASPECT))
    tall = jnp.round(jnp.sqrt(pixels * aspect)).astype(jnp.int32)
    wide = jnp.round(jnp.sqrt(pixels / aspect)).astype(jnp.int32)
    fits = (tall < height) & (wide < width)
    first = fits & (jnp.cumsum(fits, axis=0) == 1) & (on < probability)[None]
    first = first.astype(jnp.int32)
    tall, wide = jnp.sum(tall * first, 0), jnp.sum(wide * first, 0)
    top = jnp.floor(place[0] * (height - tall + 1).astype(jnp.float32)).astype(jnp.int32)
    left = jnp.floor(place[1] * (width - wide + 1).astype(jnp.float32)).astype(jnp.int32)
    return jnp.stack([top, top + tall, left, left + wide])


def erase(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Fills one box of each selected image with normal noise per pixel and channel.

    Args:
        key: random key.
        images: (B, H, W, C), normalised.
        probability: that an image is selected; with 0 nothing is computed.

    Returns:
        Images of the same shape and dtype.
    """
    if not probability:
        return images
    box_key, noise_key = jax.random.split(key)
    box = draw_boxes(box_key, probability, images.shape)[..., None]
    y, x = jnp.arange(images.shape[1])[None], jnp.arange(images.shape[2])[None]
    rows, columns = (y >= box[0]) & (y < box[1]), (x >= box[2]) & (x < box[3])
    inside = (rows[:, :, None] & columns[:, None, :])[..., None]

    def fill(images: jax.Array) -> jax.Array:
        return jnp.where(inside, jax.random.normal(noise_key, images.shape, images.dtype), images)

    if backend.platform() != "cpu":  # a GPU's host would wait for the boxes
        return fill(images)
    # Else XLA computes the noise where it reads the patches, number by number.
    return jax.lax.cond((box[0] < box[1]).any(), fill, lambda images: images, images)
