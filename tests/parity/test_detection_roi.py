"""RoIAlign, heads, losses and detections against the original (n_detection_roi)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.detection import names, roi_align
from m2mkd_jax.detection.backbone import LEVELS
from m2mkd_jax.detection.detector import Heads
from m2mkd_jax.detection.rpn import Proposals
from m2mkd_jax.models import chain
from tests.detection_fixtures import (
    check_detections,
    fixture,
    head_params,
    nchw,
    padded_objects,
    priority,
    run_quickly,
    state_dict,
)
from tests.support import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    arrays,
    assert_close,
    assert_trees_close,
    facts,
    nhwc,
)

IMAGES, LIMIT = 2, 5


@functools.cache
def setup():
    kwargs = facts("n_detection_roi/meta.json")["kwargs"]
    whole = fixture("n_detection_whole", "detector")
    spec = dataclasses.replace(
        whole.spec,
        backbone=dataclasses.replace(whole.spec.backbone, channels=kwargs["channels"]),
        classes=kwargs["num_classes"],
        fc_width=kwargs["fc_dim"],
        roi_budget=kwargs["batch_size_per_image"],
        detections=kwargs["test_topk_per_image"],
    )
    io = arrays("n_detection_roi/io.npz")
    params = head_params(names.names(spec), state_dict("n_detection_roi"), "heads")
    graph = chain.abstract(functools.partial(_build, spec)).graph
    features = {level: nhwc(io[f"features.{level}"]) for level in LEVELS[:4]}
    boxes = jnp.stack([io[f"proposals.{i}.boxes"] for i in range(IMAGES)])
    logits = jnp.stack([io[f"proposals.{i}.logits"] for i in range(IMAGES)])
    proposals = Proposals(boxes, logits, jnp.ones(boxes.shape[:2], bool))
    return spec, io, params, lambda params: chain.merge(graph, params, {}), features, proposals


def _build(spec, rngs):
    return Heads(spec, rngs=rngs)


def test_levels_and_pooling():
    _, io, _, _, features, proposals = setup()
    boxes = proposals.boxes.reshape(-1, 4)
    np.testing.assert_array_equal(roi_align.levels(boxes), io["levels"])
    maps = [features[level] for level in LEVELS[:4]]
    for bins in (7, 14):
        run = jax.vmap(functools.partial(roi_align.pool, bins=bins))
        pooled = nchw(run_quickly(run, maps, proposals.boxes).reshape(-1, bins, bins, 6))
        assert_close(pooled, io[f"pool{bins}"], OUTPUT_TOLERANCE, f"{bins} bins")


def test_detections_and_box_head():
    spec, io, params, heads, features, proposals = setup()
    sizes = jnp.asarray(facts("n_detection_roi/meta.json")["kwargs"]["image_sizes"], jnp.float32)

    def run(params):
        found = heads(params).detect(features, proposals, sizes)
        return found, heads(params).predict_boxes(features, proposals.boxes)

    found, (logits, deltas) = run_quickly(run, params)
    assert_close(logits.reshape(-1, spec.classes + 1), io["class_logits"], OUTPUT_TOLERANCE)
    assert_close(deltas.reshape(-1, 4 * spec.classes), io["box_deltas"], OUTPUT_TOLERANCE)
    check_detections(found, io, "test.")


@pytest.mark.parametrize("image", range(IMAGES))
def test_pasted_masks(image):
    _, io, _, _, _, _ = setup()
    height, width = io[f"test.output_size.{image}"]
    boxes, masks = (jnp.asarray(io[f"test.{k}.{image}"]) for k in ("output_boxes", "masks28"))
    pasted = np.asarray(roi_align.paste_masks(masks, boxes, int(height), int(width)))
    clear = np.abs(pasted - 0.5) > 1e-4
    assert clear.mean() > 0.99
    want = io[f"test.output_masks.{image}"].astype(bool)
    np.testing.assert_array_equal((pasted >= 0.5)[clear], want[clear])


def drawn_regions(spec, io, heads, params, proposals, objects):
    count = proposals.boxes.shape[1] + LIMIT
    drawn = np.stack([priority(count, io[f"train.sampled.{i}"]) for i in range(IMAGES)])
    return heads(params).sample(proposals, objects, jnp.asarray(drawn))


def test_losses_and_gradients_of_the_recorded_sample():
    spec, io, params, heads, features, proposals = setup()
    objects = padded_objects(io, IMAGES, LIMIT)
    regions = drawn_regions(spec, io, heads, params, proposals, objects)
    foreground = int(spec.roi_budget * spec.roi_positive)
    targets = np.zeros((IMAGES, foreground, 28, 28), bool)
    at = 0
    for i in range(IMAGES):
        own = np.asarray(regions.valid[i])
        np.testing.assert_array_equal(regions.boxes[i][own], io[f"train.boxes.{i}"])
        np.testing.assert_array_equal(regions.classes[i][own], io[f"train.classes.{i}"])
        count = int(io[f"train.num_fg.{i}"])
        assert int(regions.foreground[i].sum()) == count
        targets[i, :count] = io["train.mask_targets"][at : at + count]
        at += count

    def loss(params, features):
        found = heads(params).losses(features, regions, objects, jnp.asarray(targets))
        return sum(found.values()), found

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, found), (of_params, of_features) = run_quickly(run, params, features)
    for name, value in found.items():
        assert_close(value, io[name], OUTPUT_TOLERANCE, name)
    recorded = head_params(names.names(spec), arrays("n_detection_roi/grads.npz"), "heads")
    assert_trees_close(of_params, recorded, GRADIENT_TOLERANCE)
    for level, gradient in of_features.items():
        assert_close(nchw(gradient), io[f"grad.features.{level}"], GRADIENT_TOLERANCE, level)
