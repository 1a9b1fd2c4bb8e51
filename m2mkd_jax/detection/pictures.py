"""Detections in image files: resizing as in evaluation, pasted masks, pictures.

Source: docs/detection.md#inference, docs/detection.md#data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np
from PIL import Image, ImageDraw

from m2mkd_jax.data.annotations import Scene, plain_resize
from m2mkd_jax.detection.inference import DetectionModel, ImageDetections
from m2mkd_jax.detection.roi_align import paste_masks
from m2mkd_jax.detection.spec import backbone_of

# Short and longest edge of test images that are not padded to a square.
SHORT, LONGEST = 800, 1333
# Detections with a lower score are not drawn.
DRAWN_SCORE = 0.3
COLOURS = (
    *((230, 60, 60), (60, 140, 240), (60, 180, 75), (245, 170, 40), (150, 80, 200)),
    *((60, 200, 200), (235, 90, 180), (140, 110, 60), (120, 190, 30), (110, 110, 240)),
)


def detect_in_image(model: DetectionModel, image: np.ndarray) -> ImageDetections:
    """The detections of one image, resized as in evaluation; boxes are in its own pixels.

    Weights that do not record how that is done are taken for published ones.

    Args:
        model: a detector.
        image: (H, W, 3) uint8 RGB.
    """
    square, edges = backbone_of(model.spec).square, model.test_edges
    if edges is None:
        edges = (square, square) if square else (SHORT, LONGEST)
    bare = Scene(image, np.zeros((0, 4)), np.zeros(0, np.int64), [])
    small = plain_resize(bare, *edges).image if edges else image
    (found,) = model.detect([small])
    height, width = image.shape[:2]
    factors = np.array([width / small.shape[1], height / small.shape[0]] * 2, np.float32)
    boxes = np.clip(found.boxes * factors, 0, np.array([width, height] * 2, np.float32))
    return dataclasses.replace(found, boxes=boxes)


def whole_masks(found: ImageDetections, height: int, width: int) -> np.ndarray:
    """The masks of detections on their image, (N, height, width) bool."""
    result = np.zeros((len(found.boxes), height, width), bool)
    for i, (mask, box) in enumerate(zip(found.masks, found.boxes, strict=True)):
        # One by one: a hundred of them at once would take gigabytes on a large image.
        result[i] = np.asarray(_paste(mask[None], box[None], height, width)[0]) >= 0.5
    return result


_paste = jax.jit(paste_masks, static_argnums=(2, 3))


def drawn(
    image: np.ndarray,
    found: ImageDetections,
    masks: np.ndarray,
    labels: Sequence[str],
    least: float = DRAWN_SCORE,
) -> Image.Image:
    """A picture of an image with boxes, masks, classes and scores.

    Args:
        image: (H, W, 3) uint8.
        found: its detections.
        masks: (N, H, W) bool.
        labels: names of the classes; () for their numbers.
        least: detections with a lower score are left out.
    """
    canvas = image.astype(np.float32)
    chosen = [i for i in range(len(found.scores)) if found.scores[i] >= least]
    for i in chosen:
        tint = np.asarray(COLOURS[int(found.classes[i]) % len(COLOURS)], np.float32)
        canvas[masks[i]] = 0.5 * canvas[masks[i]] + 0.5 * tint
    picture = Image.fromarray(canvas.astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for i in chosen:
        colour = COLOURS[int(found.classes[i]) % len(COLOURS)]
        x0, y0, x1, y1 = (float(n) for n in found.boxes[i])
        pen.rectangle((x0, y0, x1, y1), outline=colour)
        number = int(found.classes[i])
        name = labels[number] if labels else str(number)
        # The built-in font has Latin letters only.
        text = f"{name} {found.scores[i]:.2f}".encode("latin-1", "replace").decode("latin-1")
        pen.text((x0 + 2, y0 + 1), text, fill=colour)
    return picture
