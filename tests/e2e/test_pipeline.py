"""The command as a user runs it: every phase, kills, resumes, given weights, the report."""

import functools
import json
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from m2mkd_jax.checkpoint.steps import latest_step
from tests.e2e import command as commands
from tests.e2e.command import (
    ROOT,
    checksums,
    records,
    summary,
    wait_for_records,
)

JOBS = [
    "pt",
    "mt/0",
    "mt/1",
    "mt/2",
    "ft",
    "m2mkd/0",
    "m2mkd/1",
    "m2mkd/2",
    "e2e",
    "e2e_scratch",
    "e2e_kd",
    "eval",
]
run = functools.partial(commands.run, "tiny")
start = functools.partial(commands.start, "tiny")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return commands.environment(tmp_path_factory)


@pytest.fixture(scope="module")
def whole(environment, tmp_path_factory):
    """An uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    result = run(environment, workdir)
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_every_phase_runs_and_is_recorded(whole):
    workdir, result = whole
    found = summary(workdir)
    assert [job["name"] for job in found["jobs"]] == JOBS
    assert {job["status"] for job in found["jobs"]} == {"done"}
    for job in found["jobs"]:
        assert 0.0 <= job["metrics"]["eval_accuracy"] <= 1.0
    by_name = {job["name"]: job for job in found["jobs"]}
    # The reloaded network is the one that was trained.
    for name in ("e2e", "e2e_scratch", "e2e_kd"):
        trained = by_name[name]["metrics"]["eval_accuracy"]
        assert by_name["eval"]["networks"][name]["eval_accuracy"] == trained
    assert by_name["pt"]["metrics"]["eval_images"] == 100
    assert by_name["e2e"]["origin"]["nac/read_in"] == "m2mkd/0"
    assert by_name["e2e"]["origin"]["nac/seeder"] == "fresh"
    results = found["results"]
    assert {"e2e", "e2e_scratch", "e2e_kd", "e2e_minus_scratch", "teacher"} <= results.keys()
    assert [pair["module"] for pair in results["hybrids"]] == ["m2mkd/0", "m2mkd/1", "m2mkd/2"]
    assert "e2e_minus_scratch" in result.stdout


def test_a_second_run_finds_everything_done(whole, environment):
    workdir, _ = whole
    before = summary(workdir)
    result = run(environment, workdir)
    assert result.returncode == 0 and summary(workdir) == before
    assert all(f"[{job}] done already" in result.stdout for job in JOBS)


def test_another_config_in_the_same_directory_is_refused(whole, environment):
    workdir, _ = whole
    result = run(environment, workdir, "--config.recipes.pt.epochs=5")
    assert result.returncode == 2
    assert "config.recipes.pt.epochs = 4" in result.stderr and result.stderr.count("\n") == 1


def test_killed_in_several_phases_and_resumed(whole, environment, tmp_path):
    """SIGKILL in the middle of three phases; weights and summary are the uninterrupted run's.

    In the first of them as if between the saves of modules that train together.
    """
    killed = []
    for job in ("mt/1", "m2mkd/2", "e2e_kd"):
        file = tmp_path / "jobs" / job / "metrics.jsonl"
        with start(environment, tmp_path) as process:
            # By its seventh record a job has waited for the save at its first evaluation.
            if wait_for_records(file, 7, process):
                process.send_signal(signal.SIGKILL)
                killed.append(job)
        assert not (tmp_path / "jobs" / job / "done.json").exists()
        if job == "mt/1":
            checkpoints = tmp_path / "jobs" / job / "checkpoints"
            shutil.rmtree(checkpoints / str(latest_step(checkpoints)))
            began = run(environment, tmp_path, "--only=mt")
            assert began.returncode == 0, began.stderr
            assert all(f"[mt/{i}] goes back from step" in began.stdout for i in (0, 2))
    assert len(killed) == 3
    result = run(environment, tmp_path)
    assert result.returncode == 0, result.stderr
    assert "[e2e_kd] resumed at step" in result.stdout
    assert summary(tmp_path) == summary(whole[0])
    assert checksums(tmp_path) == checksums(whole[0])
    for job in JOBS[:-1]:
        mine, other = (records(d, job) for d in (tmp_path, whole[0]))
        steps = [record["step"] for record in mine]
        assert steps == sorted(steps)
        # Loss and accuracy of the records that both runs cut at the same steps are equal.
        common = [record for record in mine if record in other]
        assert [r for r in mine if "eval_accuracy" in r] == [
            r for r in other if "eval_accuracy" in r
        ] and common


def test_init_replaces_the_phases_before(whole, environment, tmp_path):
    flags = (f"--config.init.students={whole[0]}", "--config.phases=('m2mkd','e2e','eval')")
    result = run(environment, tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    found = summary(tmp_path)
    assert [job["name"] for job in found["jobs"]] == ["e2e", "eval"]
    expected = {job["name"]: job for job in summary(whole[0])["jobs"]}
    assert found["jobs"][0]["metrics"] == expected["e2e"]["metrics"]


def test_given_networks_are_measured(whole, environment, tmp_path):
    flags = [f"--config.init.{name}={whole[0]}" for name in ("meta", "teacher", "network")]
    result = run(environment, tmp_path, *flags, "--config.phases=('eval',)")
    assert result.returncode == 0, result.stderr
    found, expected = summary(tmp_path), {j["name"]: j for j in summary(whole[0])["jobs"]}
    (job,) = found["jobs"]
    assert job["networks"] == {name: expected[name]["metrics"] for name in ("pt", "ft", "e2e")}
    accuracies = {name: metrics["eval_accuracy"] for name, metrics in job["networks"].items()}
    assert found["results"]["meta"] == accuracies["pt"]
    assert found["results"]["teacher"] == accuracies["ft"]
    assert found["results"]["e2e"]["values"] == [accuracies["e2e"]]


@pytest.mark.parametrize(
    "flags",
    [
        ("--config.init.students={}", "--config.nac.state_dim=32"),
        ("--config.init.network={}", "--config.nac.mediator_latents=16"),
        # The meta model is still to be trained: only m2mkd would meet the teacher.
        ("--config.init.teacher={}", "--config.teacher.depths=(1,1,1)"),
    ],
)
def test_given_weights_that_do_not_fit_are_refused_at_once(whole, environment, tmp_path, flags):
    result = run(environment, tmp_path / "new", flags[0].format(whole[0]), flags[1])
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "has shape" in result.stderr and not (tmp_path / "new").exists()


def test_the_report_measures_what_the_jobs_have_measured(whole, environment, tmp_path):
    workdir = shutil.copytree(whole[0], tmp_path / "run")
    report = [sys.executable, "-m", "m2mkd_jax.report", workdir]
    done = [
        subprocess.run(report, cwd=ROOT, env=environment, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert [result.returncode for result in done] == [0, 0], done[0].stderr
    assert "counting FLOPs" in done[0].stdout
    assert "counting FLOPs" not in done[1].stdout  # it is kept
    assert (workdir / "report" / "index.html").stat().st_size > 100_000
    found = json.loads((workdir / "report" / "analysis.json").read_text())
    assert found["notes"] == []
    metrics = {job["name"]: job["metrics"] for job in summary(workdir)["jobs"]}
    for i, module in found["modules"].items():
        own = metrics[f"m2mkd/{i}"]
        assert module["student_accuracy"] == pytest.approx(own["eval_accuracy"])
        assert module["teacher_accuracy"] == pytest.approx(own["teacher_accuracy"])
    with np.load(workdir / "report" / "analysis.npz") as arrays:
        for job in ("e2e", "e2e_scratch", "e2e_kd"):
            right = arrays[f"logits/{job}"].argmax(-1) == arrays["labels"]
            assert right.mean() == pytest.approx(metrics[job]["eval_accuracy"])
        assert {"nac/read_in", "nac/initial_links", "nac/use"} <= set(arrays.files)
    assert found["costs"].keys() == metrics.keys() - {"eval"}
