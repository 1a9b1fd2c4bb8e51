"""Image files to pixels.

Whole JPEG files go to OpenCV, which is a third faster than Pillow and gives the same bytes (both
use libjpeg-turbo); everything else, and what seems damaged, goes to Pillow, whose judgement counts.
Axes: H height, W width, C channels (3, RGB).
"""

import io
import re
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
_FRAMES = (0xC0, 0xC1, 0xC2)  # markers of a frame: baseline, extended, progressive
_SCAN = 0xDA
_MARKER = re.compile(rb"\xff[^\0\xd0-\xd7]")  # other than a byte 255 and a restart


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
    """(H, W) of a JPEG file in grey or three colours that seems whole; None for any other.

    OpenCV says nothing about what it could not decode, where Pillow raises an error.
    """
    if content[:2] != b"\xff\xd8" or content[-2:] != b"\xff\xd9":
        return None
    place, size, progressive = 2, None, False
    while place + 10 <= len(content) and content[place] == 0xFF:
        marker, length = struct.unpack_from(">BH", content, place + 1)
        if marker in _FRAMES:
            height, width, channels = struct.unpack_from(">HHB", content, place + 5)
            size = (height, width) if height and width and channels in (1, 3) else None
            progressive = marker == _FRAMES[-1]
        place += 2 + length
        if marker == _SCAN:
            # The only scan ends with the file, a progressive file has several.
            end = None if progressive else _MARKER.search(content, place)
            return size if progressive or (end and end.end() == len(content)) else None
    return None
