"""The experiments: every arm can run, and the table says what the directories hold."""

import ast
import dataclasses
import json

import pytest

from experiments.fashion import results, run
from experiments.fashion.arms import ARMS, Compute, arms_of
from m2mkd_jax.config.files import read_config
from m2mkd_jax.evaluate.intervals import interval
from m2mkd_jax.jobs.checks import validate
from m2mkd_jax.report.records import JobRecord


@dataclasses.dataclass
class JobsOf:
    """A run's record without jobs."""

    config: dict
    jobs: dict = dataclasses.field(default_factory=dict)


COMPUTE = Compute(teachers=3e12, students=4e12, network=1e12)


@pytest.mark.parametrize("family", ["vmoe", "nac"])
def test_every_arm_is_a_config_that_can_run(family, tmp_path):
    config = read_config(run.HERE / f"{family}.py")
    (tmp_path / "config.json").write_text(config.to_json_best_effort())
    for arm in run._chosen("", family):
        changed = config.copy_and_resolve_references()
        for flag in run._changes(arm, COMPUTE, tmp_path):
            key, _, value = flag.removeprefix("--config.").partition("=")
            with changed.unlocked():
                changed.update_from_flattened_dict({key: _literal(value)})
        plan = validate(changed)
        assert "eval" in plan.names and arm.phase in plan.names, arm.name


@pytest.mark.parametrize("family", ["vmoe", "nac"])
def test_an_arm_is_in_the_table_once(family, tmp_path, monkeypatch):
    home = tmp_path / family
    for directory in ("base", *arms_of(family)):
        (home / directory).mkdir(parents=True)
        (home / directory / "config.json").write_text("{}")
    named = []

    def row(run, phase, title, name, scratch):
        named.append(name)
        return {"name": name, "seconds": 0, "accuracy": {"values": []}}

    monkeypatch.setattr(results, "read_run", lambda path: JobsOf({}))
    monkeypatch.setattr(results, "_by_seed", lambda run, phase: {})
    monkeypatch.setattr(results, "_row", row)
    monkeypatch.setattr(results, "compute", lambda base: COMPUTE)
    monkeypatch.setattr(results, "_lines", lambda found: [])
    results.write(home)
    arms = [name for name in named if name]
    assert sorted(arms) == sorted(arms_of(family))


def _literal(value):
    try:
        return ast.literal_eval(value)
    except ValueError:
        return value


def test_scratch_trains_for_the_compute_of_teaching():
    epochs = {arm.name: COMPUTE.epochs(4.0, arm.charged(COMPUTE)) for arm in ARMS if arm.charged}
    # 4 epochs are 1 TFLOP: 4 more TFLOP for the students, 7 with the teacher's phases.
    assert epochs == {"scratch_students": 20, "scratch_all": 32, "taught_long": 20}


def test_accuracy_within_a_share_of_the_budget():
    def job(*values):
        entries = tuple({"step": 4 * (i + 1), "eval_accuracy": v} for i, v in enumerate(values))
        return JobRecord("e2e", "done", {"steps": 16}, entries)

    jobs = [job(0.1, 0.2, 0.3, 0.4), job(0.3, 0.4, 0.5, 0.6)]
    assert results._at(jobs, 1 / 2) == pytest.approx((0.2 + 0.4) / 2)
    assert results._at(jobs, 1 / 4) == pytest.approx((0.1 + 0.3) / 2)
    assert results._at(jobs, 1 / 16) is None


def test_an_unknown_arm_is_one_line(capsys):
    assert run.main(["vmoe", "--arms=alpha_2"]) == 2
    assert 'no arm "alpha_2"; known: scratch_students' in capsys.readouterr().err


def test_the_table():
    row = {
        "title": "m2mKD",
        "epochs": 4.0,
        "at": {"0.25": 0.5, "0.5": None},
        "accuracy": interval([0.7, 0.8]),
        "gap": interval([0.1]),
    }
    found = {"meta": 0.9, "teacher": None, "compute": {"network": 2e12}, "rows": [row]}
    text = "\n".join(results._lines(json.loads(json.dumps(found))))
    # The 97.5% quantile of Student's t with one degree of freedom is 12.706.
    assert "| m2mKD | 4 | 2 | 0.5000 |  | 0.7500 ± 0.6353 | +0.1000 |" in text
    assert "network 2 T" in text
