"""Configs whose keys do not fit together are refused in one line, before any work."""

import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import checks, shape_checks
from m2mkd_jax.jobs.plan import Plan
from m2mkd_jax.train.loop import Preempted
from tests.e2e import tiny
from tests.shipped import change, digits, load


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (change("phases", ()), "config.phases is empty"),
        (change("data.imagesize", 3), 'did you mean "data.image_size"'),
        (change("data", "digits"), "config.data is a group of keys"),
        (change("data.mean", (123.675, 116.28, 103.53)), "its entries must be numbers from 0 to 1"),
        (change("data.std", (58.4, 57.1, 57.4)), "its entries must be numbers above 0, up to 1"),
        (change("recipes.pt.batch", 0), "config.recipes.pt.batch is 0; it must be above 0"),
        (change("recipes.pt.stop_within", 0.1), "only mt and m2mkd have a reference"),
        (change("recipes.mt.stop_within", 0.1), "config.evaluation.every epochs, which is 0"),
        (change("recipes.e2e.load_weight", 0.1), "a NAC has none"),
        (change("recipes.pt.accumulate", 3), "multiple of 3"),
        (change("recipes.pt.epochs", 0), "config.recipes.pt.epochs"),
        (change("recipes.pt.warmup_epochs", 99), "config.recipes.pt.warmup_epochs"),
        (change("recipes.pt.schedule", "clena"), 'did you mean "clean"'),
        (change("recipes.pt.modules", {"0": {"epochs": 1}}), "pt has no modules"),
        (change("recipes.mt.modules", {"6": {"epochs": 1}}), "0 to 5"),
        # None of these is the number that a module is looked up by.
        (change("recipes.mt.modules", {"01": {"epochs": 1}}), "0 to 5"),
        (change("recipes.mt.modules", {"\u0663": {"epochs": 1}}), "0 to 5"),
        (change("recipes.mt.modules", {"\u00b2": {"epochs": 1}}), "0 to 5"),
        (change("recipes.mt.modules", {"0": {"epoch": 1}}), 'did you mean "epochs"'),
        (
            change("recipes.mt.modules", {"0": {"lr": "fast"}}),
            "recipes.mt.modules.0.lr must be float",
        ),
        (change("recipes.mt.modules", {"0": {"modules": {}}}), "mt.modules.0.modules is unknown"),
        (change("recipes.mt.modules", {"0": 3}), "recipes.mt.modules.0 is 3"),
        (change("recipes.mt.lr", "fast"), "config.recipes.mt.lr must be float"),
        (change("phases", ("pt", "e2ee")), 'did you mean "e2e"'),
        (change("distillation.kind", "sofd"), 'did you mean "soft"'),
        (change("teacher.variant", "vit_hueg_patch14_224"), "vit_huge_patch14_224"),
        (change("teacher.meta_depths", (1, 1)), "meta_depths"),
        (change("teacher.depths", (2, 2)), "needs 6"),
        (change("teacher.heads", 7), "multiple of the 7 heads"),
        (change("nac.iterations", 3), "needs 5"),
        (change("nac.stitch_dim", 1024), "meta model's width 64"),
        (change("nac.options", {"m": 2, "n": 7}), "prior"),
        (change("nac.share_ffn", True), "share_ffn"),
        (change("nac.pooling", "gumble"), "pooling"),
        (change("nac.truncation", "far"), "config.nac.truncation"),
        (change("data.image_size", 36), "36"),
        (change("distillation.views", -1), "config.distillation.views"),
        (change("evaluation.corruptions", ("blurr",)), 'did you mean "blur"'),
        (change("trackers", ("tensorbord",)), 'config.trackers: "tensorbord" is unknown'),
    ],
)
def test_what_cannot_run_is_refused(changed, says):
    config = digits()
    changed(config)
    with pytest.raises(UserError) as error:
        checks.check_config(config)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (change("family", "vmeo"), 'did you mean "vmoe"'),
        (change("vmoe.depths", (2, 2)), "needs 2"),
        (change("vmoe.depths", (4,)), "at least two modules"),
        (change("vmoe.moe_pos", (0, 4)), "blocks are 0 to 3"),
        (change("vmoe.router", "publisht"), "publisht"),
        (change("vmoe.dispatch", "droples"), "droples"),
        (change("vmoe.top_k", 5), "top"),
        (change("vmoe.heads", 7), "multiple of the 7 heads"),
        (change("mesh.expert", 3), "must divide the 4 experts"),
        (change("regulariser.kind", "hinge"), "has no graph"),
        (change("phases", ("pt", "mt", "ft", "e2e_upcycled")), "the teacher is 64 wide"),
    ],
)
def test_a_vmoe_that_cannot_run_is_refused(changed, says):
    config = load("vmoe_digits")
    changed(config)
    with pytest.raises(UserError) as error:
        checks.check_config(config)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_stochastic_block_needs_equal_clusters():
    config = digits()
    config.regulariser.kind, config.regulariser.clusters = "stochastic_block", 5
    with pytest.raises(UserError, match="cannot be split into 5 equal clusters"):
        checks.check_config(config)


def test_a_mixture_needs_as_many_distances_as_components():
    config = digits()
    config.regulariser.kind, config.regulariser.components = "gaussian_mixture", 496
    checks.check_config(config)  # 8 + 16 + 8 latents have 32 * 31 / 2 pairs
    config.regulariser.components = 497
    with pytest.raises(UserError, match="only 496 distances"):
        checks.check_config(config)


def test_only_commas_name_no_job():
    config = load("nac_tinyimnet")
    assert Plan(config).select("pt, ft") == ["pt", "ft"]
    with pytest.raises(UserError, match="names no job"):
        Plan(config).select(",")


def test_upcycling_and_stitches_exclude_each_other():
    config = load("vmoe_fashion")
    config.vmoe.keep_stitches = True
    with pytest.raises(UserError, match="has no stitches"):
        checks.check_config(config)


def test_depths_of_a_variant_must_sum():
    config = load("nac_tinyimnet")
    config.teacher.depths = (3, 3, 3, 3, 3, 3, 3, 3, 3, 2)
    with pytest.raises(UserError, match="sum to 29; vit_huge_patch14_224 has 32"):
        checks.check_config(config)


def test_kd_needs_a_teacher_of_the_same_task():
    config = load("nac_tinyimnet")
    config.phases = (*config.phases, "e2e_kd")
    with pytest.raises(UserError, match="1000 classes at 224 px"):
        checks.check_config(config)


def test_stopping_at_the_meta_model_needs_its_accuracy():
    config = digits()
    config.recipes.mt.stop_within, config.evaluation.every = 0.1, 1.0
    checks.check_config(config)
    config.init.meta = "somewhere"
    with pytest.raises(UserError, match=r"config\.init\.meta makes unnecessary"):
        checks.check_config(config)


def test_the_batch_must_be_cut_over_the_devices():
    with pytest.raises(UserError, match="multiple of 8"):
        checks.check_config(digits(), devices=8)


def test_what_is_measured_must_fit_the_devices():
    config = load("vmoe_digits")
    config.vmoe.experts, config.vmoe.top_k, config.evaluation.reductions = 8, 2, True
    config.recipes.m2mkd.modules = {}
    for data, expert, devices in ((-1, 4, 4), (1, -1, 4), (2, -1, 8)):
        config.mesh.data, config.mesh.expert = data, expert
        with pytest.raises(UserError, match=r"leaves 2 of 8 experts, .* over the 4 devices"):
            checks.check_config(config, devices=devices)
    config.mesh.data, config.mesh.expert = -1, 2
    checks.check_config(config, devices=4)
    # Evaluation's batches are filled up to a multiple of the devices, but not where each has noise
    # of its own.
    config.evaluation.batch = 90
    checks.check_config(config, devices=4)
    config.evaluation.sampled = True
    with pytest.raises(UserError, match=r"config\.evaluation\.batch is 90; .* the 4 devices"):
        checks.check_config(config, devices=4)


KEPT = [
    ("recipes.m2mkd.mixup", 0.8, "recipes.m2mkd.mixup=0"),
    ("recipes.m2mkd.modules", {"1": {"cutmix": 1.0}}, "recipes.m2mkd.cutmix=0"),
    ("data.augment.erase", 0.25, "data.augment.erase=0"),
    ("data.repeated_augmentation", 3, "data.repeated_augmentation=1"),
    ("distillation.kind", "none", 'distillation.kind="soft"'),
]


@pytest.mark.parametrize(("key", "value", "says"), KEPT)
def test_targets_are_kept_of_images_as_they_are_alone(key, value, says):
    config = digits()
    config.distillation.views = 2
    checks.check_config(config)
    change(key, value)(config)
    with pytest.raises(UserError) as error:
        checks.check_config(config)
    assert f"set {says}, or distillation.keep_targets=False" in str(error.value)
    if key != "distillation.kind":
        config.distillation.keep_targets = False
        checks.check_config(config)


def test_networks_that_are_measured_are_jobs_of_the_run():
    config = digits()
    config.evaluation.networks = ("pt", "m2mkd/3", "e2e")
    assert Plan(config).job("eval").needs == ("pt", "m2mkd/3", "e2e")
    config.evaluation.networks = ("m2mkd/9",)
    with pytest.raises(UserError, match=r"config.evaluation.networks: no job .m2mkd/9."):
        checks.validate(config)


@pytest.mark.parametrize("name", ["_abstract", "output"])
def test_a_signal_while_networks_are_looked_at_is_no_wrong_config(name, monkeypatch):
    """The exit code is 3 then, not 2: a launcher starts the run again."""

    def stopped(*_):
        raise Preempted("stopped by a signal")

    monkeypatch.setattr(shape_checks, name, stopped)
    with pytest.raises(Preempted):
        shape_checks.check_shapes(Plan(tiny.get_config()))
