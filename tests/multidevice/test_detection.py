"""Losses and gradient of a detector on a mesh, experts sharded too, are those of one device."""

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.data.digits_scene import digits_scene
from m2mkd_jax.data.scene_batches import collate
from m2mkd_jax.detection.detector import builder
from m2mkd_jax.detection.spec import BackboneSpec, DetectorSpec
from m2mkd_jax.detection.training import STAGE, make_loss
from m2mkd_jax.models import chain
from m2mkd_jax.models.moe.spec import VMoESpec
from m2mkd_jax.models.vit_spec import ViTSpec
from m2mkd_jax.parallel import partition
from m2mkd_jax.parallel.mesh import make_mesh, put_batch, with_mesh
from tests.random_params import random_params
from tests.support import assert_trees_close

# Without a key bias, whose gradient is nothing but rounding.
VIT = ViTSpec(32, 16, 8, 2, 0, qkv_bias=False)
SPEC = DetectorSpec(
    BackboneSpec(VMoESpec(VIT, (0,), experts=4), (1,), window=2, channels=8),
    classes=10,
    anchor_sizes=(8, 16, 32, 64, 128),
    rpn_budget=8,
    pre_nms=(12, 12),
    post_nms=(10, 10),
    roi_budget=8,
    fc_width=8,
)


def test_a_mesh_changes_nothing():
    part = chain.abstract(builder(SPEC))
    params = {STAGE: random_params(part.params, seed=0)}
    batch = collate([digits_scene(0, "train", i, side=64) for i in range(8)], (64, 64), 4)
    loss = make_loss(part.graph, (0.5,) * 3, (0.25,) * 3)
    found = {}
    for shape, expert in (("1", 1), ("2x4", 4)):
        mesh = make_mesh(jax.devices()[:1] if shape == "1" else None, expert=expert)
        placed = partition.put(params, partition.shardings(mesh, params, fsdp=False))
        run = jax.jit(with_mesh(mesh, jax.value_and_grad(loss, has_aux=True)))
        found[shape] = run(placed, {}, put_batch(mesh, batch), jax.random.key(0))
    for name, value in found["1"][0][1].items():
        np.testing.assert_allclose(found["2x4"][0][1][name], value, rtol=1e-5, err_msg=name)
    assert_trees_close(found["2x4"][1], found["1"][1], 1e-4)
    experts = found["2x4"][1][STAGE]["net"]["segment_0"]["blocks"]["moe"]["experts"]
    assert experts["fc1"]["kernel"].shape[1] == 4
    assert jnp.isfinite(found["1"][0][0])
