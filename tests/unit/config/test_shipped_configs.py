"""Shipped configs: each passes its checks, and the paper's have its jobs, sizes and recipes."""

import ast

import pytest

from m2mkd_jax.config.defaults import module_recipe
from m2mkd_jax.config.files import shipped_configs
from m2mkd_jax.config.presets import NAC_PRIORS
from m2mkd_jax.jobs import checks
from m2mkd_jax.jobs.plan import Plan
from m2mkd_jax.models import chain
from m2mkd_jax.phases.build import build_phase
from tests.shipped import ROOT, digits, load
from tests.support import facts

HEAD = ["Command", "Hardware", "Time", "Result"]


def test_the_shipped_ones_are_the_files_of_the_folder():
    assert sorted(shipped_configs()) == sorted(p.stem for p in (ROOT / "configs").glob("*.py"))


@pytest.mark.parametrize("name", shipped_configs())
def test_the_head_of_a_config_says_command_hardware_time_and_result(name):
    head = ast.get_docstring(ast.parse(shipped_configs()[name].read_text())) or ""
    words = [line.partition(":")[0] for line in head.splitlines()]
    assert [w for w in words if w in HEAD] == HEAD
    assert f"--config=configs/{name}.py" in head


@pytest.mark.parametrize("name", shipped_configs())
def test_shipped_configs_pass_their_checks(name):
    config = load(name)
    checks.check_config(config)
    for job in Plan(config).names:
        if job != "eval":
            phase = build_phase(config, job)
            assert phase.student and set(phase.trainable) <= set(phase.student)


@pytest.mark.parametrize("prior", NAC_PRIORS)
@pytest.mark.parametrize("name", ["nac_tinyimnet", "nac_imnet"])
def test_priors(name, prior):
    config = load(name, prior)
    checks.check_config(config)
    kind = "stochastic_block" if prior == "planted" else "hinge"
    assert config.regulariser.kind == kind


def test_the_papers_jobs():
    config = load("nac_tinyimnet")
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
    """docs/reference.md#sizes; the students are taught at 224 px, so their grid is 28x28."""
    phase = build_phase(load("nac_tinyimnet"), job)
    trained = [chain.abstract(phase.stages[name].build).params for name in phase.trainable]
    assert sum(map(chain.count_parameters, trained)) == parameters


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
    """docs/reference.md#sizes."""
    config = load("vmoe_imnet")
    config.vmoe.keep_stitches = stitches
    phase = build_phase(config, job)
    trained = [chain.abstract(phase.stages[name].build).params for name in phase.trainable]
    assert sum(map(chain.count_parameters, trained)) == parameters


RECIPES = {"pt": "PT", "mt": "MT", "ft": "FT", "m2mkd": "m2mKD", "e2e": "nacs_e2e_tinyimnet"}


@pytest.mark.parametrize("phase", RECIPES)
@pytest.mark.parametrize("name", ["nac_tinyimnet", "nac_imnet"])
def test_published_learning_rates(name, phase):
    """Scaled rates, warmup and epochs of the config equal those recorded from the original."""
    recipe = module_recipe(load(name), phase)
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


@pytest.mark.parametrize("name", ["vmoe_digits", "vmoe_fashion"])
def test_the_small_vmoe_runs_on_up_to_eight_devices(name):
    """As `launch/local.sh --help` and the README show it."""
    for devices in (1, 2, 4, 8):
        checks.check_config(load(name), devices)
