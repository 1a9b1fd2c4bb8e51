"""Region proposal network against the original (n_detection_rpn)."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.detection import boxes as box_ops
from m2mkd_jax.detection import names, rpn
from m2mkd_jax.detection.backbone import LEVELS
from m2mkd_jax.detection.matching import match
from m2mkd_jax.models import chain
from tests.detection_fixtures import (
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

IMAGES = 3


@functools.cache
def setup():
    kwargs = facts("n_detection_rpn/meta.json")["kwargs"]
    whole = fixture("n_detection_whole", "detector")
    spec = dataclasses.replace(
        whole.spec,
        backbone=dataclasses.replace(whole.spec.backbone, channels=kwargs["channels"]),
        anchor_sizes=tuple(kwargs["anchor_sizes"]),
        rpn_budget=kwargs["batch_size_per_image"],
        pre_nms=tuple(kwargs["pre_nms_topk"]),
        post_nms=tuple(kwargs["post_nms_topk"]),
    )
    io = arrays("n_detection_rpn/io.npz")
    params = head_params(names.names(spec), state_dict("n_detection_rpn"), "rpn")
    features = [nhwc(io[f"features.{level}"]) for level in LEVELS]
    anchors = rpn.level_anchors(spec, [x.shape[1:3] for x in features])
    return spec, io, params, features, anchors


def head(params, features):
    graph = chain.abstract(build_head).graph
    return chain.merge(graph, params, {})(features)


def build_head(rngs):
    return rpn.RPNHead(8, 3, rngs=rngs)


def test_anchors_are_exact():
    _, io, _, _, anchors = setup()
    for level, own in zip(LEVELS, anchors, strict=True):
        np.testing.assert_array_equal(own, io[f"anchors.{level}"])


@pytest.mark.parametrize(("name", "weights"), [("w1", (1, 1, 1, 1)), ("w10", (10, 10, 5, 5))])
def test_box_coding(name, weights):
    io = setup()[1]
    boxes, targets, deltas = (jnp.asarray(io[f"code.{k}"]) for k in ("boxes", "targets", "deltas"))
    deltas = deltas * (5.0 if name == "w10" else 1.0)
    decoded = box_ops.decode(deltas, boxes, weights)
    assert_close(decoded, io[f"code.decoded_{name}"], 1e-6)
    assert_close(box_ops.encode(boxes, targets, weights), io[f"code.encoded_{name}"], 1e-6)


def test_matcher_gives_the_recorded_labels():
    spec, io, _, _, anchors = setup()
    objects, every = padded_objects(io, IMAGES, 4), jnp.concatenate([*map(jnp.asarray, anchors)])
    for i in range(IMAGES):
        overlap = box_ops.iou(objects.boxes[i], every)
        own, labels = match(overlap, objects.valid[i], *spec.rpn_thresholds, low_quality=True)
        np.testing.assert_array_equal(labels, io[f"labels_matcher.{i}"])
        positive = np.asarray(labels) == 1
        boxes = objects.boxes[i][own]
        np.testing.assert_array_equal(boxes[positive], io[f"matched_gt_boxes.{i}"][positive])


def test_losses_and_gradients_of_the_recorded_sample():
    spec, io, params, features, anchors = setup()
    every = jnp.concatenate([*map(jnp.asarray, anchors)])
    objects = padded_objects(io, IMAGES, 4)
    drawn = np.stack(
        [
            priority(len(every), io[f"sampled_pos.{i}"], io[f"sampled_neg.{i}"])
            for i in range(IMAGES)
        ]
    )

    def loss(params, features):
        logits, deltas = (jnp.concatenate(part, 1) for part in head(params, features))
        found = rpn.losses(spec, logits, deltas, every, objects, jnp.asarray(drawn))
        return sum(found.values()), (found, logits, deltas)

    run = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
    (_, (found, logits, deltas)), gradients = run_quickly(run, params, features)
    of_params, of_features = gradients
    want = [np.concatenate([io[f"{k}.{v}"] for v in LEVELS], 1) for k in ("objectness", "deltas")]
    assert_close(logits, want[0], OUTPUT_TOLERANCE)
    assert_close(deltas, want[1], OUTPUT_TOLERANCE)
    for name, value in found.items():
        assert_close(value, io[name], OUTPUT_TOLERANCE, name)
    recorded = head_params(names.names(spec), arrays("n_detection_rpn/grads.npz"), "rpn")
    assert_trees_close(of_params, recorded, GRADIENT_TOLERANCE)
    for level, gradient in zip(LEVELS, of_features, strict=True):
        assert_close(nchw(gradient), io[f"grad.features.{level}"], GRADIENT_TOLERANCE, level)


@pytest.mark.parametrize("mode", ["train", "test"])
def test_proposals(mode):
    spec, io, _, _, anchors = setup()
    logits, deltas = (
        [jnp.asarray(io[f"{key}.{level}"]) for level in LEVELS] for key in ("objectness", "deltas")
    )
    sizes = jnp.asarray(facts("n_detection_rpn/meta.json")["image_sizes"], jnp.float32)
    propose = functools.partial(rpn.propose, spec, anchors=anchors, train=mode == "train")
    found = run_quickly(lambda *a: propose(*a, sizes=sizes), logits, deltas)
    for i in range(IMAGES):
        own = np.asarray(found.valid[i])
        assert_close(found.boxes[i][own], io[f"proposals.{mode}.{i}.boxes"], OUTPUT_TOLERANCE)
        assert_close(found.logits[i][own], io[f"proposals.{mode}.{i}.logits"], OUTPUT_TOLERANCE)
