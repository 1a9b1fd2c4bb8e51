"""Detectors as phases: their specs, weights from a trained network, optimizer and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.conversion.name_tables import name_table
from m2mkd_jax.conversion.names import array_at, as_tuple
from m2mkd_jax.detection.convolution import max_pool
from m2mkd_jax.detection.names import net_names
from m2mkd_jax.detection.optimizer import decay_mask, learning_rate, make_optimizer
from m2mkd_jax.detection.training import STAGE, batch_shapes
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import checks
from m2mkd_jax.jobs.plan import Plan
from m2mkd_jax.jobs.setup import abstract_stages, set_up
from m2mkd_jax.models import chain
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.phases.detection import backbone_network, detector_spec, with_backbone
from tests.e2e import tiny_detect
from tests.random_params import random_params
from tests.shipped import load


@pytest.mark.parametrize(
    ("name", "whole", "transformer"),
    [("vmoe_coco", 507_560_464, 482_553_696), ("vitdet_coco", 110_895_792, 85_889_024)],
)
def test_parameters_of_the_published_detectors(name, whole, transformer):
    """docs/detection.md#sizes; ViTDet-B's has its tables, the published V-MoE has none."""
    config = load(name)
    tables = 8 * 2 * 27 * 64 + 4 * 2 * 127 * 64
    phase = build_phase(config, "detect")
    params = chain.abstract(phase.stages[STAGE].build).params
    extra = tables if name == "vmoe_coco" else 0
    assert chain.count_parameters(params) == whole + extra
    assert chain.count_parameters(params["net"]) == transformer + extra
    backbone = phase.detector.backbone
    assert backbone.square == backbone.table_image_size == 1024
    assert backbone.class_position == (name == "vitdet_coco")


def test_the_published_schedule():
    """docs/detection.md#optimizer, of ViTDet: 184,375 updates, a tenth from 163,889 on."""
    config = load("vmoe_coco")
    recipe, updates = build_phase(config, "detect").recipe, 117_266 // 64
    assert round(recipe.epochs * updates) == 184_375
    rate = learning_rate(recipe, updates)
    steps = [0, 125, 250, 163_888, 163_889, 177_545, 177_546]
    wanted = [1e-7, 0.5005e-4, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6]
    np.testing.assert_allclose([float(rate(step)) for step in steps], wanted, rtol=1e-5)
    config.detection.recipe.batch = 8
    assert build_phase(config, "detect").recipe.lr == pytest.approx(1e-4 / 8)


def test_the_jobs_and_what_they_depend_on():
    config = tiny_detect.get_config()
    config.detection.seeds = 2
    plan = Plan(config)
    detectors = ["detect", "detect/1", "detect_scratch", "detect_scratch/1"]
    assert plan.names == ["e2e_scratch", *detectors, "eval"]
    assert plan.job("detect").needs == ("e2e_scratch",)
    assert plan.job("detect_scratch").needs == ()
    assert plan.job("eval").needs == ("e2e_scratch", *detectors)
    config.detection.data.root, config.detection.evaluation_batch = "elsewhere", 2
    assert Plan(config).job("detect").fingerprint == plan.job("detect").fingerprint
    config.detection.model.channels = 16
    assert Plan(config).job("detect").fingerprint != plan.job("detect").fingerprint


def test_the_transformer_is_that_of_the_network():
    config = tiny_detect.get_config()
    spec = detector_spec(config).backbone
    stages, description = backbone_network(config)
    trees = {
        name: random_params(chain.abstract(stage.build).params, seed=i)
        for i, (name, stage) in enumerate(stages.items())
    }
    shapes = chain.abstract(build_phase(config, "detect").stages[STAGE].build).params
    fresh = random_params(shapes, seed=9)
    found = with_backbone(spec, fresh, description, trees)
    given = {}
    for name, tree in trees.items():
        for entry in name_table(description, name):
            given[entry.torch] = array_at(tree, entry.path)[as_tuple(entry.index)]
    entries = {e.torch.removeprefix("net."): e for e in net_names(spec)}
    for name, entry in entries.items():
        value = array_at(found, entry.path)[as_tuple(entry.index)]
        if "rel_pos" in name:
            np.testing.assert_array_equal(value, array_at(fresh, entry.path)[as_tuple(entry.index)])
        elif name == "pos_embed":
            np.testing.assert_array_equal(value, given[name][:, 1:])
        else:
            np.testing.assert_array_equal(value, given[name])
    assert set(given) - set(entries) == {
        *("cls_token", "norm.weight", "norm.bias", "head.weight", "head.bias")
    }
    for part in ("pyramid", "rpn", "heads"):
        assert found[part] is fresh[part]
    trees["vmoe_0"]["pos_embed"] = trees["vmoe_0"]["pos_embed"][:, :-1]
    with pytest.raises(UserError, match="pos_embed of the network is of shape"):
        with_backbone(spec, fresh, description, trees)


def test_one_step_clips_and_accumulates():
    """Two equal gradients above the norm: one update, that of half the rate's layer decay."""
    config = tiny_detect.get_config()
    phase = build_phase(config, "detect_scratch")
    spec = phase.detector.backbone
    params = {STAGE: {"net": {"pos_embed": jnp.ones((2,))}, "rpn": {"bias": jnp.ones((2,))}}}
    recipe = phase.recipe
    recipe.weight_decay, recipe.warmup_epochs, recipe.milestones = 0.0, 0.0, ()
    step = make_optimizer(recipe, 10, params, spec)
    grads = jax.tree.map(lambda leaf: 100 * leaf, params)
    state = step.init(params)
    first, state = step.update(grads, state, params)
    second, _ = step.update(grads, state, params)
    assert not any(leaf.any() for leaf in jax.tree.leaves(first))
    np.testing.assert_allclose(second[STAGE]["rpn"]["bias"], -recipe.lr, rtol=1e-5)
    scale = recipe.layer_decay ** (spec.depth + 1)
    np.testing.assert_allclose(second[STAGE]["net"]["pos_embed"], -recipe.lr * scale, rtol=1e-5)


def test_decay_rules():
    params = {"net": {"pos_embed": 0, "norm": {"scale": 0}}, "rpn": {"bias": 0}}
    found = {
        rule: jax.tree.leaves(decay_mask(params, rule)) for rule in ("published", "all", "none")
    }
    assert found == {"published": [False, False, True], "all": [True] * 3, "none": [False] * 3}
    with pytest.raises(UserError, match="decay_rule 'al' is unknown"):
        decay_mask(params, "al")


def test_the_transformer_computes_in_bfloat16():
    """Shapes and types alone: strict promotion refuses a float32 that meets a bfloat16."""
    config = tiny_detect.get_config()
    config.precision = "bfloat16"
    phase = build_phase(config, "detect_scratch")
    setup = set_up(config, phase, abstract_stages(phase))
    batch = batch_shapes(phase.data, 2)

    def loss(params, batch):
        return setup.program.loss(params, {}, batch, jax.random.key(0))

    with jax.numpy_dtype_promotion("strict"):
        jaxpr, (value, metrics) = jax.make_jaxpr(loss, return_shape=True)(setup.params, batch)
    assert value.dtype == jnp.float32 and "bf16" in str(jaxpr)
    assert set(metrics) == {
        *("loss", "loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc")
    }


def test_the_gradient_of_a_maximum_goes_to_one_of_equals():
    x = jnp.asarray(np.array([[3.0, 1.0], [3.0, 2.0]], np.float32)).reshape(1, 2, 2, 1)
    value, grad = jax.value_and_grad(lambda x: max_pool(x).sum())(x)
    assert value == 3 and grad.reshape(-1).tolist() == [1, 0, 0, 0]


REFUSED = [
    ({"network": "m2mkd"}, "config.detection.network"),
    ({"data.name": "cocoa"}, 'data.name: "cocoa" is unknown; did you mean "coco"?'),
    ({"data.image_size": 60}, "image_size as a multiple of 32; it is 60"),
    ({"data.train_images": 0}, "digits_scene makes as many scenes as train_images"),
    ({"data.augment.resize": "scale"}, "data.augment.resize"),
    ({"data.augment.resize": "plain"}, "it must hold the edges"),
    ({"data.augment.scale": (2.0, 1.0)}, "the smallest comes first"),
    ({"recipe.optimizer": "sgd"}, "only adamw"),
    ({"recipe.epochs": 0.0}, "detection.recipe.epochs is 0.0"),
    ({"recipe.warmup_epochs": 9.0}, "of 3.0 epochs"),
    ({"recipe.milestones": (2.0, 1.0)}, "they must rise"),
    ({"recipe.batch": 3}, "a multiple of 2"),
    ({"recipe.layer_rule": "stage"}, 'layer_rule: "stage" is unknown'),
    ({"recipe.decay_rule": "most"}, 'decay_rule: "most" is unknown'),
    ({"recipe.drop_path": 1.0}, "must be below 1"),
    ({"model.window": 0, "model.global_blocks": (1,)}, "global_blocks is (1,) and window is 0"),
    ({"model.global_blocks": (7,)}, "there are 2 blocks"),
]


@pytest.mark.parametrize(("changes", "line"), REFUSED)
def test_what_cannot_run_is_refused(changes, line):
    config = tiny_detect.get_config()
    for key, value in changes.items():
        *groups, last = key.split(".")
        section = config.detection
        for group in groups:
            section = section[group]
        section[last] = value
    with pytest.raises(UserError) as error:
        checks.check_config(config)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_patch_that_is_not_16_is_refused():
    config = tiny_detect.get_config()
    config.vmoe.patch = 8
    with pytest.raises(UserError, match=r"config.detection.model.*patch of 8"):
        checks.check_config(config)


def test_groups_that_share_slots_must_fit_the_devices():
    """Of the images of a step, which are two parts of a batch of 8: 4."""
    config = tiny_detect.get_config()
    config.vmoe.dispatch, config.detection.recipe.batch = "capacity", 8
    for group, devices in ((0, 4), (1, 4), (2, 2), (4, 1), (16, 1)):
        config.vmoe.group_images = group
        checks.check_config(config, devices)
    for dispatch, router in (("capacity", "published"), ("dropless", "expert_choice")):
        config.vmoe.update(dispatch=dispatch, router=router, group_images=2)
        with pytest.raises(UserError) as error:
            checks.check_config(config, devices=4)
        assert str(error.value) == (
            "config.detection.recipe: moe: a batch of 4 images cannot be cut into groups of 2 "
            "images on 4 device(s); change the batch size or vmoe.group_images"
        )
