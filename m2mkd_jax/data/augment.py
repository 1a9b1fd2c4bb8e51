"""Training and evaluation transforms on the host, on uint8 images.

Training: crop, flip, then RandAugment or colour jitter. Erasing and mixing need normalised pixels
and run on the device (train/step.py).
Axes: B batch, H height, W width, C channels, T tries (10), S output size in pixels.

Source: docs/reference.md#augmentation.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from m2mkd_jax.data import rand_augment, resample
from m2mkd_jax.data.channels import RGB_CHANNELS, channels_of
from m2mkd_jax.data.image_source import ImageReader
from m2mkd_jax.errors import UserError, did_you_mean, require

CROPS = ("none", "shift", "random_resized")
TRIES = 10
RATIO = (3 / 4, 4 / 3)
Box = tuple[int, int, int, int]  # top, left, height, width
# A JPEG may be decoded at a half, a quarter or an eighth as long as the crop stays this many times
# larger than the output: the factor Pillow uses for thumbnails.
_REDUCING_GAP = 2.0


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """How training images are augmented. Picklable: it is sent to Grain's workers.

    Attributes:
        crop: one of CROPS.
        shift: largest shift in pixels.
        scale: smallest and largest share of the image's area in a crop.
        flip: mirror half of the images.
        policy: RandAugment, or None.
        color_jitter: largest change of brightness, contrast and saturation; without policy only.
        channels: C of the images.
    """

    crop: str
    shift: int
    scale: tuple[float, float]
    flip: bool
    policy: rand_augment.Policy | None = None
    color_jitter: float = 0.0
    channels: int = RGB_CHANNELS

    @classmethod
    def from_config(cls, config: Any) -> "Augmentation":
        """Reads `config.augment`.

        Raises:
            UserError: an invalid value.
        """
        augment = config.augment
        if augment.crop not in CROPS:
            hint = did_you_mean(str(augment.crop), CROPS, f"use one of {', '.join(CROPS)}")
            raise UserError(f"data.augment.crop is {augment.crop!r}: {hint}")
        if augment.crop == "shift" and not 0 <= augment.shift < config.image_size:
            raise UserError(
                f"data.augment.shift is {augment.shift} pixels for images of"
                f" {config.image_size}: use 0 to {config.image_size - 1}"
            )
        scale = tuple(float(share) for share in augment.scale)
        if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
            raise UserError(
                f"data.augment.scale is {scale}: use (smallest, largest) area, within (0, 1]"
            )
        require(
            0 <= augment.color_jitter <= 1,
            f"data.augment.color_jitter is {augment.color_jitter}: use 0 to 1",
        )
        require(
            0 <= augment.erase <= 1,
            f"data.augment.erase is {augment.erase}: use a probability, 0 to 1",
        )
        text = augment.rand_augment
        policy = rand_augment.Policy.parse(text) if text else None
        return cls(
            augment.crop,
            int(augment.shift),
            (scale[0], scale[1]),
            bool(augment.flip),
            policy,
            float(augment.color_jitter),
            channels_of(config),
        )

    @property
    def layers(self) -> int:
        """The number of RandAugment operations per image."""
        return self.policy.layers if self.policy else 0


@dataclasses.dataclass(frozen=True)
class Draws:
    """The random numbers of B augmentations, uniform in [0, 1).

    They are drawn for the global batch, independently of the images, so that every process and
    worker has the same numbers for the same image.

    Attributes:
        crop: (B, T, 2), area and aspect of each try.
        place: (B, 2), row and column of the crop.
        flip: (B,).
        jitter: (B, 2, 3), factors and order of the colour jitter.
        choices: of RandAugment.
    """

    crop: np.ndarray
    place: np.ndarray
    flip: np.ndarray
    jitter: np.ndarray
    choices: rand_augment.Choices

    @classmethod
    def of(cls, rng: np.random.Generator, batch_size: int, layers: int = 0) -> "Draws":
        """Draws the numbers for `batch_size` images with `layers` RandAugment operations each."""
        return cls(
            rng.random((batch_size, TRIES, 2)),
            rng.random((batch_size, 2)),
            rng.random(batch_size),
            rng.random((batch_size, 2, 3)),
            rand_augment.Choices.of(rng, batch_size, layers),
        )

    @classmethod
    def of_each(cls, generators: Sequence[np.random.Generator], layers: int = 0) -> "Draws":
        """Draws the numbers for one image from each of B generators; `layers` as for `of`."""
        return _concatenated([cls.of(rng, 1, layers) for rng in generators])

    def __getitem__(self, part: slice) -> "Draws":
        """The draws of some of the images."""
        return Draws(*(getattr(self, f.name)[part] for f in dataclasses.fields(self)))


def _concatenated(parts: Sequence[Any]) -> Any:
    """Arrays, or dataclasses of arrays, one after the other."""
    first = parts[0]
    if isinstance(first, np.ndarray):
        return np.concatenate(parts)
    names = [field.name for field in dataclasses.fields(first)]
    return type(first)(*(_concatenated([getattr(part, n) for part in parts]) for n in names))


def shift_batch(images: np.ndarray, place: np.ndarray, shift: int) -> np.ndarray:
    """Pads images by `shift` black pixels on every side and crops a window of the original size.

    The padding is black before normalisation, like the published crop for images of 32 pixels.

    Args:
        images: uint8 (B, H, W, C).
        place: (B, 2), uniform in [0, 1): the rows and columns of the shift, in -shift..shift.
        shift: pixels.

    Returns:
        uint8 (B, H, W, C).
    """
    if shift == 0:
        return images
    batch, height, width, channels = images.shape
    padded = np.zeros((batch, height + 2 * shift, width + 2 * shift, channels), images.dtype)
    padded[:, shift:-shift, shift:-shift] = images
    # Rows as flat bytes: a window is then H contiguous runs, which numpy copies 10 times faster
    # than pixels.
    rows = padded.reshape(batch, height + 2 * shift, -1)
    windows = np.lib.stride_tricks.sliding_window_view(
        rows, (height, width * channels), axis=(1, 2)
    )
    top, left = np.floor(place * (2 * shift + 1)).astype(np.int64).T
    return windows[np.arange(batch), top, left * channels].reshape(images.shape)


def flip_batch(images: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """Mirrors the images (B, H, W, C) whose draw (B,) in [0, 1) is below 0.5, left to right."""
    flipped = images.copy()
    for i in np.flatnonzero(draws < 0.5):
        # OpenCV drops an axis of one channel.
        flipped[i] = cv2.flip(images[i], 1).reshape(images[i].shape)
    return flipped


def crop_box(
    height: int,
    width: int,
    tries: np.ndarray,
    place: np.ndarray,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = RATIO,
) -> Box:
    """The box of a random resized crop.

    Each try draws an area (a share of the image's, uniform in `scale`) and an aspect (width /
    height, log-uniform in `ratio`). The first box that fits inside the image is placed uniformly.
    If none fits, the box is the largest centred one within the aspect limits.

    Args:
        height: of the image, in pixels.
        width: of the image, in pixels.
        tries: (T, 2), uniform in [0, 1): area and aspect.
        place: (2,), uniform in [0, 1): row and column.
        scale: smallest and largest share of the area.
        ratio: smallest and largest aspect.

    Returns:
        (top, left, height, width) in pixels.

    Source: docs/reference.md#crop.
    """
    low, high = math.log(ratio[0]), math.log(ratio[1])
    for area, aspect in tries:
        pixels = (scale[0] + (scale[1] - scale[0]) * area) * height * width
        aspect = math.exp(low + (high - low) * aspect)
        box_width = round(math.sqrt(pixels * aspect))
        box_height = round(math.sqrt(pixels / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(place[0] * (height - box_height + 1))
            left = int(place[1] * (width - box_width + 1))
            return top, left, box_height, box_width
    box_height, box_width = height, width
    if width / height < ratio[0]:
        box_height = round(width / ratio[0])
    elif width / height > ratio[1]:
        box_width = round(height * ratio[1])
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


def resized_crop(image: np.ndarray, box: Box, size: int, times: int = 1) -> np.ndarray:
    """Crops `box` out of an image and resizes it, bicubic.

    Args:
        image: uint8 (H, W, C).
        box: in pixels of an image `times` as large as this one.
        size: S in pixels.
        times: the factor by which the image was reduced when it was decoded.

    Returns:
        uint8 (S, S, C).
    """
    top, left, height, width = (side / times for side in box)
    # Crop first: the filter must not use pixels outside of the box.
    rows = slice(math.floor(top), math.ceil(top + height))
    columns = slice(math.floor(left), math.ceil(left + width))
    top, left = top - rows.start, left - columns.start
    part = left, top, left + width, top + height
    return resample.resize(image[rows, columns], size, size, part)


def evaluation_image(image: np.ndarray, size: int) -> np.ndarray:
    """Resizes the shorter side to int(256 / 224 * size), bicubic, and crops the centre.

    Args:
        image: uint8 (H, W, C).
        size: S in pixels.

    Returns:
        uint8 (S, S, C).

    Source: docs/reference.md#normalisation.
    """
    short = int(256 / 224 * size)
    height, width = image.shape[:2]
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    left, top = round((width - size) / 2), round((height - size) / 2)
    return resample.resize(image, height, width, window=(top, left, size, size))


def training_images(
    source: ImageReader,
    indices: np.ndarray,
    augmentation: Augmentation,
    draws: Draws,
    size: int,
) -> np.ndarray:
    """Loads and augments images.

    Args:
        source: the reader of an `ImageSource`.
        indices: int (B,).
        augmentation: what to do.
        draws: the random numbers of these B images.
        size: S in pixels.

    Returns:
        uint8 (B, S, S, C).
    """
    if augmentation.crop == "random_resized":
        images = _random_resized(source, indices, augmentation, draws, size)
    else:
        images = source.evaluation_images(indices, size)
    if augmentation.crop == "shift":
        images = shift_batch(images, draws.place, augmentation.shift)
    if augmentation.flip:
        images = flip_batch(images, draws.flip)
    return _recolour(images, augmentation, draws)


def _random_resized(
    source: ImageReader,
    indices: np.ndarray,
    augmentation: Augmentation,
    draws: Draws,
    size: int,
) -> np.ndarray:
    images = np.empty((len(indices), size, size, augmentation.channels), np.uint8)
    # The copies of repeated augmentation are adjacent: decode each image once for all of them.
    starts = np.flatnonzero(np.diff(indices, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(indices)], strict=True):
        crops = _Crops(draws[start:end], augmentation.scale, size)
        image = source.read(indices[start], crops.shrink)
        images[start:end] = crops.cut(image)
    return images


class _Crops:
    """The crops of the copies of one image, whose size is known only when it is read."""

    def __init__(self, draws: Draws, scale: tuple[float, float], size: int) -> None:
        self._draws, self._scale, self._size = draws, scale, size
        self._boxes: list[Box] | None = None
        self._height = 0

    def shrink(self, height: int, width: int) -> float:
        """How many times smaller an image of this size may be decoded."""
        self._height = height
        self._boxes = [
            crop_box(height, width, tries, place, self._scale)
            for tries, place in zip(self._draws.crop, self._draws.place, strict=True)
        ]
        return min(min(box[2:]) for box in self._boxes) / (_REDUCING_GAP * self._size)

    def cut(self, image: np.ndarray) -> Sequence[np.ndarray]:
        """The crops, each uint8 (S, S, C)."""
        if self._boxes is None:  # an image in memory, read without calling `shrink`
            self.shrink(*image.shape[:2])
        times = round(self._height / len(image))
        return [resized_crop(image, box, self._size, times) for box in self._boxes or ()]


def _recolour(images: np.ndarray, augmentation: Augmentation, draws: Draws) -> np.ndarray:
    """Applies RandAugment or colour jitter to (B, S, S, C), possibly in place."""
    policy, strength = augmentation.policy, augmentation.color_jitter
    if policy is None and not strength:
        return images
    images = np.ascontiguousarray(images)
    for i, image in enumerate(images):
        if policy is not None:
            steps = rand_augment.operations(policy, draws.choices[i])
            images[i] = rand_augment.apply(image, steps)
        else:
            images[i] = rand_augment.jitter(image, strength, draws.jitter[i])
    return images
