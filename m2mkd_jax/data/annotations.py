"""Annotated images for detection, and their published augmentations.

Axes: H height, W width, G objects.

Source: docs/detection.md#data.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from m2mkd_jax.errors import UserError

# An object's mask: polygons (n, 2) in pixels whose union it is, or a bitmap (H, W) bool.
Mask = list[np.ndarray] | np.ndarray
# Boxes with a shorter side are dropped.
SMALLEST_SIDE = 1e-5


@dataclass(frozen=True)
class Scene:
    """An image and its objects.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        boxes: (G, 4) float64, x0 y0 x1 y1 in pixels.
        classes: (G) int.
        masks: of each object.
    """

    image: np.ndarray
    boxes: np.ndarray
    classes: np.ndarray
    masks: list[Mask]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[0], self.image.shape[1]


def library(name: str) -> Any:
    """A module of the extra 'detection'.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise UserError(
            f"detection data needs {package}: pip install 'm2mkd_jax[detection]'"
        ) from None


def large_scale_jitter(scene: Scene, side: int, flip: float, scale: float, crop: float) -> Scene:
    """Flip, a scale from a wide range, a crop to at most a square; nothing is padded.

    Boxes are made anew, tight around what is left of the objects.

    Source: Ghiasi et al. 2021 (arXiv 2012.07177), section 3; docs/detection.md#data.

    Args:
        scene: before.
        side: of the square, and of the image at scale 1.
        flip: drawn from (0, 1): below 0.5 flips.
        scale: drawn, in the published recipe from (0.1, 2).
        crop: drawn from (0, 1): where the crop lies, on both axes.
    """
    if flip < 0.5:
        scene = flipped(scene)
    h, w = scene.size
    factor = min(side * scale / h, side * scale / w)
    # Half to even, as numpy rounds.
    scene = resized(scene, *(max(1, int(np.round(n * factor))) for n in (h, w)))
    top, left = (int(np.round(max(n - side, 0) * crop)) for n in scene.size)
    return tight(cropped(scene, top, left, side))


def plain_resize(scene: Scene, short: int, longest: int, flip: float = 1.0) -> Scene:
    """Resizes the short edge to `short`, unless the long one would exceed `longest`; then flips.

    Source: docs/detection.md#data.

    Args:
        scene: before.
        short: drawn from a list in training.
        longest: of the long edge.
        flip: drawn from (0, 1): below 0.5 flips.
    """
    h, w = scene.size
    factor = short / min(h, w)
    size = [short if n == min(h, w) else factor * n for n in (h, w)]
    if max(size) > longest:
        factor = longest / max(size)
        size = [n * factor for n in size]
    scene = resized(scene, *(int(n + 0.5) for n in size))
    scene = flipped(scene) if flip < 0.5 else scene
    h, w = scene.size
    boxes = np.clip(scene.boxes, 0, [w, h, w, h])
    return kept(dataclasses.replace(scene, boxes=boxes), _wide(boxes))


def flipped(scene: Scene) -> Scene:
    """The mirror image."""
    width = scene.size[1]
    boxes = np.stack([width - scene.boxes[:, 2], scene.boxes[:, 1]], 1)
    boxes = np.concatenate([boxes, width - scene.boxes[:, :1], scene.boxes[:, 3:]], 1)

    def turn(mask: Mask) -> Mask:
        if isinstance(mask, np.ndarray):
            return mask[:, ::-1]
        return [np.stack([width - p[:, 0], p[:, 1]], 1) for p in mask]

    image = np.ascontiguousarray(scene.image[:, ::-1])
    return Scene(image, boxes, scene.classes, [turn(mask) for mask in scene.masks])


def resized(scene: Scene, height: int, width: int) -> Scene:
    """Resizes image (Pillow, bilinear), boxes and masks (bitmaps: to the nearest)."""
    h, w = scene.size
    factors = np.array([width / w, height / h])
    size = (width, height)
    image = Image.fromarray(scene.image).resize(size, Image.Resampling.BILINEAR)

    def scale(mask: Mask) -> Mask:
        if isinstance(mask, np.ndarray):
            bitmap = Image.fromarray(mask.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)
            return np.asarray(bitmap) > 0
        return [p * factors for p in mask]

    boxes = scene.boxes * np.tile(factors, 2)
    return Scene(np.asarray(image), boxes, scene.classes, [scale(mask) for mask in scene.masks])


def cropped(scene: Scene, top: int, left: int, side: int) -> Scene:
    """What lies within a square; objects may be left with nothing."""

    def cut(mask: Mask) -> Mask:
        if isinstance(mask, np.ndarray):
            return mask[top : top + side, left : left + side]
        return [q - [left, top] for p in mask for q in _clipped(p, left, top, side)]

    image = scene.image[top : top + side, left : left + side]
    boxes = scene.boxes - np.array([left, top, left, top])
    return Scene(image, boxes, scene.classes, [cut(mask) for mask in scene.masks])


def _clipped(polygon: np.ndarray, left: int, top: int, side: int) -> list[np.ndarray]:
    """The parts of a polygon in a square."""
    geometry = library("shapely.geometry")
    # buffer(0) mends polygons that cross themselves.
    shape = geometry.Polygon(polygon).buffer(0.0)
    inside = shape.intersection(geometry.box(left, top, left + side, top + side))
    parts = inside.geoms if hasattr(inside, "geoms") else [inside]
    # Where a polygon only touches the square, points and lines are left of it.
    polygons = [p for p in parts if isinstance(p, geometry.Polygon) and not p.is_empty]
    return [np.asarray(p.exterior.coords)[:-1] for p in polygons]


def tight(scene: Scene) -> Scene:
    """The objects of which anything is left, with boxes tight around their masks."""
    h, w = scene.size
    boxes = np.array([_bounds(mask) for mask in scene.masks], np.float64).reshape(-1, 4)
    boxes = np.clip(boxes, 0, [w, h, w, h])
    return kept(dataclasses.replace(scene, boxes=boxes), _wide(boxes))


def _bounds(mask: Mask) -> tuple[float, ...]:
    if isinstance(mask, np.ndarray):
        if not mask.any():
            return 0, 0, 0, 0
        y, x = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
        return x[0], y[0], x[-1] + 1, y[-1] + 1
    if not mask:
        return 0, 0, 0, 0
    points = np.concatenate(mask)
    return (*points.min(0), *points.max(0))


def _wide(boxes: np.ndarray) -> np.ndarray:
    """Which boxes have sides."""
    return (boxes[:, 2:] - boxes[:, :2] > SMALLEST_SIDE).all(1)


def kept(scene: Scene, which: np.ndarray) -> Scene:
    """The scene with some of its objects; `which`: (G) bool."""
    masks = [mask for mask, keep in zip(scene.masks, which, strict=True) if keep]
    return Scene(scene.image, scene.boxes[which], scene.classes[which], masks)


def bitmap(mask: Mask, height: int, width: int) -> np.ndarray:
    """A mask as a bitmap (height, width) bool; polygons as pycocotools rasterises them."""
    if isinstance(mask, np.ndarray):
        return mask
    coding = library("pycocotools.mask")
    parts = coding.frPyObjects([p.reshape(-1).tolist() for p in mask], height, width)
    return coding.decode(coding.merge(parts)).astype(bool)
