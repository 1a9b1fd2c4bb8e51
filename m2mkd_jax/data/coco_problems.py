"""What is wrong with single annotations in COCO's format.

pycocotools reads past the ends of masks whose counts are not those of their size, takes memory
without end for polygons far outside of an image, and compares masks of other sizes without a word.
No annotation comes to it that has a problem here.

Source: docs/detection.md#data.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from m2mkd_jax.errors import is_finite

UNKNOWN_IMAGE = "unknown image"


def problem(
    annotation: Mapping[str, Any],
    sizes: Mapping[int, tuple[int, int]],
    categories: Mapping[int, Any],
) -> str:
    """What is wrong with an annotation; "" if nothing is.

    Args:
        annotation: of the file.
        sizes: height and width of the images, by id.
        categories: by id.
    """
    if not is_id_of(annotation.get("image_id"), sizes):
        return UNKNOWN_IMAGE
    if not is_id_of(annotation.get("category_id"), categories):
        return "unknown category"
    size = sizes[annotation["image_id"]]
    box, area = annotation.get("bbox"), annotation.get("area", 1)
    if not isinstance(box, list) or len(box) != 4 or not _are_numbers(box):
        return "bbox is not x y width height"
    if not _are_numbers([area]):
        return "area is no number"
    if box[2] <= 0 or box[3] <= 0 or area < 0:
        return "negative or no area"
    if not _touches(box, size):
        return "bbox is not in the image"
    if annotation.get("iscrowd", 0) not in (0, 1):
        return "iscrowd is neither 0 nor 1"
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        return _run_length_problem(segmentation, size)
    if not isinstance(segmentation, list) or not sound_polygons(segmentation):
        return "no polygon of 3 points or more"
    points = [p for polygon in sound_polygons(segmentation) for p in _corners(polygon)]
    return "" if all(_is_near(*p, size) for p in points) else "polygon is far outside of the image"


def sound_polygons(segmentation: Iterable[Any]) -> list[list[float]]:
    """The polygons of an even number of coordinates, at least 6.

    Source: docs/detection.md#data.
    """
    return [
        polygon
        for polygon in segmentation
        if isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and _are_numbers(polygon)
    ]


def has_unsound_polygon(segmentation: Any) -> bool:
    """Whether some polygons are left out of those that an object has."""
    return isinstance(segmentation, list) and len(sound_polygons(segmentation)) < len(segmentation)


def is_id_of(value: Any, known: Mapping[int, Any]) -> bool:
    """Whether a value, of whatever type, is one of some ids."""
    return type(value) in (int, float) and value in known


def _are_numbers(values: Iterable[Any]) -> bool:
    return all(map(is_finite, values))


def _corners(polygon: list[float]) -> tuple[tuple[float, float], ...]:
    x, y = polygon[::2], polygon[1::2]
    return (min(x), min(y)), (max(x), max(y))


def _is_near(x: float, y: float, size: tuple[int, int]) -> bool:
    """Whether a point lies in an image, or by at most its sides outside of it."""
    height, width = size
    return -width <= x <= 2 * width and -height <= y <= 2 * height


def _touches(box: list[float], size: tuple[int, int]) -> bool:
    """Whether a box x y width height has a part in the image, and none far outside of it."""
    (x0, y0), (x1, y1) = box[:2], (box[0] + box[2], box[1] + box[3])
    inside = x0 < size[1] and y0 < size[0] and x1 > 0 and y1 > 0
    return inside and _is_near(x0, y0, size) and _is_near(x1, y1, size)


def _run_length_problem(segmentation: Mapping[str, Any], size: tuple[int, int]) -> str:
    """What is wrong with a run-length coded mask of an image of `size`; "" if nothing is."""
    if not {"counts", "size"} <= set(segmentation):
        return "segmentation without counts and size"
    if segmentation["size"] != list(size):
        return "mask of another size than the image"
    counts = segmentation["counts"]
    if isinstance(counts, str):
        runs = _decompressed(counts)
    else:
        whole = isinstance(counts, list) and all(type(n) is int and n >= 0 for n in counts)
        runs = counts if whole else [-1]
    # Python's numbers: sums of damaged ones may not fit into others.
    fitting = all(n >= 0 for n in runs) and sum(runs) == math.prod(size)
    return "" if fitting else "mask whose counts are not those of its size"


def _decompressed(text: str) -> list[int]:
    """COCO's compressed counts: numbers of 5 bits a character, from the third on differences.

    Returns:
        The lengths of the runs; [-1] where the text is none.
    """
    codes = np.array([ord(c) for c in text], np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        return [-1]
    last = np.flatnonzero(codes & 32 == 0)
    first = np.append(0, last[:-1] + 1)
    if (last - first).max() > 10:  # bits that no count has
        return [-1]
    place = 5 * (np.arange(len(codes)) - np.repeat(first, last - first + 1))
    numbers = np.add.reduceat((codes & 31) << place, first)
    numbers -= np.where(codes[last] & 16, 1 << 5 * (last - first + 1), 0)
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers.tolist()
