"""A tiny detector: its losses and gradients without objects and with the most; its sizes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.detection import optimizer
from m2mkd_jax.detection.backbone import Net, Pyramid
from m2mkd_jax.detection.detector import builder
from m2mkd_jax.detection.rpn import Objects
from m2mkd_jax.detection.spec import BackboneSpec, DetectorSpec, describe, spec_of
from m2mkd_jax.errors import UserError
from m2mkd_jax.models import chain
from m2mkd_jax.models.moe.spec import VMoESpec
from m2mkd_jax.models.vit_spec import ViTSpec

VIT = ViTSpec(32, 16, 8, 2, 0)
TINY = DetectorSpec(
    BackboneSpec(
        VMoESpec(VIT, (1,), experts=2),
        (2,),
        window=2,
        global_blocks=(1,),
        relative_positions=True,
        table_image_size=64,
        drop_path=0.1,
        channels=4,
    ),
    classes=2,
    anchor_sizes=(8, 16, 32, 64, 128),
    rpn_budget=8,
    pre_nms=(12, 12),
    post_nms=(10, 10),
    roi_budget=8,
    fc_width=8,
    detections=5,
)
LIMIT = 3


@functools.cache
def losses():
    graph = chain.abstract(builder(TINY)).graph

    def total(params, objects):
        images = jax.random.normal(jax.random.key(1), (2, 64, 64, 3))
        sizes = jnp.asarray([[64.0, 64], [40, 50]])
        network = chain.merge(graph, params, {})
        found, _ = network.losses(images, sizes, objects, jax.random.key(0))
        return sum(found.values()), found

    return jax.jit(jax.value_and_grad(total, has_aux=True))


@functools.cache
def params():
    return chain.initialise(builder(TINY), jax.random.key(0)).params


def objects(counts, boxes=((4, 6, 30, 40), (20, 20, 21, 21), (0, 0, 64, 64))):
    valid = np.arange(LIMIT)[None] < np.asarray(counts)[:, None]
    masks = np.zeros((2, LIMIT, 64, 64), bool)
    masks[:, :, 10:30, 10:25] = True
    every = np.broadcast_to(np.asarray(boxes, np.float32), (2, LIMIT, 4))
    return Objects(every, np.ones((2, LIMIT), np.int32), valid, masks)


@pytest.mark.parametrize("counts", [(0, 0), (3, 1), (3, 3)])
def test_losses_and_gradients_are_finite(counts):
    (total, found), gradients = losses()(params(), objects(counts))
    assert np.isfinite(total)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    if counts == (0, 0):
        assert found["loss_mask"] == found["loss_box_reg"] == found["loss_rpn_loc"] == 0
        assert not np.abs(gradients["heads"]["mask_head"]["predictor"]["kernel"]).any()


def test_objects_outside_the_image_do_not_matter_where_they_are_not_valid():
    far = [(900, 900, 990, 990), (0, 0, 0, 0), (-9, -9, -5, -5)]
    first = losses()(params(), objects((0, 0)))[0]
    second = losses()(params(), objects((0, 0), far))[0]
    np.testing.assert_array_equal(first[0], second[0])
    assert np.isfinite(losses()(params(), objects((3, 3), far))[0][0])


def test_descriptions_go_back():
    for spec in (TINY, TINY.backbone):
        assert spec_of(describe(spec)) == spec


def test_padding_and_what_does_not_fit():
    assert TINY.backbone.padded(64, 65) == (64, 96)
    square = BackboneSpec(VMoESpec(VIT, (), 1, 1), (2,), square=128)
    assert square.padded(3, 100) == (128, 128)
    with pytest.raises(UserError, match="make it smaller"):
        square.padded(3, 129)
    with pytest.raises(UserError, match="there are 2 blocks"):
        BackboneSpec(VMoESpec(VIT, (2,), 2), (2,))


def test_layer_scales_by_true_block_and_as_published():
    spec = BackboneSpec(VMoESpec(VIT, (0, 1, 2, 3), 2), (2, 2))
    params = chain.abstract(builder(spec)).params
    for rule, want in (("block", [1, 2, 3, 4]), ("published", [1, 2, 1, 2])):
        scales = optimizer.layer_scales(params, spec, 0.5, rule)
        own = scales["net"]["segment_0"]["blocks"]["norm1"]["scale"].reshape(-1)
        np.testing.assert_allclose(own, [0.5 ** (5 - n) for n in want])
        assert scales["net"]["pos_embed"] == 0.5**5
        assert scales["pyramid"]["p2_norm"]["scale"] == 1
    with pytest.raises(UserError, match="layer_rule"):
        optimizer.layer_scales(params, spec, 0.5, "stage")


def count(build):
    return chain.count_parameters(chain.abstract(build).params)


def base(moe, **fields):
    vit = ViTSpec(224, 16, 768, 12, 0)
    vmoe = VMoESpec(vit, tuple(range(12)), 8) if moe else VMoESpec(vit, (), 1, 1)
    return BackboneSpec(vmoe, (3, 3, 3, 3) if moe else (12,), **fields)


VITDET = {
    "window": 14,
    "global_blocks": (2, 5, 8, 11),
    "relative_positions": True,
    "table_image_size": 1024,
    "class_position": True,
}


def test_parameters_of_the_published_networks():
    # docs/detection.md#sizes
    vmoe, vit = DetectorSpec(base(True)), DetectorSpec(base(False, **VITDET))
    assert count(lambda rngs: Net(vmoe.backbone, rngs=rngs)) == 482_553_696
    assert count(lambda rngs: Net(vit.backbone, rngs=rngs)) == 85_889_024
    parts = 2_115_904 + 1_869_184 + 2 * 787_456
    assert count(lambda rngs: Pyramid(768, 256, rngs=rngs)) == parts
    assert count(builder(vmoe)) == 507_560_464
    assert count(builder(vit)) == 110_895_792
