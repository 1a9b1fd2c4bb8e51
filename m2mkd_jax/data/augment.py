"""Training and evaluation transforms on the host: uint8 in, uint8 out (reference section 6).

Normalising, RandAugment, erasing and mixing are not done here.
Axes: B batch, H height, W width, C channels (3), T tries (10), S the wanted image size.
"""

import dataclasses
import difflib
import math

import numpy as np
from PIL import Image

from m2mkd_jax.errors import UserError

CROPS = ("none", "shift", "random_resized")
TRIES = 10
RATIO = (3 / 4, 4 / 3)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What happens to a training image. Small and picklable: it travels to Grain's workers.

    crop: one of CROPS; shift: largest shift in pixels; scale: smallest and largest share of the
    image's area; flip: mirror half of the images.
    """

    crop: str
    shift: int
    scale: tuple[float, float]
    flip: bool

    @classmethod
    def from_config(cls, config):
        """Reads `config.augment`; raises UserError for a value that makes no sense."""
        augment = config.augment
        if augment.crop not in CROPS:
            close = difflib.get_close_matches(str(augment.crop), CROPS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(CROPS)}"
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
        return cls(augment.crop, int(augment.shift), scale, bool(augment.flip))


@dataclasses.dataclass(frozen=True)
class Draws:
    """The uniform numbers in [0, 1) behind B augmentations.

    They are drawn for the GLOBAL batch before anything is known about the images, so that every
    process and worker sees the same numbers for the same image.
    crop: (B, T, 2), area and aspect of each try; place: (B, 2), row and column; flip: (B,).
    """

    crop: np.ndarray
    place: np.ndarray
    flip: np.ndarray

    @classmethod
    def of(cls, rng, batch_size):
        """Draws for `batch_size` images from an np.random.Generator."""
        return cls(
            rng.random((batch_size, TRIES, 2)), rng.random((batch_size, 2)), rng.random(batch_size)
        )

    def __getitem__(self, part):
        """The draws of some of the images (a slice)."""
        return Draws(self.crop[part], self.place[part], self.flip[part])


def shift_batch(images, place, shift):
    """Pads by `shift` black pixels on every side and cuts a window of the old size.

    Zero padding in uint8, before normalising, like the published crop for images of 32 pixels.
    Args: images uint8 (B, H, W, C); place (B, 2) in [0, 1), shifts are uniform over
      -shift..shift rows and columns; shift in pixels.
    Returns: uint8 (B, H, W, C).
    """
    if shift == 0:
        return images
    batch, height, width, channels = images.shape
    padded = np.zeros((batch, height + 2 * shift, width + 2 * shift, channels), images.dtype)
    padded[:, shift:-shift, shift:-shift] = images
    # Rows as flat bytes: a window is then H contiguous runs, which numpy copies 10 times faster
    # than single pixels.
    rows = padded.reshape(batch, height + 2 * shift, -1)
    windows = np.lib.stride_tricks.sliding_window_view(
        rows, (height, width * channels), axis=(1, 2)
    )
    top, left = np.floor(place * (2 * shift + 1)).astype(np.int64).T
    return windows[np.arange(batch), top, left * channels].reshape(images.shape)


def flip_batch(images, draws):
    """Mirrors the images (B, H, W, C) whose draw (B,) in [0, 1) is below 0.5, left to right."""
    mirrored = draws < 0.5
    # A pixel as one item: reversing whole pixels takes a third of the time of reversing bytes.
    pixels = np.array(images, order="C").view(f"V{images.shape[-1]}")
    pixels[mirrored] = pixels[mirrored][:, :, ::-1]
    return pixels.view(np.uint8)


def crop_box(height, width, tries, place, scale=(0.08, 1.0), ratio=RATIO):
    """The box of a random resized crop, as published (reference section 6).

    A try is an area uniform in `scale` of the image's and an aspect (width / height) log-uniform
    in `ratio`; the first box that fits inside the image is placed uniformly. If none fits: the
    largest centred box within the aspect limits.

    Args: height, width in pixels; tries (T, 2) and place (2,), uniform in [0, 1).
    Returns: (top, left, height, width) in pixels.
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


def resized_crop(image, box, size):
    """Cuts `box` (top, left, height, width) out of a PIL image, bicubic to uint8 (S, S, 3)."""
    top, left, height, width = box
    # Crop first: resize(box=...) would let the filter see pixels outside of the box.
    cut = image.crop((left, top, left + width, top + height))
    return np.asarray(cut.resize((size, size), Image.Resampling.BICUBIC))


def evaluation_image(image, size):
    """Resizes the shorter side to int(256 / 224 * size), bicubic, and cuts the centre.

    Args: image, a PIL image in RGB; size S in pixels.
    Returns: uint8 (S, S, 3).
    """
    short = int(256 / 224 * size)
    width, height = image.size
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def training_images(source, indices, augmentation, draws, size):
    """Loads and augments some images of a source.

    Args: source (see sources.py); indices int (B,); draws for these B images; size S in pixels.
    Returns: uint8 (B, S, S, 3).
    """
    if augmentation.crop == "random_resized":
        images = np.stack([
            _random_resized(source.read(index), tries, place, augmentation.scale, size)
            for index, tries, place in zip(indices, draws.crop, draws.place, strict=True)
        ])
    else:
        images = source.evaluation_images(indices)
    if augmentation.crop == "shift":
        images = shift_batch(images, draws.place, augmentation.shift)
    return flip_batch(images, draws.flip) if augmentation.flip else images


def _random_resized(image, tries, place, scale, size):
    return resized_crop(image, crop_box(image.height, image.width, tries, place, scale), size)
