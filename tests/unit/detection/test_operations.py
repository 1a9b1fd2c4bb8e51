"""Boxes, suppression, sampling, RoIAlign and pasting against loops, and at degenerate inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.detection import boxes as box_ops
from m2mkd_jax.detection import matching, roi_align
from m2mkd_jax.detection.suppression import nms

RNG = np.random.default_rng(0)
# Ordinary ones, then: without area, turned round, thin, outside, around the map, one pixel.
BOXES = np.array(
    [
        [3.2, 4.1, 30.7, 21.9],
        [0, 0, 63, 47],
        [10, 10, 10, 10],
        [20, 20, 12, 14],
        [5, 7, 60, 7.5],
        [-40, -30, -10, -5],
        [-2, -2, 66, 50],
        [33, 17, 34, 18],
    ],
    np.float32,
)


def naive_iou(a, b):
    w = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    h = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(x[2] - x[0]) * (x[3] - x[1]) for x in (a, b)]
    return w * h / (sum(areas) - w * h) if w * h > 0 else 0.0


def random_boxes(count):
    low = RNG.uniform(0, 40, (count, 2))
    return np.concatenate([low, low + RNG.uniform(1, 25, (count, 2))], 1).astype(np.float32)


def test_iou_is_that_of_a_loop():
    want = [[naive_iou(a, b) for b in BOXES.astype(float)] for a in BOXES.astype(float)]
    np.testing.assert_allclose(box_ops.iou(BOXES, BOXES), want, atol=1e-6)


def test_decoding_undoes_coding_and_bounds_the_growth():
    boxes, targets = random_boxes(20), random_boxes(20)
    weights = (10.0, 10.0, 5.0, 5.0)
    deltas = box_ops.encode(jnp.asarray(boxes), jnp.asarray(targets), weights)
    np.testing.assert_allclose(box_ops.decode(deltas, boxes, weights), targets, atol=1e-4)
    grown = box_ops.decode(jnp.full((1, 4), 100.0), jnp.asarray([[0, 0, 16.0, 16]]), (1, 1, 1, 1))
    np.testing.assert_allclose(grown[0, 2] - grown[0, 0], 1000, rtol=1e-5)


def test_clipping():
    clipped = np.asarray(box_ops.clip(jnp.asarray(BOXES), jnp.asarray([48.0, 64.0])))
    assert clipped.min() >= 0
    assert clipped[:, 0::2].max() <= 64
    assert clipped[:, 1::2].max() <= 48
    empty = ~np.asarray(box_ops.nonempty(jnp.asarray(clipped)))
    assert empty.nonzero()[0].tolist() == [2, 3, 5]


def naive_nms(boxes, scores, valid, threshold):
    keep = []
    for i in np.argsort(-scores, kind="stable"):
        if valid[i] and all(naive_iou(boxes[i], boxes[j]) <= threshold for j in keep):
            keep.append(i)
    return np.isin(np.arange(len(boxes)), keep)


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7])
def test_nms_is_that_of_a_loop(threshold):
    run = jax.jit(nms)
    for _ in range(5):
        boxes, scores = random_boxes(60), np.round(RNG.uniform(0, 1, 60), 1).astype(np.float32)
        valid = RNG.uniform(0, 1, 60) < 0.8
        want = naive_nms(boxes.astype(float), scores, valid, threshold)
        np.testing.assert_array_equal(run(boxes, scores, valid, threshold), want)


def test_nms_of_nothing_and_of_equal_boxes():
    boxes, scores = np.repeat(BOXES[:1], 4, 0), np.ones(4, np.float32)
    assert nms(boxes, scores, np.ones(4, bool), 0.5).tolist() == [True, False, False, False]
    assert not nms(boxes, scores, np.zeros(4, bool), 0.5).any()
    half = np.array([[0, 0, 2, 1], [0, 0, 1, 1]], np.float32)  # IoU 0.5: not above the threshold
    assert nms(half, scores[:2], np.ones(2, bool), 0.5).all()


def naive_roi_align(feature, box, stride, bins):
    x0, y0, x1, y1 = box.astype(np.float64) / stride - 0.5
    sizes = (y1 - y0) / bins, (x1 - x0) / bins
    counts = [int(np.ceil(size)) for size in sizes]
    height, width = feature.shape[:2]
    result = np.zeros((bins, bins, feature.shape[2]))

    def value(y, x):
        if not (-1 <= y <= height and -1 <= x <= width):
            return 0.0
        y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        total = 0.0
        for i in {int(y), min(int(y) + 1, height - 1)}:
            for j in {int(x), min(int(x) + 1, width - 1)}:
                total = total + (1 - abs(y - i)) * (1 - abs(x - j)) * feature[i, j]
        return total

    for i in range(bins):
        for j in range(bins):
            for a in range(counts[0]):
                for b in range(counts[1]):
                    y = y0 + sizes[0] * (i + (a + 0.5) / counts[0])
                    x = x0 + sizes[1] * (j + (b + 0.5) / counts[1])
                    result[i, j] += value(y, x) / (counts[0] * counts[1])
    return result


def test_roi_align_is_that_of_a_loop():
    feature = RNG.normal(size=(12, 16, 2)).astype(np.float32)
    found = jax.jit(lambda f, b: roi_align.roi_align(f, b, 4.0, 3))(feature, BOXES)
    for box, own in zip(BOXES, found, strict=True):
        np.testing.assert_allclose(own, naive_roi_align(feature, box, 4, 3), atol=1e-5)


def test_pooling_in_parts_is_pooling_at_once(monkeypatch):
    maps = [RNG.normal(size=(48 // s, 64 // s, 2)).astype(np.float32) for s in (4, 8, 16, 32)]
    at_once = jax.jit(lambda *a: roi_align.pool(*a, 3))(maps, BOXES)
    monkeypatch.setattr(roi_align, "LARGEST_PART", 3 * 3 * 16 * 2)
    in_parts = jax.jit(lambda *a: roi_align.pool(*a, 3))(maps, BOXES)
    np.testing.assert_allclose(in_parts, at_once, atol=1e-6)


def test_pasting_is_that_of_a_loop():
    masks = RNG.uniform(0, 1, (2, 6, 6)).astype(np.float32)
    boxes = np.array([[2.3, 1.1, 9.6, 8.2], [7, 3, 8, 4]], np.float32)  # the second: one pixel
    found = np.asarray(roi_align.paste_masks(masks, boxes, 10, 12))
    for mask, box, own in zip(masks, boxes, found, strict=True):
        framed = np.pad(mask, 1)
        for y in range(10):
            for x in range(12):
                v = (y + 0.5 - box[1]) / (box[3] - box[1]) * 6 + 0.5
                u = (x + 0.5 - box[0]) / (box[2] - box[0]) * 6 + 0.5
                want = 0.0
                if 0 <= v < 7 and 0 <= u < 7:
                    i, j = int(v), int(u)
                    for a in (0, 1):
                        for b in (0, 1):
                            weight = (1 - abs(v - i - a)) * (1 - abs(u - j - b))
                            want += weight * framed[i + a, j + b]
                np.testing.assert_allclose(own[y, x], want, atol=1e-5)


def test_an_object_without_overlap_makes_no_anchor_positive():
    far = jnp.asarray([[600.0, 500, 700, 600], [10, 10, 40, 40]])
    anchors = jnp.asarray(box_ops.anchors(6, 6, 16, 32, (0.5, 1, 2)))
    overlap = box_ops.iou(far, anchors)
    _, labels = matching.match(overlap, jnp.asarray([True, False]), 0.3, 0.7, low_quality=True)
    assert not labels.any()
    _, labels = matching.match(overlap, jnp.asarray([True, True]), 0.3, 0.7, low_quality=True)
    assert (labels == 1).any()


def test_sampling_takes_the_budget_positive_first():
    labels = np.array([0, 1, -1, 1, 0, 0, 1, 0])
    priority = np.array([5, 9, 0, 1, 2, 4, 3, 1], np.float32)
    drawn = matching.sample(labels, priority, 4, 0.5)
    assert drawn.index.tolist() == [3, 6, 7, 4]
    assert drawn.positive.tolist() == [True, True, False, False]
    few = matching.sample(np.array([-1, 1, -1, 0]), priority[:4], 4, 0.5)
    assert few.index[few.valid].tolist() == [1, 3]
    none = matching.sample(np.full(4, -1), priority[:4], 4, 0.5)
    assert not none.valid.any()


def test_cropped_masks_of_full_empty_and_one_pixel_objects():
    masks = np.zeros((3, 16, 16), bool)
    masks[0], masks[2, 5, 5] = True, True
    boxes = np.array([[2, 2, 14, 14], [2, 2, 14, 14], [5, 5, 6, 6]], np.float32)
    found = np.asarray(roi_align.crop_masks(masks, boxes, 4))
    assert found[0].all() and not found[1].any() and found[2].any()
