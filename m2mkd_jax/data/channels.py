"""How many channels images have, by config.data.channels: 3, RGB, where it is not set.

Axes: H height, W width, S image size in pixels, C channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from m2mkd_jax.errors import UserError

RGB_CHANNELS = 3
# Of data sets whose images are decoded already, the numbers of channels that they can have.
_GREY = ("digits", "fashion_mnist")


def channels_of(data: Any) -> int:
    """C of the images of a data section."""
    return data.get("channels", RGB_CHANNELS)


def image_shape(data: Any) -> tuple[int, int, int]:
    """(S, S, C) of the images of a data section."""
    return data.image_size, data.image_size, channels_of(data)


def check_channels(data: Any) -> None:
    """Refuses a data section that asks for channels that it cannot have.

    Args:
        data: fields name, channels, mean, std and augment.

    Raises:
        UserError: one line that names the key.
    """
    channels = channels_of(data)
    for field in ("mean", "std"):
        if len(data[field]) != channels:
            raise UserError(
                f"data.{field} has {len(data[field])} values and data.channels is {channels}: give "
                "one for each channel"
            )
    if channels == RGB_CHANNELS:
        return
    if data.name in _GREY and channels != 1:
        raise UserError(f"data.channels is {channels}: {data.name} is grey, 1 channel, or 3 alike")
    for field in ("rand_augment", "color_jitter"):
        if data.augment[field]:
            raise UserError(
                f"data.augment.{field} changes the colours of RGB images and data.channels is "
                f"{channels}: switch it off, data.augment.{field}={type(data.augment[field])()!r}"
            )


def as_rgb(pixels: np.ndarray) -> np.ndarray:
    """An image that can be shown: uint8 (..., C) -> (..., 3).

    One channel or two: the first as grey; more than three: the first three.
    """
    if pixels.shape[-1] < RGB_CHANNELS:
        return np.repeat(pixels[..., :1], RGB_CHANNELS, -1)
    return pixels[..., :RGB_CHANNELS]
