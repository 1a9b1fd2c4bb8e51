"""COCO's evaluation of boxes and masks, by pycocotools.

Source: docs/detection.md#evaluation.
"""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2mkd_jax.data.annotations import library

# Of boxes ('bbox') and of masks ('segm'), in pycocotools' order.
NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
KINDS = ("bbox", "segm")


@dataclass(frozen=True)
class CocoNumbers:
    """Results, from 0 to 1; -1 where nothing can be measured.

    Attributes:
        stats: of all classes, by NUMBERS.
        per_class: AP by category id.
    """

    stats: dict[str, float]
    per_class: dict[int, float]


def evaluate_coco(
    truth: Mapping[str, Any], detections: Sequence[Mapping[str, Any]], kind: str
) -> CocoNumbers:
    """Compares detections with annotations.

    Args:
        truth: the content of an instances file.
        detections: COCO's results, {"image_id", "category_id", "score", "bbox", "segmentation"}.
        kind: one of KINDS. Of masks, sizes are the masks' areas, not the boxes'.

    Raises:
        UserError: pycocotools is not installed.
    """
    coco, evaluation = (library(f"pycocotools.{name}") for name in ("coco", "cocoeval"))
    # pycocotools writes into what it is given, and prints.
    with contextlib.redirect_stdout(io.StringIO()):
        have = coco.COCO()
        have.dataset = copy.deepcopy(dict(truth))
        # pycocotools takes a match with annotation 0 for none.
        for number, annotation in enumerate(have.dataset["annotations"], 1):
            annotation["id"] = number
        have.createIndex()
        found = [dict(detection) for detection in detections]
        if kind == "segm":
            for detection in found:
                detection.pop("bbox", None)
        results = have.loadRes(found) if found else _nothing(coco, have)
        run = evaluation.COCOeval(have, results, kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
    stats = {name: float(value) for name, value in zip(NUMBERS, run.stats, strict=True)}
    return CocoNumbers(stats, _per_class(run))


def without_images(truth: Mapping[str, Any], ids: Collection[int]) -> dict[str, Any]:
    """The content of an instances file without some images and what is annotated on them."""
    images = [image for image in truth["images"] if image["id"] not in ids]
    objects = [one for one in truth["annotations"] if one["image_id"] not in ids]
    return {**truth, "images": images, "annotations": objects}


def _nothing(coco: Any, have: Any) -> Any:
    """Results without a detection, which loadRes refuses."""
    empty = coco.COCO()
    empty.dataset = {**have.dataset, "annotations": []}
    empty.createIndex()
    return empty


def _per_class(run: Any) -> dict[int, float]:
    """AP of each category: the mean over thresholds and recalls, of all sizes."""
    precision = run.eval["precision"][:, :, :, 0, -1]
    result = {}
    for i, category in enumerate(run.params.catIds):
        known = precision[:, :, i][precision[:, :, i] > -1]
        result[int(category)] = float(known.mean()) if known.size else -1.0
    return result


def coco_results(
    image_id: int,
    boxes: np.ndarray,
    scores: np.ndarray,
    categories: Sequence[int],
    masks: np.ndarray,
) -> list[dict[str, Any]]:
    """The detections of an image in COCO's format.

    Args:
        image_id: of the image.
        boxes: (N, 4), x0 y0 x1 y1 in pixels.
        scores: (N).
        categories: ids, N.
        masks: (N, H, W) bool, of the whole image.

    Raises:
        UserError: pycocotools is not installed.
    """
    coding, results = library("pycocotools.mask"), []
    for box, score, category, mask in zip(boxes, scores, categories, masks, strict=True):
        coded = coding.encode(np.asfortranarray(mask, np.uint8))
        x0, y0, x1, y1 = (float(n) for n in box)
        results.append(
            {
                "image_id": image_id,
                "category_id": int(category),
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "score": float(score),
                "segmentation": {"size": coded["size"], "counts": coded["counts"].decode("ascii")},
            }
        )
    return results
