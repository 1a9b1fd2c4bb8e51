"""Groups of images that share slots: which batches can be cut into them."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import m2mkd_jax
from m2mkd_jax.checkpoint.store import save_weights
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import checks
from m2mkd_jax.jobs.evaluation import evaluation_batch
from m2mkd_jax.models import chain, vit
from m2mkd_jax.models.moe import blocks, vmoe
from tests.e2e import tiny_vmoe
from tests.random_params import random_params


def config_of(**changes):
    """Batches of 16."""
    config = tiny_vmoe.get_config()
    config.vmoe.update(changes)
    return config


@pytest.mark.parametrize(
    ("changes", "devices"),
    [
        ({"group_images": 2}, 8),
        ({"group_images": 32}, 1),
        ({"group_images": 3, "dispatch": "dropless"}, 8),
    ],
)
def test_groups_that_fit(changes, devices):
    checks.check_config(config_of(**changes), devices)


@pytest.mark.parametrize(
    ("changes", "devices", "says"),
    [
        ({"group_images": 4}, 8, "groups of 4 images on 8 device"),
        ({"group_images": 32}, 2, "groups of 32 images on 2 device"),
        ({"group_images": 3}, 1, "groups of 3 images on 1 device"),
        ({"group_images": 4, "dispatch": "dropless", "router": "expert_choice"}, 8, "groups of 4"),
    ],
)
def test_groups_that_do_not_fit_are_refused_before_any_work(changes, devices, says):
    config = config_of(**changes)
    for recipe in config.recipes.values():
        recipe.load_weight = 0.0
    with pytest.raises(UserError, match=rf"config.recipes.m2mkd: .* 16 images .* {says}"):
        checks.check_config(config, devices)
    # One module's own batch, and the parts of a batch.
    config = config_of(group_images=2)
    config.recipes.m2mkd.modules = {"1": {"accumulate": 2}}
    with pytest.raises(UserError, match=r"config.recipes.m2mkd: .* 8 images .* groups of 2"):
        checks.check_config(config, 8)


def test_evaluation_batches_are_a_multiple_of_the_devices():
    eight = SimpleNamespace(size=8)
    assert evaluation_batch(config_of(group_images=3), 100, eight) == 64  # evaluation.batch
    assert evaluation_batch(config_of(group_images=3), 20, eight) == 24


def test_without_slots_there_are_no_groups():
    spec = blocks.VMoESpec(vit.ViTSpec(16, 8, 6, 2, 5), (0,), 4, group_images=3)
    parts = chain.abstract(lambda rngs: blocks.MoE(spec, rngs=rngs))
    layer = chain.merge(parts.graph, random_params(parts.params, 0), {})
    assert jax.eval_shape(layer, jnp.zeros((4, 5, 6)))[0].shape == (4, 5, 6)


@pytest.mark.parametrize("router", ["published", "vmoe", "expert_choice"])
def test_a_finished_network_sees_every_image_by_itself(router, tmp_path):
    """However many images there are, and whatever is beside them."""
    spec = vmoe.VMoESpec(
        vit.ViTSpec(16, 8, 12, 2, 5),
        (0,),
        4,
        router=router,
        dispatch="capacity",
        capacity_factor=0.5,
        group_images=4,
    )
    build = lambda rngs: vmoe.build_stage(spec, 0, (1,), rngs=rngs)
    params = random_params(chain.abstract(build).params, 0)
    description = {"kind": "vmoe", "spec": dataclasses.asdict(spec), "depths": [1], "module": 0}
    description["normalisation"] = {"mean": [0.5] * 3, "std": [0.5] * 3}
    save_weights(tmp_path / "w", {"vmoe_0": {"params": params}}, description)
    model = m2mkd_jax.load(tmp_path / "w")
    images = np.random.default_rng(0).normal(size=(10, 16, 16, 3)).astype(np.float32)
    together = model(images)
    for part in (slice(4), slice(4, 7), slice(9, 10)):
        np.testing.assert_allclose(model(images[part]), together[part], atol=1e-5)
