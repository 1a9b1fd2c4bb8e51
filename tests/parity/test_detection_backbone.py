"""Backbones and pyramid of a detector against the original (n_detection_backbone, _vitdet)."""

import jax
import pytest

from m2mkd_jax.detection.backbone import LEVELS
from tests.detection_fixtures import fixture, nchw, run_quickly
from tests.support import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    arrays,
    assert_close,
    assert_trees_close,
    nhwc,
)
from tests.torch_arrays import arrays_from_torch

# Compiling a gradient takes long; those of the V-MoE are in test_detection_whole.py.
CASES = [
    ("n_detection_backbone", "image", "", False),
    ("n_detection_vitdet", "pad32.tensor", "pad32.", True),
    ("n_detection_vitdet", "square.tensor", "square.", False),
]


@pytest.mark.parametrize(("name", "images", "prefix", "gradient"), CASES)
def test_features_and_gradients(name, images, prefix, gradient):
    own = fixture(name, "detector_backbone")
    weights = {level: nhwc(own.io[f"{prefix}weight.{level}"]) for level in LEVELS}

    def scalar(params, images):
        features, _ = own.network(params).features(images)
        return sum((features[level] * weights[level]).sum() for level in LEVELS), features

    if gradient:
        run = jax.value_and_grad(scalar, has_aux=True)
        (_, features), gradients = run_quickly(run, own.params, nhwc(own.io[images]))
    else:
        features = run_quickly(scalar, own.params, nhwc(own.io[images]))[1]
    for level, maps in features.items():
        assert_close(nchw(maps), own.io[prefix + level], OUTPUT_TOLERANCE, level)
    if not gradient:
        return
    recorded = arrays(f"{name}/grads.npz")
    want = {e.torch: recorded[prefix + e.torch] for e in own.table}
    assert_trees_close(gradients, arrays_from_torch(own.table, want), GRADIENT_TOLERANCE)
