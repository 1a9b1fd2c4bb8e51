"""A generated detection set: scikit-learn's digits scattered over textured canvases.

Scene i of a seed is a function of (seed, split, i) alone. Digits overlap: what a later one covers
is no part of the mask of an earlier one, of which at least 70% stay to be seen.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from PIL import Image

from m2mkd_jax.data.annotations import Scene, tight
from m2mkd_jax.errors import require

CLASSES = 10
# The last share of the digits is for the test scenes.
TEST_SHARE = 0.2
MOST_OBJECTS = 6
SIDES = (24, 56)
# No digit hides more of another than leaves this share of it to be seen.
LEAST_VISIBLE = 0.7
TRIES = 20  # places that are tried for a digit before it is left out
# Ink from this share of the darkest on is part of the mask.
INK = 0.35


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """Scikit-learn's 1,797 digits: images (N, 8, 8) from 0 to 1, and their classes (N,)."""
    # It takes a second to import, and only these data sets need it.
    import sklearn.datasets  # noqa: PLC0415 - slow import

    data = sklearn.datasets.load_digits()
    return data.images / 16, data.target


@functools.cache
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 8, 8) from 0 to 1, and their classes, of a split."""
    images, classes = load_digits()
    cut = int(len(images) * (1 - TEST_SHARE))
    own = slice(cut) if split == "train" else slice(cut, None)
    return images[own], classes[own]


def digits_scene(seed: int, split: str, index: int, side: int = 128) -> Scene:
    """Makes a scene.

    Args:
        seed: of the set.
        split: 'train' or 'test'; they have no digit in common.
        index: of the scene.
        side: of the canvas, in pixels.

    Raises:
        UserError: the canvas is smaller than a digit.
    """
    require(side >= SIDES[1], f"digits_scene: a canvas of {side} pixels; at least {SIDES[1]}")
    rng = np.random.default_rng([seed, split == "test", index])
    images, classes = _digits(split)
    canvas = _texture(rng, side)
    masks: list[np.ndarray] = []
    chosen: list[int] = []
    whole: list[int] = []  # pixels of each digit before others hid some
    for _ in range(rng.integers(1, MOST_OBJECTS + 1)):
        digit = int(rng.integers(len(images)))
        own = int(rng.integers(SIDES[0], SIDES[1] + 1))
        small = Image.fromarray((images[digit] * 255).astype(np.uint8))
        ink = np.asarray(small.resize((own, own), Image.Resampling.BICUBIC), np.float64) / 255
        mask = _place(rng, ink > INK, side, masks, whole)
        if mask is None:
            continue
        canvas[mask] = _contrast(rng, canvas[mask].mean(0)) + rng.normal(0, 6, (mask.sum(), 3))
        masks = [other & ~mask for other in masks] + [mask]
        chosen.append(int(classes[digit]))
        whole.append(int(mask.sum()))
    image = np.clip(canvas, 0, 255).astype(np.uint8)
    return tight(Scene(image, np.zeros((len(masks), 4)), np.array(chosen, np.int64), [*masks]))


def _place(
    rng: np.random.Generator,
    shape: np.ndarray,
    side: int,
    masks: Sequence[np.ndarray],
    whole: Sequence[int],
) -> np.ndarray | None:
    """Where a digit goes on the canvas, bool (side, side); None: it would hide another too much.

    Args:
        rng: draws the place.
        shape: of the digit, bool (s, s).
        side: of the canvas.
        masks: of the digits that are there.
        whole: their pixels when none was hidden.
    """
    for _ in range(TRIES):
        mask = np.zeros((side, side), bool)
        top, left = rng.integers(0, side - len(shape) + 1, 2)
        mask[top : top + len(shape), left : left + len(shape)] = shape
        seen = ((other & ~mask).sum() for other in masks)
        if all(n >= LEAST_VISIBLE * of for n, of in zip(seen, whole, strict=True)):
            return mask
    return None


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """A canvas (side, side, 3) of smooth noise and stripes around a colour."""
    coarse = rng.normal(0, 25, (8, 8, 3)) + rng.uniform(60, 190, 3)
    coarse = np.clip(coarse, 0, 255).astype(np.uint8)
    canvas = np.asarray(
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC), np.float64
    )
    y, x = np.mgrid[:side, :side]
    angle, length = rng.uniform(0, np.pi), rng.uniform(6, 24)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 2 * np.pi / length)
    return canvas + rng.uniform(0, 18) * wave[..., None] + rng.normal(0, 4, canvas.shape)


def _contrast(rng: np.random.Generator, ground: np.ndarray) -> np.ndarray:
    """A colour that differs from the ground's by at least 60 in the mean."""
    light = ground.mean() < 128
    return rng.uniform(190, 255, 3) if light else rng.uniform(0, 60, 3)
