"""Configs: every shipped one passes its checks; what cannot run is refused in one line."""

import importlib.util
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import module_recipe
from m2mkd_jax.config.presets import NAC_PRIORS
from m2mkd_jax.config.values import check_values
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import checks
from m2mkd_jax.jobs.plan import Plan
from m2mkd_jax.models import chain
from m2mkd_jax.phases.build import build_phase
from tests.support import facts

ROOT = Path(__file__).resolve().parents[3]
FILES = sorted((ROOT / "configs").glob("*.py"))


def load(file: Path, *argument) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(*argument)


def digits() -> ConfigDict:
    return load(ROOT / "configs" / "nac_digits.py")


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_shipped_configs(file):
    config = load(file)
    checks.check_config(config)
    for job in Plan(config).names:
        if job != "eval":
            phase = build_phase(config, job)
            assert phase.student and set(phase.trainable) <= set(phase.student)


@pytest.mark.parametrize("prior", NAC_PRIORS)
@pytest.mark.parametrize("name", ["nac_tinyimnet", "nac_imnet"])
def test_priors(name, prior):
    config = load(ROOT / "configs" / f"{name}.py", prior)
    checks.check_config(config)
    kind = "stochastic_block" if prior == "planted" else "hinge"
    assert config.regulariser.kind == kind


def test_the_papers_jobs():
    config = load(ROOT / "configs" / "nac_tinyimnet.py")
    ten = range(10)
    expected = ["pt", *(f"mt/{i}" for i in ten), "ft", *(f"m2mkd/{i}" for i in ten), "e2e", "eval"]
    assert Plan(config).names == expected
    assert Plan(config).select("m2mkd/3") == ["m2mkd/3"]
    assert Plan(config).select("e2e,mt") == [*(f"mt/{i}" for i in ten), "e2e"]


@pytest.mark.parametrize(
    ("job", "parameters"),
    [
        ("pt", 199_103_720),
        ("ft", 631_922_920),
        ("e2e", 26_703_342),
        ("m2mkd/0", 4_093_286),
        ("m2mkd/4", 3_496_070),
        ("m2mkd/9", 3_389_423),
    ],
)
def test_parameters_of_the_papers_jobs(job, parameters):
    """Reference section 9; the students are taught at 224 px, so their grid is 28x28."""
    phase = build_phase(load(ROOT / "configs" / "nac_tinyimnet.py"), job)
    counts = [chain.count_parameters(chain.abstract(phase.stages[n].build).params) for n in phase.trainable]
    assert sum(counts) == parameters


@pytest.mark.parametrize(
    ("job", "parameters", "stitches"),
    [
        ("pt", 52_402_152, False),
        ("ft", 304_326_632, False),
        ("m2mkd/0", 121_984_792, False),
        ("m2mkd/1", 122_031_384, False),
        ("m2mkd/3", 122_012_928, False),
        ("e2e", 483_325_768, False),
        ("e2e", 488_060_488, True),
    ],
)
def test_parameters_of_the_papers_vmoe(job, parameters, stitches):
    """Reference section 9."""
    config = load(ROOT / "configs" / "vmoe_imnet.py")
    config.vmoe.keep_stitches = stitches
    phase = build_phase(config, job)
    counts = [chain.count_parameters(chain.abstract(phase.stages[n].build).params) for n in phase.trainable]
    assert sum(counts) == parameters


RECIPES = {"pt": "PT", "mt": "MT", "ft": "FT", "m2mkd": "m2mKD", "e2e": "nacs_e2e_tinyimnet"}


@pytest.mark.parametrize("phase", RECIPES)
@pytest.mark.parametrize("name", ["nac_tinyimnet", "nac_imnet"])
def test_published_learning_rates(name, phase):
    """Scaled rates, warmup and epochs of the config equal those recorded from the original."""
    recipe = module_recipe(load(ROOT / "configs" / f"{name}.py"), phase)
    title = RECIPES[phase].replace("tinyimnet", name.removeprefix("nac_"))
    recorded = facts("i_optim/lr_schedules.json")[title]
    assert recipe.lr == pytest.approx(recorded["scaled_lr"])
    assert recipe.min_lr == pytest.approx(recorded["min_lr"])
    assert recipe.warmup_lr == pytest.approx(recorded["warmup_lr"])
    assert recipe.epochs == recorded["epochs"]
    assert recipe.warmup_epochs == recorded["warmup_epochs"]
    batch = recorded["world"] * recorded["batch_size"] * recorded.get("update_freq", 1)
    assert recipe.batch == batch
    assert recipe.accumulate == recorded.get("update_freq", 1)


def test_module_recipes_override():
    config = digits()
    config.recipes.mt.modules = {"0": {"epochs": 99}}
    assert module_recipe(config, "mt", 0).epochs == 99
    assert module_recipe(config, "mt", 1).epochs == config.recipes.mt.epochs


def change(key, value):
    def apply(config):
        with config.unlocked(), config.ignore_type():
            node = config
            *path, last = key.split(".")
            for name in path:
                node = node[name]
            node[last] = value

    return apply


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (change("data.imagesize", 3), 'did you mean "data.image_size"'),
        (change("data", "digits"), "config.data is a group of keys"),
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
        (change("recipes.mt.modules", {"0": {"epoch": 1}}), 'did you mean "epochs"'),
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
    config = load(ROOT / "configs" / "vmoe_digits.py")
    changed(config)
    with pytest.raises(UserError) as error:
        checks.check_config(config)
    assert says in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("teacher.depths", (2, "a", 2, 2, 2, 2)),
        ("teacher.depths", (0, 2, 2, 2, 2, 2)),
        ("data.mean", (0.5, 0.5)),
        ("data.std", (0.0, 1.0, 1.0)),
        ("data.workers", -9),
        ("recipes.e2e.lr", -1.0),
        ("recipes.e2e.lr", float("nan")),
        ("recipes.e2e.mixup", -1.0),
        ("recipes.e2e.smoothing", 2.0),
        ("recipes.e2e.mix_prob", 7.0),
        ("recipes.e2e.weight_decay", -1.0),
        ("recipes.e2e.drop_path", 1.0),
        ("recipes.e2e.ema", 1.5),
        ("recipes.e2e.clip", -1.0),
        ("recipes.mt.modules", {"0": {"lr": "fast"}}),
        ("recipes.mt.modules", {"0": 3}),
        ("distillation.alpha", 3.0),
        ("distillation.temperature", 0.0),
        ("evaluation.batch", 0),
        ("evaluation.every", -1.0),
        ("log_every", 0),
        ("e2e_seeds", 0),
        ("seed", -1),
        ("seed", 2**32),
        ("nac.kernel_temperature", 0.0),
        ("nac.head_dim", 0),
        ("nac.position_dim", 0),
        ("nac.truncation", -0.5),
        ("regulariser.components", 0),
        ("regulariser.weight", -1.0),
        ("phases", ()),
    ],
)
def test_impossible_values_are_refused(key, value):
    """One line naming the key; the e2e phase of a run would meet them after hours."""
    config = digits()
    change(key, value)(config)
    with pytest.raises(UserError) as error:
        checks.check_config(config)
    assert f"config.{key}" in str(error.value) and "\n" not in str(error.value)


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


def test_a_config_without_a_key_is_refused():
    config = ConfigDict({k: v for k, v in digits().items() if k != "mesh"})
    with pytest.raises(UserError, match=r"config\.mesh\.data is missing"):
        check_values(config)


def test_only_commas_name_no_job():
    config = load(ROOT / "configs" / "nac_tinyimnet.py")
    assert Plan(config).select("pt, ft") == ["pt", "ft"]
    with pytest.raises(UserError, match="names no job"):
        Plan(config).select(",")


def test_upcycling_and_stitches_exclude_each_other():
    config = load(ROOT / "configs" / "vmoe_fashion.py")
    config.vmoe.keep_stitches = True
    with pytest.raises(UserError, match="has no stitches"):
        checks.check_config(config)


def test_depths_of_a_variant_must_sum():
    config = load(ROOT / "configs" / "nac_tinyimnet.py")
    config.teacher.depths = (3, 3, 3, 3, 3, 3, 3, 3, 3, 2)
    with pytest.raises(UserError, match="sum to 29; vit_huge_patch14_224 has 32"):
        checks.check_config(config)


def test_kd_needs_a_teacher_of_the_same_task():
    config = load(ROOT / "configs" / "nac_tinyimnet.py")
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


@pytest.mark.parametrize("name", ["vmoe_digits", "vmoe_fashion"])
def test_the_small_vmoe_runs_on_up_to_eight_devices(name):
    """As `launch/local.sh --help` and the README show it."""
    for devices in (1, 2, 4, 8):
        checks.check_config(load(ROOT / "configs" / f"{name}.py"), devices)


def test_truncation_may_be_none():
    config = digits()
    change("nac.truncation", None)(config)
    checks.check_config(config)
