"""Weights meet the data that they were trained on: the same normalisation, the same classes."""

import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import checks
from m2mkd_jax.jobs.data_checks import check_classes, check_normalisation
from m2mkd_jax.jobs.plan import Plan
from m2mkd_jax.phases.build import build_phase
from tests.e2e import tiny, tiny_vmoe
from tests.unit.jobs.combinations import few_shot, install

DIGITS = list("0123456789")
SWAPPED, OTHERS = list("0132456789"), [*"012345678", "ten"]
HALF = {"mean": [0.5] * 3, "std": [0.25] * 3}
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
# What of config.init stands for which job's weights, and a job that begins with them.
STARTS = [
    ("meta", "pt", "mt/0"),
    ("teacher", "ft", "m2mkd/0"),
    ("teacher", "ft", "e2e_kd"),
    ("network", "e2e", "e2e"),
    ("network", "e2e", "eval"),
    ("students", "m2mkd/2", "e2e"),
]


@pytest.fixture
def given(monkeypatch, tmp_path):
    """(field of config.init, job, job that begins with it, facts) -> that run, and its directory.

    `facts` are put into the description of the weights.
    """
    memory = install(monkeypatch)

    def make(field, made, used, **facts):
        config = tiny.get_config()
        for job in [f"m2mkd/{i}" for i in range(3)] if field == "students" else [made]:
            memory.finish(tmp_path / "given", build_phase(config, job))
            name = str(tmp_path / "given" / "jobs" / job / "weights")
            if job == made:
                memory.weights[name].description.update({"job": job, **facts})
        config.init[field] = str(tmp_path / "given")
        if used == "eval":
            config.phases = ("eval",)
        return Plan(config), tmp_path / "run", ["pt", used] if field == "teacher" else [used]

    return make


@pytest.mark.parametrize(("field", "made", "used"), STARTS)
def test_another_normalisation_is_refused_with_both_values_and_the_key(field, made, used, given):
    check_normalisation(*given(field, made, used, normalisation=IMAGENET))
    check_normalisation(*given(field, made, used))  # which record none
    with pytest.raises(UserError) as error:
        check_normalisation(*given(field, made, used, normalisation=IMAGENET | {"std": [0.5] * 3}))
    said = str(error.value)
    assert said.startswith("config.data.std is (0.229, 0.224, 0.225) and the weights in ")
    assert said.endswith("record std (0.5, 0.5, 0.5): set config.data.std=(0.5, 0.5, 0.5)")


def test_images_that_are_turned_otherwise_than_those_of_training_are_refused(given):
    for made, used in ((True, False), (False, True)):
        plan, workdir, todo = given("network", "e2e", "eval", orientation=made)
        plan.config.data.orientation = made
        check_normalisation(plan, workdir, todo)
        plan, workdir, todo = given("network", "e2e", "eval", orientation=made)
        plan.config.data.orientation = used
        with pytest.raises(UserError, match=rf"orientation is {used} and .* orientation {made}: s"):
            check_normalisation(plan, workdir, todo)
    # Converted weights do not record it, and who trains on may change it.
    for field, used, facts in (("network", "eval", {"job": ""}), ("network", "e2e", {})):
        plan, workdir, todo = given(field, "e2e", used, **facts)
        plan.config.data.orientation = True
        check_normalisation(plan, workdir, todo)


def test_the_normalisation_is_looked_at_before_any_work(given):
    with pytest.raises(UserError, match=r"config\.data\.mean is"):
        checks.check_weights(*given("network", "e2e", "eval", normalisation=HALF))


def test_converted_weights_can_be_converted_again(given):
    with pytest.raises(UserError, match="or convert with the right --mean and --std"):
        check_normalisation(*given("network", "e2e", "eval", normalisation=HALF, job=""))


def test_episodes_are_normalised_as_their_network_was(tmp_path):
    config = tiny_vmoe.get_config()
    config.phases = ("e2e_scratch", "fewshot")
    config.few_shot.network = "e2e_scratch"
    few_shot(config)
    todo = ["e2e_scratch", "fewshot"]
    check_normalisation(Plan(config), tmp_path, todo)
    config.data.orientation = True
    with pytest.raises(UserError, match=r"few_shot\.data\.orientation is False and e2e_scratch is"):
        check_normalisation(Plan(config), tmp_path, todo)
    config.data.orientation, config.data.mean = False, (0.5, 0.5, 0.5)
    with pytest.raises(UserError) as error:
        check_normalisation(Plan(config), tmp_path, todo)
    assert str(error.value) == (
        "config.few_shot.data.mean is (0.485, 0.456, 0.406) and e2e_scratch is trained with "
        "config.data mean (0.5, 0.5, 0.5): set config.few_shot.data.mean=(0.5, 0.5, 0.5)"
    )


@pytest.mark.parametrize(("field", "made", "used"), STARTS)
def test_other_classes_are_refused_with_the_first_that_differs(field, made, used, given):
    check_classes(*given(field, made, used, class_names=DIGITS))
    check_classes(*given(field, made, used))  # which have no names
    numbered = [f"{i:06d}" for i in range(10)]  # of shards without names
    check_classes(*given(field, made, used, class_names=numbered))
    with pytest.raises(UserError) as error:
        check_classes(*given(field, made, used, class_names=SWAPPED))
    said = str(error.value)
    assert said.startswith(
        'config.data has the same classes in another order: class 2 is "2", and "3" in the weights'
    )
    others = given(field, made, used, class_names=OTHERS)
    if field == "students":  # whose head is only a start
        check_classes(*others)
        return
    with pytest.raises(UserError, match='has other classes: class 9 is "9", and "ten" in the'):
        check_classes(*others)


def test_a_head_that_is_replaced_has_any_classes(given):
    plan, workdir, _ = given("network", "e2e", "e2e", class_names=SWAPPED)
    plan.config.phases = ("fewshot",)
    plan.config.few_shot.network = "e2e"
    few_shot(plan.config)
    check_classes(Plan(plan.config), workdir, ["fewshot"])
