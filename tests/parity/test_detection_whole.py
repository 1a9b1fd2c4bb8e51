"""A whole detector against the original (n_detection_whole): losses, gradients, one step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m2mkd_jax.detection import optimizer, rpn
from m2mkd_jax.detection.backbone import LEVELS
from tests.detection_fixtures import (
    check_detections,
    compiled,
    fixture,
    padded_objects,
    run_quickly,
)
from tests.support import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    arrays,
    assert_close,
    assert_trees_close,
)
from tests.torch_arrays import arrays_from_torch, arrays_to_torch

IMAGES, LIMIT = 2, 4


@functools.cache
def batch():
    own = fixture("n_detection_whole", "detector")
    mean, std = (
        np.asarray(own.meta["kwargs"][f"pixel_{k}_rgb"], np.float32) for k in ("mean", "std")
    )
    side = own.spec.backbone.square
    images, sizes = np.zeros((IMAGES, side, side, 3), np.float32), []
    for i in range(IMAGES):
        pixels = own.io[f"image_u8.{i}"].transpose(1, 2, 0)
        images[i, : pixels.shape[0], : pixels.shape[1]] = (pixels - mean) / std
        sizes.append(pixels.shape[:2])
    return images, np.asarray(sizes, np.float32)  # of the host: also read while tracing


def losses(params):
    """The losses with the identity for a permutation, and the recorded mask targets."""
    own, (images, sizes) = fixture("n_detection_whole", "detector"), batch()
    spec, io, network = own.spec, own.io, own.network(params)
    objects = padded_objects(io, IMAGES, LIMIT)
    features, _ = network.features(images)
    logits, deltas = network.rpn([features[level] for level in LEVELS])
    anchors = network.anchors(features)
    every = jnp.concatenate([jnp.asarray(a) for a in anchors])
    in_order = jnp.broadcast_to(jnp.arange(len(every), dtype=jnp.float32), (IMAGES, len(every)))
    joined = (jnp.concatenate(part, 1) for part in (logits, deltas))
    found = rpn.losses(spec, *joined, every, objects, in_order)
    proposals = rpn.propose(spec, logits, deltas, anchors, sizes, train=True)
    count = proposals.boxes.shape[1] + LIMIT
    in_order = jnp.broadcast_to(jnp.arange(count, dtype=jnp.float32), (IMAGES, count))
    regions = network.heads.sample(proposals, objects, in_order)
    masks, at = np.zeros((IMAGES, int(spec.roi_budget * spec.roi_positive), 28, 28), bool), 0
    for i in range(IMAGES):
        foreground = int(io[f"train.num_fg.{i}"])
        masks[i, :foreground] = io["train.mask_targets"][at : at + foreground]
        at += foreground
    found |= network.heads.losses(features, regions, objects, jnp.asarray(masks))
    return sum(found.values()), (found, proposals, regions)


@functools.cache
def result():
    own = fixture("n_detection_whole", "detector")
    return run_quickly(jax.value_and_grad(losses, has_aux=True), own.params)


def test_losses_proposals_and_sample():
    (_, (found, proposals, regions)), _ = result()
    io = fixture("n_detection_whole", "detector").io
    for name, value in found.items():
        assert_close(value, io[name], OUTPUT_TOLERANCE, name)
    for i in range(IMAGES):
        own = np.asarray(proposals.valid[i])
        assert_close(proposals.boxes[i][own], io[f"train.proposals.{i}.boxes"], OUTPUT_TOLERANCE)
        assert_close(proposals.logits[i][own], io[f"train.proposals.{i}.logits"], OUTPUT_TOLERANCE)
        own = np.asarray(regions.valid[i])
        np.testing.assert_array_equal(regions.classes[i][own], io[f"train.classes.{i}"])
        assert_close(regions.boxes[i][own], io[f"train.boxes.{i}"], OUTPUT_TOLERANCE)


def test_gradients():
    own = fixture("n_detection_whole", "detector")
    recorded = arrays_from_torch(own.table, _renamed(arrays("n_detection_whole/grads.npz")))
    assert_trees_close(result()[1], recorded, GRADIENT_TOLERANCE)


def _renamed(tensors):
    return {name.removeprefix("backbone."): value for name, value in tensors.items()}


@functools.cache
def updated(rule):
    """The parameters after one step with the recorded gradients."""
    own = fixture("n_detection_whole", "detector")
    gradients = arrays_from_torch(own.table, _renamed(arrays("n_detection_whole/grads.npz")))
    kwargs = own.meta["kwargs"]
    scales = optimizer.layer_scales(own.params, own.spec.backbone, kwargs["lr_decay_rate"], rule)
    mask = optimizer.decay_mask(own.params)
    step = optimizer.adamw(kwargs["lr"], kwargs["weight_decay"], scales, mask)

    def update(params, gradients):
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies by its integer counters
            changes, _ = step.update(gradients, step.init(params), params)
            return optax.apply_updates(params, changes)

    return run_quickly(update, own.params, gradients)


@pytest.mark.parametrize(("rule", "recorded"), [("block", "clean"), ("published", "published")])
def test_one_step(rule, recorded):
    own = fixture("n_detection_whole", "detector")
    found = arrays_to_torch(own.table, updated(rule), 16)
    gradients = _renamed(arrays("n_detection_whole/grads.npz"))
    start = f"step.{recorded}."
    steps = _renamed({k.removeprefix(start): v for k, v in own.io.items() if k.startswith(start)})
    before = arrays_to_torch(own.table, own.params, 16)
    assert len(steps) > 40
    for name, value in steps.items():
        # Below that Adam's quotient is rounding noise (meta.json).
        clear = (np.abs(gradients[name]) > 1e-6) | (gradients[name] == 0)
        np.testing.assert_allclose(found[name][clear], value[clear], rtol=2e-7, atol=2e-7)
        assert np.abs(value - before[name])[clear].max() > 1e-6


@pytest.mark.parametrize("prefix", ["before.", "after."])
def test_detections(prefix):
    own, (images, sizes) = fixture("n_detection_whole", "detector"), batch()
    params = own.params if prefix == "before." else updated("block")
    check_detections(detect()(params, images, sizes), own.io, prefix)


@functools.cache
def detect():
    own = fixture("n_detection_whole", "detector")
    return compiled(lambda params, *arrays: own.network(params).detect(*arrays))
