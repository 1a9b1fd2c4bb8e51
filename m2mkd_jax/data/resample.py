"""Bicubic resizing with antialiasing: Pillow's results in half of its time.

OpenCV's bicubic resizing has no antialiasing. Here a pass over one axis is a product with a sparse
matrix of Pillow's own integer weights, so the bytes are the same as Pillow's.
Of a long strip only what a wanted part of the result depends on is resized.
Axes: H height, W width, C channels, N pixels before a pass, S after it, M pixels across.
"""

import functools

import cv2
import numpy as np
from PIL import Image
from scipy import sparse

Box = tuple[float, float, float, float]  # left, top, right, bottom
Window = tuple[int, int, int, int]  # top, left, rows, columns
_BITS = 22  # fractional bits of the weights
_LARGEST = 1 << 23  # bytes of an image; the int32 copies take four times as much


def resize(
    image: np.ndarray,
    height: int,
    width: int,
    box: Box | None = None,
    window: Window | None = None,
) -> np.ndarray:
    """Resizes an image, bicubic.

    Args:
        image: uint8 (H, W, C).
        height: of the result.
        width: of the result.
        box: (left, top, right, bottom), the part to resize, in fractional pixels; None: all.
        window: (top, left, rows, columns), the part of the result that is wanted; None: all.

    Returns:
        uint8 (height, width, C), or of `window` (rows, columns, C).
    """
    if image.shape[2] != 3:
        # Neither Pillow nor OpenCV's transpose takes any number of channels.
        planes = (np.ascontiguousarray(image[..., c]) for c in range(image.shape[2]))
        return np.stack([_resize(plane, height, width, box, window) for plane in planes], -1)
    return _resize(image, height, width, box, window)


def _resize(
    image: np.ndarray, height: int, width: int, box: Box | None, window: Window | None
) -> np.ndarray:
    """`resize` of an image (H, W, 3), or of one channel (H, W)."""
    old_height, old_width = image.shape[:2]
    if image.size > _LARGEST and window is None:
        return _by_pillow(image, height, width, box)
    first_row, first_column, row_count, column_count = window or (0, 0, height, width)
    # Pillow keeps the box in float32.
    left, top, right, bottom = np.array(box or (0, 0, old_width, old_height), np.float32)
    from_rows, rows = _weights(old_height, height, top, bottom, first_row, row_count)
    from_columns, columns = _weights(old_width, width, left, right, first_column, column_count)
    part = image[from_rows, from_columns]
    if part.size > _LARGEST:
        whole = _by_pillow(image, height, width, box)
        part = whole[first_row : first_row + row_count, first_column : first_column + column_count]
        return np.ascontiguousarray(part)
    tall = old_height - height > max(0, 2 * (old_width - width))
    return _passes(part, rows, columns, tall and _tall_begins_with_rows())


def _by_pillow(image: np.ndarray, height: int, width: int, box: Box | None) -> np.ndarray:
    whole = Image.fromarray(image)
    return np.asarray(whole.resize((width, height), Image.Resampling.BICUBIC, box))


def _passes(
    image: np.ndarray, rows: sparse.csr_array, columns: sparse.csr_array, rows_first: bool
) -> np.ndarray:
    """Both passes. The order matters: the result of the first is rounded and clipped."""
    if rows_first:
        return cv2.transpose(_pass(cv2.transpose(_pass(image, rows)), columns))
    return _pass(cv2.transpose(_pass(cv2.transpose(image), columns)), rows)


@functools.cache
def _tall_begins_with_rows() -> bool:
    """Whether this Pillow starts with the rows if they shrink most; older versions never do."""
    edges = np.random.default_rng(0).integers(0, 2, (40, 6, 3), np.uint8) * 255
    rows, columns = (_weights(length, 4, 0, length, 0, 4)[1] for length in edges.shape[:2])
    theirs = Image.fromarray(edges).resize((4, 4), Image.Resampling.BICUBIC)
    return np.array_equal(np.asarray(theirs), _passes(edges, rows, columns, rows_first=True))


def _pass(image: np.ndarray, weights: sparse.csr_array) -> np.ndarray:
    """uint8 (N, M, C) or (N, M), weights (S, N) -> uint8 (S, M, C) or (S, M)."""
    sums = weights @ image.reshape(len(image), -1).astype(np.int32)
    sums += 1 << (_BITS - 1)
    sums >>= _BITS
    # Adding 0 makes OpenCV clip to 0..255.
    return cv2.add(sums, 0, dtype=cv2.CV_8U).reshape(len(sums), *image.shape[1:])


# Most images of a data set have one of a few sizes; an entry takes 12 kB or more.
@functools.lru_cache(maxsize=512)
def _weights(
    length: int, wanted: int, start: float, stop: float, first: int, count: int
) -> tuple[slice, sparse.csr_array]:
    """The weights of `length` pixels in `count` new ones from `first` on.

    All new pixels, of which there are `wanted`, lie between start and stop. The kernel is Keys's
    cubic with a = -1/2, stretched to the size of the new pixels when they are larger.

    Returns:
        The N pixels that have weights, and these, int32 (S = count, N), with _BITS fractional bits.
    """
    step = float(stop - start) / wanted
    stretch = max(step, 1.0)
    centre = start + step * (np.arange(first, first + count)[:, None] + 0.5)
    pixel = np.floor(centre - 2 * stretch).astype(np.int32) + np.arange(int(4 * stretch) + 2)
    x = abs(pixel + 0.5 - centre) / stretch
    near, far = (1.5 * x - 2.5) * x**2 + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2
    value = np.where(x < 1, near, far) * ((x < 2) & (pixel >= 0) & (pixel < length))
    value = np.round(value / value.sum(1, keepdims=True) * 2**_BITS).astype(np.int32)
    row, column = np.nonzero(value)
    used = pixel[row, column]
    low, high = int(used.min()), int(used.max()) + 1
    matrix = sparse.csr_array((value[row, column], (row, used - low)), (count, high - low))
    return slice(low, high), matrix
