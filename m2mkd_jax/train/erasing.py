"""Random erasing of normalised images, inside the jitted step (reference section 6).

On the device, because it fills with normal numbers after normalising, and images cross from the
host as bytes. Axes: B batch, H height, W width, C channels, T tries (10; leading).
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

TRIES = 10
AREA = (0.02, 0.33)  # share of the image
ASPECT = 0.3  # and 1 / 0.3: limits of height / width


def draw_boxes(key: jax.Array, probability: float, image_shape: Sequence[int]) -> jax.Array:
    """The box of each image: int32 (4, B) = top, bottom, left, right, bounds exclusive.

    A try is an area uniform in AREA and an aspect log-uniform in ASPECT..1/ASPECT; the first box
    smaller than the image both ways is placed uniformly. An image that is not drawn, or that no
    try fits, has an empty box.

    image_shape: (B, H, W, C).
    """
    batch, height, width = image_shape[:3]
    # One call for all numbers: each takes long to compile.
    draws = jax.random.uniform(key, (2 * TRIES + 3, batch))
    area, aspect, place, on = draws[:TRIES], draws[TRIES : 2 * TRIES], draws[-3:-1], draws[-1]
    pixels = (AREA[0] + (AREA[1] - AREA[0]) * area) * height * width
    aspect = jnp.exp((2 * aspect - 1) * -math.log(ASPECT))
    tall = jnp.round(jnp.sqrt(pixels * aspect)).astype(jnp.int32)
    wide = jnp.round(jnp.sqrt(pixels / aspect)).astype(jnp.int32)
    fits = (tall < height) & (wide < width)
    first = fits & (jnp.cumsum(fits, 0) == 1) & (on < probability)
    tall, wide = jnp.sum(tall * first, 0), jnp.sum(wide * first, 0)
    top = jnp.floor(place[0] * (height - tall + 1)).astype(jnp.int32)
    left = jnp.floor(place[1] * (width - wide + 1)).astype(jnp.int32)
    return jnp.stack([top, top + tall, left, left + wide])


def erase(key: jax.Array, images: jax.Array, probability: float) -> jax.Array:
    """Fills one box of each drawn image (B, H, W, C) with a normal number per pixel and channel.

    probability: of an image to be drawn; with 0 nothing is computed. Shape and type stay.
    """
    if not probability:
        return images
    box_key, noise_key = jax.random.split(key)
    box = draw_boxes(box_key, probability, images.shape)[..., None]
    y, x = jnp.arange(images.shape[1]), jnp.arange(images.shape[2])
    rows, columns = (y >= box[0]) & (y < box[1]), (x >= box[2]) & (x < box[3])
    inside = (rows[:, :, None] & columns[:, None, :])[..., None]
    return jnp.where(inside, jax.random.normal(noise_key, images.shape, images.dtype), images)
