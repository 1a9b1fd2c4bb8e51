"""Backbones and pyramid of a detector against the original (n_detection_backbone, _vitdet)."""

import jax
import pytest

from m2mkd_jax.detection.backbone import LEVELS
from tests.detection_fixtures import fixture, nchw
from tests.support import (
    GRADIENT_TOLERANCE,
    OUTPUT_TOLERANCE,
    arrays,
    assert_close,
    assert_trees_close,
    nhwc,
)
from tests.torch_arrays import arrays_from_torch

CASES = [
    ("n_detection_backbone", "image", ""),
    ("n_detection_vitdet", "pad32.tensor", "pad32."),
    ("n_detection_vitdet", "square.tensor", "square."),
]


@pytest.mark.parametrize(("name", "images", "prefix"), CASES)
def test_features_and_gradients(name, images, prefix):
    own = fixture(name, "detector_backbone")
    weights = {level: nhwc(own.io[f"{prefix}weight.{level}"]) for level in LEVELS}

    def scalar(params, images):
        features, _ = own.network(params).features(images)
        return sum((features[level] * weights[level]).sum() for level in LEVELS), features

    run = jax.jit(jax.value_and_grad(scalar, has_aux=True))
    (_, features), gradients = run(own.params, nhwc(own.io[images]))
    for level, maps in features.items():
        assert_close(nchw(maps), own.io[prefix + level], OUTPUT_TOLERANCE, level)
    recorded = arrays(f"{name}/grads.npz")
    want = {e.torch: recorded[prefix + e.torch] for e in own.table}
    assert_trees_close(gradients, arrays_from_torch(own.table, want), GRADIENT_TOLERANCE)
