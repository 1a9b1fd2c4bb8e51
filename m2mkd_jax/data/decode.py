"""Decodes image files.

Complete JPEG files go to OpenCV, which is a third faster than Pillow and gives the same bytes (both
use libjpeg-turbo). Everything else, including files that seem damaged, goes to Pillow, which
decides whether they are.
Arrays of any number of channels come as NumPy's .npy files.
Axes: H height, W width, C channels (1 grey, 3 RGB, 4 RGB and opacity).
"""

import dataclasses
import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image, TiffImagePlugin, UnidentifiedImageError

from m2mkd_jax.errors import UserError

# Of files that it reads all the same; those that it cannot read are named.
warnings.filterwarnings("ignore", module="PIL")

SUFFIXES = (
    *(".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".bmp", ".webp"),
    *(".gif", ".tif", ".tiff", ".ppm", ".pgm"),
)
ARRAY_SUFFIX = ".npy"
_ARRAY = b"\x93NUMPY"  # with which such a file begins
_ERRORS = (OSError, SyntaxError, ValueError)
_FLAGS = {
    1: cv2.IMREAD_COLOR_RGB,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2 | cv2.IMREAD_COLOR_RGB,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4 | cv2.IMREAD_COLOR_RGB,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8 | cv2.IMREAD_COLOR_RGB,
}
_FRAMES = (0xC0, 0xC1, 0xC2)  # markers of a frame: baseline, extended, progressive
_SCAN = 0xDA
_PNG = b"\x89PNG\r\n\x1a\n"  # with which such a file begins
# Formats that Pillow opens as 32-bit integers where they have 16 bits.
_16_BITS_IN_I = ("PNG", "PPM")
_MARKER = re.compile(rb"\xff[^\0\xd0-\xd7]")  # not an escaped byte 255 or a restart marker


_ORIENTATION = 0x0112  # the EXIF tag
_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262  # tags of a TIFF file
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


class DamagedImage(UserError):
    """A file that is not an image, or an incomplete one."""


class OtherChannels(UserError):
    """A whole image that does not have the channels of the data."""


@dataclasses.dataclass(frozen=True)
class Form:
    """What decoded images look like.

    Attributes:
        channels: C: 1 (grey), 3 (RGB) or 4 (RGB and opacity); of .npy files any number.
        oriented: turn images as their EXIF tag says; False: as they are stored.
    """

    channels: int = 3
    oriented: bool = False


RGB = Form()


def decode(
    content: bytes,
    name: str,
    shrink: Callable[[int, int], float] | None = None,
    form: Form = RGB,
) -> np.ndarray:
    """Decodes an image file.

    Args:
        content: the bytes of the file.
        name: its name in messages.
        shrink: called with (H, W) before decoding, returns how many times smaller the caller can
            use the image; a JPEG may then be decoded at a half, a quarter or an eighth of its size,
            rounded up. None: full size.
        form: of the result.

    Returns:
        uint8 (H, W, C), contiguous.

    Raises:
        DamagedImage: it cannot be decoded, or has more pixels than Pillow's limit.
        OtherChannels: an array of other channels, or a picture for others than 1, 3 and 4.
    """
    if content.startswith(_ARRAY):
        pixels = _array(content, name, form.channels)
        if shrink:
            shrink(*pixels.shape[:2])
        return pixels
    if form.channels not in _MODES:
        raise OtherChannels(
            f"data.channels is {form.channels} and the image {name} is a picture: write arrays "
            f"(H, W, {form.channels}) to {ARRAY_SUFFIX} files, or use 1, 3 or 4 channels"
        )
    turn = _orientation(content) if form.oriented else 1
    size = whole_jpeg(content) if form.channels == 3 else None
    if size and size[0] * size[1] < (Image.MAX_IMAGE_PIXELS or math.inf):
        # From 5 on height and width change places.
        times = shrink(*(size if turn < 5 else size[::-1])) if shrink else 1
        flags = _FLAGS[max(k for k in _FLAGS if k <= max(times, 1))] | cv2.IMREAD_IGNORE_ORIENTATION
        # Typed as never None, which it is for a file that cannot be decoded.
        decoded: np.ndarray | None = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
        if decoded is not None:
            return _turned(decoded, turn)
    return _by_pillow(content, name, form.channels, turn, shrink)


def _by_pillow(
    content: bytes,
    name: str,
    channels: int,
    turn: int,
    shrink: Callable[[int, int], float] | None,
) -> np.ndarray:
    """`decode` of what OpenCV does not read as Pillow does; `turn` is EXIF's orientation."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            if reason := _ENDS.get(image.format or "", lambda _: "")(content):
                raise OSError(reason)
            # Pillow turns TIFF files by itself.
            turn = 1 if image.format == "TIFF" else turn
            pixels = _turned(_pixels(image, name, channels), turn)
            if shrink:
                shrink(*pixels.shape[:2])
            return pixels
    except Image.DecompressionBombError as error:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DamagedImage(
            f"the image {name} has more than {limit:,} pixels, Pillow's limit against decompression"
            " bombs: reduce or remove it"
        ) from error
    except _ERRORS as error:
        # Pillow's own message for this has an address in memory.
        unidentified = isinstance(error, UnidentifiedImageError)
        reason = "no known format" if unidentified else " ".join(str(error).split())
        raise DamagedImage(
            f"cannot decode the image {name} ({reason}): replace or remove it"
        ) from error


def _png_fault(content: bytes) -> str:
    """What is wrong with the pixels of a PNG file by its own checksums; "" if nothing is.

    Pillow compares those of all other chunks, and takes whatever it can get of the pixels.
    """
    place = len(_PNG)
    while place + 12 <= len(content):
        length, kind = struct.unpack_from(">L4s", content, place)
        end = place + 8 + length
        if kind == b"IDAT" and end + 4 <= len(content):
            (wanted,) = struct.unpack_from(">L", content, end)
            if zlib.crc32(memoryview(content)[place + 4 : end]) != wanted:
                return "the checksum of its pixels is another"
        place = end + 4
    return ""


def _jpeg_fault(content: bytes) -> str:
    """What is wrong with a JPEG file without an end, as where zeros fill it up; "" if nothing is.

    Pillow decodes zeros in place of what is missing.
    """
    place = 2
    while place + 4 <= len(content) and content[place] == 0xFF:
        marker, length = struct.unpack_from(">BH", content, place + 1)
        if marker == 0xFF:  # before a marker any number of these may stand
            place += 1
            continue
        place += 2 + length
        if marker == _SCAN:
            # What a scan holds has no such two bytes.
            return "" if content.find(b"\xff\xd9", place) >= 0 else "it has no end"
    return ""


# By Pillow's names of the formats.
_ENDS: dict[str, Callable[[bytes], str]] = {
    "PNG": _png_fault,
    "JPEG": _jpeg_fault,
    "MPO": _jpeg_fault,
}


def _array(content: bytes, name: str, channels: int) -> np.ndarray:
    """Pixels of a .npy file, (H, W, C) or for one channel (H, W) too: uint8 (H, W, C).

    16 bits are scaled to 8, as in pictures.
    """
    try:
        found = np.load(io.BytesIO(content), allow_pickle=False)
    except Exception as error:  # a damaged header can cause any error in NumPy's parser
        reason = " ".join(str(error).split())[:200]
        raise DamagedImage(
            f"cannot decode the image {name} ({reason}): replace or remove it"
        ) from error
    if found.ndim == 2:
        found = found[..., None]
    if found.ndim != 3 or found.shape[2] != channels:
        raise OtherChannels(
            f"the image {name} is an array {found.shape} and data.channels is {channels}: "
            f"(H, W, {channels}) is expected"
        )
    if found.dtype.kind != "u" or found.dtype.itemsize > 2 or not found.size:
        raise DamagedImage(
            f"the image {name} is an array {found.shape} of {found.dtype}: uint8 and "
            "uint16 are read"
        )
    pixels = found if found.dtype.itemsize == 1 else found >> 8
    return np.ascontiguousarray(pixels, np.uint8)


def _orientation(content: bytes) -> int:
    """The EXIF orientation of an image file, 1 to 8; 1, upright, where it has none."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            found = image.getexif().get(_ORIENTATION, 1)
    except (*_ERRORS, Image.DecompressionBombError):
        return 1
    return found if found in range(1, 9) else 1


def _turned(image: np.ndarray, orientation: int) -> np.ndarray:
    """An image (H, W, C) stored with an EXIF orientation, upright; (W, H, C) from 5 on."""
    if orientation == 1:
        return image
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def _pixels(image: Image.Image, name: str, channels: int) -> np.ndarray:
    """Pixels of an opened image, the first frame of an animated one: uint8 (H, W, C).

    16 bits are scaled to 8; where C is 3 what is transparent keeps the colour it is stored with.

    Raises:
        DamagedImage: pixels whose range the file does not tell.
    """
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in _16_BITS_IN_I):
        image = Image.fromarray(_high_bits(image))
    if image.mode in ("I", "F"):
        raise DamagedImage(
            f"the image {name} has 32 bits per pixel, whose range it does not tell: convert it to "
            "8 or 16 bits"
        )
    if isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # without this step Pillow warns
    pixels = np.asarray(image.convert(_MODES[channels]))
    return pixels.reshape(*pixels.shape[:2], channels)


def _high_bits(image: Image.Image) -> np.ndarray:
    """The upper 8 of 16 bits a pixel, or of a TIFF file's 12: uint8 (H, W)."""
    pixels = np.asarray(image).astype(np.uint32)
    tags = image.tag_v2 if isinstance(image, TiffImagePlugin.TiffImageFile) else {}
    bits = tags.get(_BITS_PER_SAMPLE, (16,))[0]
    if tags and not tags.get(_PHOTOMETRIC, 0):  # zero is white, which Pillow turns for 8 bits alone
        pixels = (1 << bits) - 1 - pixels
    return (pixels >> (bits - 8)).astype(np.uint8)


def whole_jpeg(content: bytes) -> tuple[int, int] | None:
    """(H, W) of a JPEG file in grey or three colours that seems complete; else None.

    OpenCV decodes an incomplete file without an error, where Pillow raises one.
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
