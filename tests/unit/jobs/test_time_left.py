"""The time that is left of a run: fitted to finished jobs, and what jobs cost."""

import json

import pytest

from m2mkd_jax.checkpoint.files import write_record
from m2mkd_jax.jobs import time_left
from m2mkd_jax.jobs.dry_run import job_costs, planned_mesh
from m2mkd_jax.jobs.plan import Plan
from m2mkd_jax.jobs.time_left import REPEATED, Cost, TimeLeft
from m2mkd_jax.phases.build import build_phase
from tests.unit.report.runs import config as tiny_config

COSTS = {
    "pt": Cost(10.0, 100, "pt"),
    "ft": Cost(20.0, 100, "pt"),
    "m2mkd/0": Cost(2.0, 50, 0),
    "m2mkd/1": Cost(4.0, 150, 1),
    "e2e": Cost(5.0, 300, "e2e"),
    "e2e/1": Cost(5.0, 300, "e2e"),
    "eval": Cost(0.0, 100, "eval"),
}


def finished(workdir, name, seconds, *entries, **more):
    path = workdir / "jobs" / name / "done.json"
    path.parent.mkdir(parents=True)
    write_record(path, {"name": name, "seconds": seconds, "metrics": {}, **more})
    lines = [{"step": step, "seconds_per_step": pace} for step, pace in entries]
    lines.append({"step": 2, "eval_accuracy": 0.5})
    (path.parent / "metrics.jsonl").write_text("".join(f"{json.dumps(n)}\n" for n in lines))


def test_time_left_is_fitted_to_finished_jobs(tmp_path):
    left = TimeLeft(
        list(COSTS), COSTS.__getitem__, tmp_path, lambda name: name.startswith("m2mkd/")
    )
    assert left.seconds({"pt": (5, 10)}, 1.0) is None
    finished(tmp_path, "pt", 25.0, (1, 4.0), (5, 4.0))
    # 20 s for 10 units of work, 5 s beside them for a program of 100 equations.
    sizes = 100 * REPEATED + 200 + 300 + 300 * REPEATED + 100
    assert left.seconds() == pytest.approx(2 * 36 + sizes / 20)
    # A job in training has compiled, and its own pace counts.
    assert left.seconds({"ft": (15, 20)}, 3.0) == pytest.approx(5 * 3 + 2 * 16 + sizes / 20 - 2)
    finished(tmp_path, "ft", 50.0, (10, 4.0))
    # 60 s for 30 units, 15 s for 140 equations' worth of programs.
    each = 15 / (100 + 100 * REPEATED)
    rest = 2 * 10 + each * (300 + 300 * REPEATED + 100)
    assert left.seconds() == pytest.approx(2 * 6 + each * 200 + rest)
    # A step of both computes 1 + 0.5; 1 + 3.5 are left, as much as three such steps compute.
    both = {"m2mkd/0": (1, 2), "m2mkd/1": (1, 8)}
    assert left.seconds(both, 1.5) == pytest.approx(3 * 1.5 + rest)
    # What a joint program takes is known when its last module has ended: till then as before.
    finished(tmp_path, "m2mkd/0", 18.0, (2, 5.0))
    assert left.seconds({"m2mkd/1": (4, 8)}, 1.0) == pytest.approx(4 + rest)
    finished(tmp_path, "m2mkd/1", 28.0, (8, 3.0))
    step, start = (60 + 24) / 36, (15 + 8) / (140 + 200)
    assert left.seconds({"e2e": (1, 2)}, 2.0) == pytest.approx(
        2 + step * 5 + start * (300 * REPEATED + 100)
    )
    assert left.place("e2e") == "job 5 of 7"


def test_a_log_entry_like_the_last_one_asks_for_no_file(tmp_path, monkeypatch):
    left = TimeLeft(list(COSTS), COSTS.__getitem__, tmp_path)
    finished(tmp_path, "pt", 25.0, (5, 4.0))
    before = left.seconds({"ft": (10, 20)}, 1.0)
    asked = []
    monkeypatch.setattr(time_left, "is_done", lambda workdir, name: asked.append(name))
    assert left.seconds({"ft": (15, 20)}, 1.0) == pytest.approx(before - 5)
    assert not asked
    left.seconds({"m2mkd/0": (1, 2)}, 1.0)
    assert "ft" in asked


def test_programs_that_shrink_as_jobs_end_are_compiled_again(tmp_path):
    costs = {
        "pt": Cost(10.0, 100, "pt", 5),
        "m2mkd/0": Cost(2.0, 50, 0, 20),
        "m2mkd/1": Cost(2.0, 80, 1, 10),
        "m2mkd/2": Cost(2.0, 90, 2, 10),
    }
    left = TimeLeft(list(costs), costs.__getitem__, tmp_path, lambda name: name != "pt")
    finished(tmp_path, "pt", 30.0, (5, 4.0))  # a tenth of a second per equation
    assert left.seconds() == pytest.approx(2 * 6 + (50 + 80 + 90 + 50) / 10)
    # All three have compiled; the longest will again, by itself.
    steps = {"m2mkd/0": (10, 20), "m2mkd/1": (9, 10), "m2mkd/2": (9, 10)}
    own = (2 * 0.5 + 2 * 0.1 + 2 * 0.1) / (2 / 20 + 2 / 10 + 2 / 10)
    assert left.seconds(steps, 3.0) == pytest.approx(own * 3 + 50 / 10)
    assert left.seconds({"m2mkd/0": (15, 20)}, 1.0) == pytest.approx(5)


def test_a_job_that_stopped_early_has_done_less_work(tmp_path):
    """A quarter of 40 units in 20 s: 2 s a unit, not half a second."""
    costs = {"mt/0": Cost(40.0, 100, 0, 20), "mt/1": Cost(40.0, 100, 1, 20)}
    left = TimeLeft(list(costs), costs.__getitem__, tmp_path)
    finished(tmp_path, "mt/0", 25.0, (5, 4.0), steps=5)
    assert left.seconds() == pytest.approx(40 * 2 + 5)


def test_the_work_of_a_job_is_near_that_of_its_step():
    config = tiny_config()
    for job in ("pt", "m2mkd/1"):
        phase = build_phase(config, job)
        counted = job_costs(config, phase, planned_mesh(config)).training
        assert time_left.work_per_image(phase) == pytest.approx(counted, rel=0.3)


def test_what_a_run_compiles(tmp_path):
    config = tiny_config()
    config.e2e_seeds = 2
    plan = Plan(config)
    left = TimeLeft.of(plan, plan.names, tmp_path)
    programs = {name: cost.program for name, cost in left.costs.items()}
    sizes = {name: cost.size for name, cost in left.costs.items()}
    # Another seed compiles nothing, another module does.
    assert programs["e2e"] == programs["e2e/1"] and programs["mt/0"] != programs["mt/1"]
    assert left.joins("mt/0") and not left.joins("e2e/1")
    # Backward through all blocks costs more than through those behind a module.
    assert sizes["pt"] > sizes["mt/0"] > sizes["mt/1"] > 0
