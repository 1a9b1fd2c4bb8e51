"""Augmentations and evaluation against the original (n_detection_augment, n_detection_coco)."""

import json

import numpy as np
import pytest

from m2mkd_jax.data import annotations
from m2mkd_jax.data.coco import decode_mask
from m2mkd_jax.evaluate.coco import NUMBERS, evaluate_coco
from tests.support import FIXTURES, arrays, facts

IO, META = arrays("n_detection_augment/io.npz"), facts("n_detection_augment/meta.json")


def scene():
    content = json.loads(str(IO["annotations"]))
    entries = content["annotations"] if isinstance(content, dict) else content
    entries = [entry for entry in entries if not entry.get("iscrowd")]
    boxes = np.array([entry["bbox"] for entry in entries], np.float64)
    boxes[:, 2:] += boxes[:, :2]
    classes = np.array([entry["category_id"] for entry in entries])
    masks = [decode_mask(entry["segmentation"]) for entry in entries]
    return annotations.Scene(IO["image"], boxes, classes, masks)


def augmented(case):
    draws = META["cases"][case]
    flip = 0.0 if draws.get("flip") else 1.0
    if draws["kind"] == "lsj":
        return annotations.large_scale_jitter(scene(), 96, flip, draws["scale"], draws["crop"])
    if draws["kind"] == "plain":
        return annotations.plain_resize(scene(), draws["short"], 110, flip)
    return annotations.plain_resize(scene(), 96, 96)


@pytest.mark.parametrize("case", META["cases"])
def test_augmentations(case):
    found = augmented(case)
    np.testing.assert_array_equal(found.image, IO[f"{case}.image"])
    if case == "test":
        return
    np.testing.assert_allclose(found.boxes, IO[f"{case}.boxes"], atol=1e-4)
    np.testing.assert_array_equal(found.classes, IO[f"{case}.classes"])
    masks = [annotations.bitmap(mask, *found.size) for mask in found.masks]
    np.testing.assert_array_equal(masks, IO[f"{case}.masks"].astype(bool))


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_evaluation(kind):
    folder, recorded = FIXTURES / "n_detection_coco", facts("n_detection_coco/meta.json")
    truth, found = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("instances", "detections")
    )
    numbers = evaluate_coco(truth, found, kind)
    want = dict(zip(recorded["order"], recorded["stats"][kind], strict=True))
    assert list(want) == list(NUMBERS)
    assert numbers.stats == pytest.approx(want, abs=1e-9)
    per_class = {int(k): v for k, v in recorded["per_category"][kind].items()}
    assert numbers.per_class == pytest.approx(per_class, abs=1e-9)
    assert "bbox" in found[0] or kind == "bbox"


def test_evaluation_of_no_detections_is_zero():
    truth = json.loads((FIXTURES / "n_detection_coco" / "instances.json").read_text())
    assert evaluate_coco(truth, [], "bbox").stats["AP"] == 0
