"""The operations of RandAugment and colour jitter, on one image.

The results are Pillow's: exactly for operations that are a table of 256 values per channel, within
one level where Pillow rounds intermediate results. OpenCV is 2 to 10 times faster per core.
Axes: H height, W width, C channels (3). Images are uint8 (H, W, 3), contiguous, RGB; every
function returns a new one.
"""

import functools

import cv2
import numpy as np
from PIL import Image

# Grain's threads and worker processes already use all cores.
cv2.setNumThreads(0)

FILL = (124, 116, 104)  # colour outside of the image: ImageNet's mean
_LEVELS = np.arange(256)
# Turns OpenCV's rounding into Pillow's truncation; the small term keeps integers unchanged.
_CUT = -0.5 + 1e-3
_GREY = np.array([0.299, 0.587, 0.114])  # shares of R, G, B in the luminance
# Pillow's SMOOTH kernel.
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13


def _table(image: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Looks up every pixel in `values` (256,) or (256, 3), truncated to integers in 0..255."""
    table = np.clip(values, 0, 255).astype(np.uint8)
    return cv2.LUT(image, table[None] if table.ndim == 2 else table)


def auto_contrast(image: np.ndarray) -> np.ndarray:
    """Stretches every channel to 0..255; a constant channel is unchanged."""
    low, high = np.array([cv2.minMaxLoc(channel)[:2] for channel in cv2.split(image)]).T
    flat = high <= low
    scale = np.where(flat, 1.0, 255.0 / np.where(flat, 1.0, high - low))
    # int(level * scale + offset), in this order: the rounding is Pillow's.
    return _table(image, _LEVELS[:, None] * scale - np.where(flat, 0.0, low) * scale)


def equalize(image: np.ndarray) -> np.ndarray:
    """Spreads every channel's values so that their distribution is even."""
    tables = []
    for channel in range(3):
        counts = cv2.calcHist([image], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
        used = counts[counts > 0]
        step = (used.sum() - used[-1]) // 255
        below = np.cumsum(counts) - counts
        tables.append((step // 2 + below) // step if step else _LEVELS)
    return _table(image, np.stack(tables, -1))


def invert(image: np.ndarray) -> np.ndarray:
    """255 - x."""
    return cv2.bitwise_not(image)


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the highest `bits` bits (0 to 8) of every value."""
    return _table(image, _LEVELS & ~(2 ** (8 - bits) - 1))


def solarize(image: np.ndarray, threshold: float) -> np.ndarray:
    """Inverts values at or above `threshold` (0 to 256)."""
    return _table(image, np.where(threshold <= _LEVELS, 255 - _LEVELS, _LEVELS))


def solarize_add(image: np.ndarray, amount: float) -> np.ndarray:
    """Adds `amount` to values below 128, up to 255."""
    return _table(image, np.where(_LEVELS < 128, _LEVELS + amount, _LEVELS))


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with black: factor 0 is black, 1 the image, above 1 brighter."""
    return _table(image, _LEVELS * factor)


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the image's mean luminance: factor 0 is flat grey, 1 the image."""
    mean = int(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0] + 0.5)
    return _table(image, mean + factor * (_LEVELS - mean))


def color(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the grey image: factor 0 is grey, 1 the image, above 1 more saturated."""
    matrix = factor * np.eye(3) + (1 - factor) * _GREY
    return cv2.transform(image, np.column_stack([matrix, [_CUT] * 3]))


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends with the smoothed image: factor 0 is smooth, 1 the image; edges are unchanged."""
    kernel = (1 - factor) * _SMOOTH
    kernel[1, 1] += factor
    out = cv2.filter2D(image, -1, kernel, delta=_CUT)
    for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
        out[edge] = image[edge]
    return out


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates around the centre, counter-clockwise for positive degrees; bicubic."""
    # By Pillow: OpenCV's cubic kernel has a = -0.75 instead of -1, which differs at sharp edges.
    turned = Image.fromarray(image).rotate(degrees, Image.Resampling.BICUBIC, fillcolor=FILL)
    return np.array(turned)


def shear_x(image: np.ndarray, amount: float) -> np.ndarray:
    """Row y (counted from the top, at its middle) moves left by amount * y; bicubic."""
    return _slide(image, amount * (np.arange(image.shape[0]) + 0.5))


def shear_y(image: np.ndarray, amount: float) -> np.ndarray:
    """Column x (counted from the left, at its middle) moves up by amount * x; bicubic."""
    return cv2.transpose(shear_x(cv2.transpose(image), amount))


def translate_x(image: np.ndarray, share: float) -> np.ndarray:
    """Moves left by `share` of the width; bicubic."""
    return _slide(image, np.full(image.shape[0], share * image.shape[1]))


def translate_y(image: np.ndarray, share: float) -> np.ndarray:
    """Moves up by `share` of the height; bicubic."""
    return cv2.transpose(translate_x(cv2.transpose(image), share))


def _slide(image: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Moves row y left by offsets[y] pixels (H,); bicubic along the row with a = -1, as Pillow.

    Rows stay rows under shear and translation: 4 taps per pixel instead of 16 for a general warp.
    """
    height, width, channels = image.shape
    offsets = np.clip(offsets, -width, width)
    whole = np.floor(offsets).astype(np.int64)
    weights = _cubic(offsets - whole).astype(np.float32)
    reach = int(abs(whole).max()) + 3
    padded = cv2.copyMakeBorder(image, 0, 0, reach, reach, cv2.BORDER_REPLICATE)
    # Rows as flat arrays, so that each window is one contiguous run.
    windows = np.lib.stride_tricks.sliding_window_view(
        padded.reshape(height, -1), (width + 3) * channels, axis=1
    )
    runs = windows[np.arange(height), (reach - 1 + whole) * channels].astype(np.float32)
    taps = np.lib.stride_tricks.as_strided(
        runs, (4, height, width * channels), (channels * runs.itemsize, *runs.strides)
    )
    moved = np.einsum("kh,khw->hw", weights, taps)
    moved = cv2.add(moved, _CUT, dtype=cv2.CV_8U).reshape(image.shape)
    # Columns whose centre comes from outside of the image get the fill colour.
    first = np.ceil(-0.5 - offsets).astype(np.int32)[:, None]
    columns = np.arange(width, dtype=np.int32)
    outside = (columns < first) | (columns >= first + width)
    return cv2.copyTo(_filled(height, width), outside.view(np.uint8), moved)


@functools.lru_cache(maxsize=4)
def _filled(height: int, width: int) -> np.ndarray:
    """An image (H, W, 3) of the fill colour."""
    return np.full((height, width, 3), FILL, np.uint8)


def _cubic(distance: np.ndarray) -> np.ndarray:
    """Weights of the pixels at -1, 0, 1, 2 for a point at `distance` (N,) in [0, 1): (4, N)."""
    d = distance
    return np.stack(
        [
            -d + 2 * d**2 - d**3,
            1 - 2 * d**2 + d**3,
            d + d**2 - d**3,
            -(d**2) + d**3,
        ]
    )
