"""Which teacher module a student of m2mkd imitates."""

import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs.checks import check_config
from m2mkd_jax.jobs.plan import Plan
from m2mkd_jax.phases.build import build_phase
from tests.e2e.tiny import get_config


def test_by_default_the_fine_tuned_module_of_the_same_place():
    config = get_config()
    phase = build_phase(config, "m2mkd/1")
    assert phase.teacher == ("meta_0", "module_1", "meta_2")
    assert phase.needs == ("pt", "ft") and phase.job == "m2mkd/1"
    assert phase.recipe.epochs == config.recipes.m2mkd.modules["1"].epochs
    # Runs of before these options were there keep their fingerprints.
    assert not {"teach_from", "teacher_of"} & set(phase.depends_on["distillation"])


def test_modules_as_they_were_before_fine_tuning():
    config = get_config()
    config.distillation.teach_from = "mt"
    phase = build_phase(config, "m2mkd/1")
    assert phase.teacher == ("meta_0", "module_1", "meta_2")
    assert phase.stages["module_1"].weights.job == "mt/1"
    assert phase.needs == ("pt", "mt/1") and phase.job == "m2mkd/1"
    assert Plan(config).job("m2mkd/1").fingerprint != Plan(get_config()).job("m2mkd/1").fingerprint


def test_another_module_in_the_place_of_its_own():
    config = get_config()
    config.teacher.depths, config.nac.iterations = (1, 2, 2, 1), 2
    config.distillation.teacher_of = (0, 2, 1, 3)
    check_config(config)
    phase = build_phase(config, "m2mkd/1")
    assert phase.teacher == ("meta_0", "module_2", "meta_2", "meta_3")
    assert phase.student == ("meta_0", "student_1", "meta_2", "meta_3")
    assert (phase.stages["module_2"].weights.job, phase.stages["module_2"].weights.tree) == (
        "ft",
        "module_2",
    )
    same = get_config()
    same.teacher.depths, same.nac.iterations = (1, 2, 2, 1), 2
    # The students at the ends are taught as ever, and need not be taught again.
    for name, equal in (("m2mkd/0", True), ("m2mkd/1", False)):
        ours, theirs = Plan(config).job(name), Plan(same).job(name)
        assert (ours.inputs == theirs.inputs) is equal, name


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teach_from": "pt"}, 'distillation.teach_from: "pt" is unknown'),
        ({"teacher_of": (0, 1)}, "there are 3 students"),
        ({"teacher_of": (0, 3, 2)}, "teacher modules are 0 to 2"),
        ({"teacher_of": (1, 0, 2)}, "the first module alone takes images"),
        ({"teacher_of": (0, 0, 2)}, "the first module alone takes images"),
    ],
)
def test_what_cannot_teach_is_refused(changes, message):
    config = get_config()
    config.distillation.update(changes)
    with pytest.raises(UserError, match=message):
        check_config(config)


def test_a_given_teacher_has_no_modules_of_before():
    config = get_config()
    config.init.teacher = "somewhere"
    config.distillation.teach_from = "mt"
    with pytest.raises(UserError, match="teach_from"):
        check_config(config)
