"""Image files to pixels.

Whole JPEG files go to OpenCV, which is a third faster than Pillow and gives the same bytes (both
use libjpeg-turbo); everything else, and what seems damaged, goes to Pillow, whose judgement counts.
Axes: H height, W width, C channels (3, RGB).
"""

import io
import struct

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError

from m2mkd_jax.errors import UserError

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")
_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
_FLAGS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB,
}


class DamagedImage(UserError):
    """A file that is no image, or only a part of one."""


def decode(content, name, shrink=None):
    """Decodes an image file. Its orientation tag is not followed, as published.

    Args:
      content: its bytes.
      name: for the message.
      shrink: None, or asked with (H, W) before decoding: how many times smaller the caller can do
        with. A JPEG may then come at a half, a quarter or an eighth of its size, rounded up.
    Returns: uint8 (H, W, C), contiguous.
    Raises: DamagedImage.
    """
    size = whole_jpeg(content)
    if size and size[0] * size[1] < Image.MAX_IMAGE_PIXELS:
        times = shrink(*size) if shrink else 1
        flags = _FLAGS[max(k for k in _FLAGS if k <= max(times, 1))] | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
        if image is not None:
            return image
    try:
        with Image.open(io.BytesIO(content)) as image:
            if shrink:
                shrink(image.height, image.width)
            return np.asarray(image.convert("RGB"))
    except _ERRORS as error:
        # Pillow's own words for this tell an address in memory.
        strange = isinstance(error, UnidentifiedImageError)
        reason = "no known format" if strange else " ".join(str(error).split())
        raise DamagedImage(
            f"cannot decode the image {name} ({reason}): replace or remove it"
        ) from error


def whole_jpeg(content):
    """(H, W) of a JPEG file in grey or three colours that ends as it should; None for any other."""
    if content[:2] != b"\xff\xd8" or content[-2:] != b"\xff\xd9":
        return None
    place = 2
    while place + 10 <= len(content) and content[place] == 0xFF:
        if 0xC0 <= content[place + 1] <= 0xC2:  # a frame: baseline, extended or progressive
            height, width, channels = struct.unpack_from(">HHB", content, place + 5)
            return (height, width) if height and width and channels in (1, 3) else None
        place += 2 + struct.unpack_from(">H", content, place + 2)[0]
    return None
