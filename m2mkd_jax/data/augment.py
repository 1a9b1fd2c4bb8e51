"""Training and evaluation transforms on the host: uint8 in, uint8 out (reference section 6).

In this order: crop, flip, RandAugment or colour jitter. What needs normalised pixels, erasing and
mixing, happens on the device (train/step.py).
Axes: B batch, H height, W width, C channels (3), T tries (10), S the wanted image size.
"""

import dataclasses
import difflib
import math

import cv2
import numpy as np

from m2mkd_jax.data import rand_augment, resample
from m2mkd_jax.errors import UserError

CROPS = ("none", "shift", "random_resized")
TRIES = 10
RATIO = (3 / 4, 4 / 3)
# A JPEG may be decoded at a half, a quarter or an eighth while the crop stays this many times the
# wanted size: Pillow's own choice for thumbnails, close to resampling the whole.
_REDUCING_GAP = 2.0


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What happens to a training image. Small and picklable: it travels to Grain's workers.

    crop: one of CROPS; shift: largest shift in pixels; scale: smallest and largest share of the
    image's area; flip: mirror half of the images; policy: RandAugment, or None; color_jitter:
    largest change of brightness, contrast and saturation where there is no policy.
    """

    crop: str
    shift: int
    scale: tuple[float, float]
    flip: bool
    policy: rand_augment.Policy | None = None
    color_jitter: float = 0.0

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
        if not 0 <= augment.color_jitter <= 1:
            raise UserError(f"data.augment.color_jitter is {augment.color_jitter}: use 0 to 1")
        if not 0 <= augment.erase <= 1:
            raise UserError(f"data.augment.erase is {augment.erase}: use a probability, 0 to 1")
        text = augment.rand_augment
        policy = rand_augment.Policy.parse(text) if text else None
        return cls(
            augment.crop,
            int(augment.shift),
            scale,
            bool(augment.flip),
            policy,
            float(augment.color_jitter),
        )

    @property
    def layers(self):
        """RandAugment's operations per image."""
        return self.policy.layers if self.policy else 0


@dataclasses.dataclass(frozen=True)
class Draws:
    """The random numbers behind B augmentations.

    They are drawn for the GLOBAL batch before anything is known about the images, so that every
    process and worker sees the same numbers for the same image.
    Uniform in [0, 1): crop (B, T, 2), area and aspect of each try; place (B, 2), row and column;
    flip (B,); jitter (B, 2, 3), factors and order. choices: of RandAugment.
    """

    crop: np.ndarray
    place: np.ndarray
    flip: np.ndarray
    jitter: np.ndarray
    choices: rand_augment.Choices

    @classmethod
    def of(cls, rng, batch_size, layers=0):
        """Draws for `batch_size` images from an np.random.Generator."""
        return cls(
            rng.random((batch_size, TRIES, 2)),
            rng.random((batch_size, 2)),
            rng.random(batch_size),
            rng.random((batch_size, 2, 3)),
            rand_augment.Choices.of(rng, batch_size, layers),
        )

    def __getitem__(self, part):
        """The draws of some of the images (a slice)."""
        return Draws(*(getattr(self, f.name)[part] for f in dataclasses.fields(self)))


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
    flipped = images.copy()
    for i in np.flatnonzero(draws < 0.5):
        flipped[i] = cv2.flip(images[i], 1)
    return flipped


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


def resized_crop(image, box, size, times=1):
    """Cuts `box` out of uint8 (H, W, C), bicubic to uint8 (S, S, C).

    box: (top, left, height, width) in pixels of an image that is `times` as large as this one.
    """
    top, left, height, width = (side / times for side in box)
    # Crop first: the filter must not see pixels outside of the box.
    rows = slice(math.floor(top), math.ceil(top + height))
    columns = slice(math.floor(left), math.ceil(left + width))
    top, left = top - rows.start, left - columns.start
    box = left, top, left + width, top + height
    return resample.resize(image[rows, columns], size, size, box)


def evaluation_image(image, size):
    """Resizes the shorter side to int(256 / 224 * size), bicubic, and cuts the centre.

    Args: image uint8 (H, W, C); size S in pixels.
    Returns: uint8 (S, S, C).
    """
    short = int(256 / 224 * size)
    height, width = image.shape[:2]
    if width <= height:
        width, height = short, int(short * height / width)
    else:
        width, height = int(short * width / height), short
    left, top = round((width - size) / 2), round((height - size) / 2)
    return resample.resize(image, height, width)[top : top + size, left : left + size]


def training_images(source, indices, augmentation, draws, size):
    """Loads and augments some images of a source.

    Args: source, or its reader (see sources.py); indices int (B,); draws for these B images; size S
      in pixels.
    Returns: uint8 (B, S, S, 3).
    """
    if augmentation.crop == "random_resized":
        images = _random_resized(source, indices, augmentation.scale, draws, size)
    else:
        images = source.evaluation_images(indices, size)
    if augmentation.crop == "shift":
        images = shift_batch(images, draws.place, augmentation.shift)
    if augmentation.flip:
        images = flip_batch(images, draws.flip)
    return _recolour(images, augmentation, draws)


def _random_resized(source, indices, scale, draws, size):
    images = np.empty((len(indices), size, size, 3), np.uint8)
    # The copies of repeated augmentation stand side by side: decoded once, cropped many times.
    starts = np.flatnonzero(np.diff(indices, prepend=-1))
    for start, end in zip(starts, [*starts[1:], len(indices)], strict=True):
        crops = _Crops(draws[start:end], scale, size)
        image = source.read(indices[start], crops.shrink)
        images[start:end] = crops.cut(image)
    return images


class _Crops:
    """The crops of one image's copies; it learns the size of the file before it is decoded."""

    def __init__(self, draws, scale, size):
        self._draws, self._scale, self._size = draws, scale, size
        self._boxes = self._height = None

    def shrink(self, height, width):
        """How many times smaller an image of this size may be decoded."""
        self._height = height
        self._boxes = [
            crop_box(height, width, tries, place, self._scale)
            for tries, place in zip(self._draws.crop, self._draws.place, strict=True)
        ]
        return min(min(box[2:]) for box in self._boxes) / (_REDUCING_GAP * self._size)

    def cut(self, image):
        """The crops: a list of uint8 (S, S, 3)."""
        if self._boxes is None:  # it came from memory
            self.shrink(*image.shape[:2])
        times = round(self._height / len(image))
        return [resized_crop(image, box, self._size, times) for box in self._boxes]


def _recolour(images, augmentation, draws):
    """RandAugment, or colour jitter where there is none. images (B, S, S, 3), may be changed."""
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
