"""A V-MoE through every phase: routers watched, weights carried over, wrong input refused."""

import json
import shutil
import signal

import numpy as np
import pytest

from m2mkd_jax.checkpoint.store import load_weights
from tests.e2e import command as commands
from tests.e2e.command import TIMEOUT, records, run, start, summary, wait_for_records
from tests.support import assert_trees_close

LAYERS = {"m2mkd/0": 1, "m2mkd/1": 0, "m2mkd/2": 2, "e2e": 3, "e2e_scratch": 3}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    # Programs of one module and of all are compared.
    return commands.environment(tmp_path_factory, fast=False)


@pytest.fixture(scope="module")
def whole(environment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("vmoe")
    result = run("tiny_vmoe", {**environment, "JAX_LOG_COMPILES": "1"}, workdir)
    assert result.returncode == 0, result.stderr
    return workdir, result


@pytest.fixture(scope="module")
def workdir(whole):
    return whole[0]


def test_every_program_compiles_its_step_once(whole):
    """A state that comes back placed otherwise than it went in would compile it twice."""
    jobs = [job["name"] for job in summary(whole[0])["jobs"] if job["name"] != "eval"]
    # All modules of a phase train in one; m2mkd/1 ends before the others, which go on without it.
    programs = [*dict.fromkeys(job.partition("/")[0] for job in jobs), "m2mkd/0 and m2mkd/2"]
    for half in ("gradient", "update"):
        told = f"Finished XLA compilation of jit({half})"
        assert whole[1].stderr.count(told) == len(programs)


def test_a_module_by_itself_is_as_in_the_program_of_all(workdir, environment, tmp_path):
    shutil.copytree(workdir / "jobs" / "pt", tmp_path / "jobs" / "pt")
    result = run("tiny_vmoe", environment, tmp_path, "--only=mt/1")
    assert result.returncode == 0, result.stderr
    mine, other = (load_weights(d / "jobs/mt/1/weights")[0] for d in (tmp_path, workdir))
    assert_trees_close(mine, other, 1e-5)


def test_pairs_go_on_together_and_by_themselves(workdir, environment, tmp_path):
    """Interrupted together, one pair ends by itself, the others together: equal weights and logs.

    The records of the uninterrupted run, in which all pairs train in one program, are cut at other
    steps than those after a restart; the evaluations are at the same ones.
    """
    for job in ("pt", "ft"):
        shutil.copytree(workdir / "jobs" / job, tmp_path / "jobs" / job)
    with start("tiny_vmoe", environment, tmp_path, "--only=m2mkd") as process:
        assert wait_for_records(tmp_path / "jobs" / "m2mkd" / "2" / "metrics.jsonl", 2, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(TIMEOUT) == 3
        assert "run the same command again" in process.stderr.read()
    pairs = [job for job in summary(tmp_path)["jobs"] if job["name"].startswith("m2mkd/")]
    assert [job["status"] for job in pairs] == ["interrupted"] * 3
    assert all(0 < job["steps"] < (40 if job["name"] == "m2mkd/1" else 60) for job in pairs)
    alone = run("tiny_vmoe", environment, tmp_path, "--only=m2mkd/0")
    assert alone.returncode == 0 and "[m2mkd/0] resumed at step" in alone.stdout, alone.stderr
    rest = run("tiny_vmoe", environment, tmp_path, "--only=m2mkd")
    assert rest.returncode == 0, rest.stderr
    assert "[m2mkd/0] done already" in rest.stdout
    assert all(f"[m2mkd/{i}] resumed at step" in rest.stdout for i in (1, 2))
    for i in range(3):
        job = f"m2mkd/{i}"
        mine, other = (load_weights(d / "jobs" / job / "weights")[0] for d in (tmp_path, workdir))
        assert_trees_close(mine, other, 1e-5)
        evaluations, expected = (
            [record for record in records(d, job) if "eval_accuracy" in record]
            for d in (tmp_path, workdir)
        )
        assert [r["step"] for r in evaluations] == [r["step"] for r in expected]
        assert evaluations[-1]["eval_loss"] == pytest.approx(expected[-1]["eval_loss"], rel=1e-5)
        done, wanted = (
            json.loads((d / "jobs" / job / "done.json").read_text()) for d in (tmp_path, workdir)
        )
        assert done["steps"] == wanted["steps"] == (40 if i == 1 else 60)
        assert done["origin"] == wanted["origin"]


def test_kept_targets_change_no_weight(workdir, environment, tmp_path):
    """Pairs that train on kept targets, one of which ends earlier, against the same views anew."""
    flags = ("--only=m2mkd/0,m2mkd/1", "--config.distillation.views=2")
    results = {}
    for name, more in (("kept", ()), ("anew", ("--config.distillation.keep_targets=False",))):
        for job in ("pt", "ft"):
            shutil.copytree(workdir / "jobs" / job, tmp_path / name / "jobs" / job)
        results[name] = run("tiny_vmoe", environment, tmp_path / name, *flags, *more)
        assert results[name].returncode == 0, results[name].stderr
    assert results["kept"].stdout.count("targets are kept in") == 1
    assert "targets are kept" not in results["anew"].stdout
    for job in ("m2mkd/0", "m2mkd/1"):
        kept, anew, other = (
            load_weights(directory / "jobs" / job / "weights")[0]
            for directory in (tmp_path / "kept", tmp_path / "anew", workdir)
        )
        assert_trees_close(kept, anew, 1e-5)
        with pytest.raises(AssertionError):
            assert_trees_close(kept, other, 1e-5)
        assert not (tmp_path / "kept" / "jobs" / job / "views").exists()


def test_every_phase_runs(workdir):
    found = summary(workdir)
    assert {job["status"] for job in found["jobs"]} == {"done"}
    by_name = {job["name"]: job for job in found["jobs"]}
    for name in ("e2e", "e2e_scratch"):
        trained = by_name[name]["metrics"]["eval_accuracy"]
        assert by_name["eval"]["networks"][name]["eval_accuracy"] == trained
    assert all("m2mkd" in where for where in by_name["e2e"]["origin"].values())
    assert {"e2e", "e2e_scratch", "e2e_minus_scratch"} <= found["results"].keys()


def test_without_stitches_and_upcycled(workdir, environment, tmp_path):
    """From the students and from the teacher of the first run: no phase before is repeated."""
    flags = (
        "--config.vmoe.keep_stitches=False",
        "--config.recipes.e2e.epochs=1",
        "--config.phases=('e2e','e2e_upcycled')",
        f"--config.init.students={workdir}",
        f"--config.init.teacher={workdir}",
    )
    result = run("tiny_vmoe", environment, tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    by_name = {job["name"]: job for job in summary(tmp_path)["jobs"]}
    assert list(by_name) == ["e2e", "e2e_upcycled"]
    assert all("ft" in where for where in by_name["e2e_upcycled"]["origin"].values())
    trees, description = load_weights(tmp_path / "jobs" / "e2e" / "weights")
    assert description["spec"]["stitch_dim"] == 0
    assert "stitch" not in str(trees["vmoe_1"]["params"].keys())


def test_few_shot_heads_on_a_network_of_several_stages(workdir, environment, tmp_path):
    flags = (
        "--config.phases=('fewshot',)",
        f"--config.init.network={workdir}",
        "--config.few_shot.data.name=digits",
        "--config.few_shot.data.classes=10",
        "--config.few_shot.ways=4",
        "--config.few_shot.shots=2",
        "--config.few_shot.episodes=2",
        "--config.recipes.fewshot.batch=8",
    )
    result = run("tiny_vmoe", environment, tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "jobs" / "fewshot" / "episodes.jsonl").read_text().splitlines()
    # Four times six queries, each counted once.
    assert [json.loads(line)["eval_images"] for line in lines] == [24, 24]


@pytest.mark.parametrize("job", LAYERS)
def test_routers_are_watched_layer_by_layer(workdir, job):
    for record in records(workdir, job):
        if "loss" not in record:
            continue
        routers = {k.split("/")[1]: np.array(v) for k, v in record.items() if "router/" in k}
        if not LAYERS[job]:
            assert not routers
            continue
        assert routers["load"].shape == (LAYERS[job], 4)
        np.testing.assert_allclose(routers["load"].sum(-1), 1.0, atol=1e-5)
        # Four experts of top-2 routing at factor 0.75 have places for at most that share.
        assert np.all(routers["dropped"] >= 0.2) and np.all(routers["dropped"] < 1.0)
        assert np.all(routers["entropy"] <= np.log(4) + 1e-5)
        assert routers["dead"].shape == (LAYERS[job],)
        balance = 0.01 * (routers["importance_loss"].sum() + routers["load_loss"].sum())
        assert balance > 0.0
        if job.startswith("e2e"):
            parts = record["classification_loss"] + balance
            assert record["loss"] == pytest.approx(parts, rel=1e-5)


def test_stitches_are_kept_and_taught(workdir):
    """The end-to-end network has the students' own arrays, name by name."""
    trees, description = load_weights(workdir / "jobs" / "e2e" / "weights")
    assert description["kind"] == "vmoe" and description["spec"]["stitch_dim"] == 16
    assert set(trees) == {"vmoe_0", "vmoe_1", "vmoe_2"}

    def shapes(tree, path=""):
        if not isinstance(tree, dict):
            return {path: tree.shape}
        return {k: v for n, t in tree.items() for k, v in shapes(t, f"{path}/{n}").items()}

    for i in range(3):
        student, _ = load_weights(workdir / "jobs" / f"m2mkd/{i}" / "weights")
        assert shapes(trees[f"vmoe_{i}"]) == shapes(student[f"student_{i}"])
    scratch, _ = load_weights(workdir / "jobs" / "e2e_scratch" / "weights")
    assert shapes(scratch["vmoe_1"]) == shapes(trees["vmoe_1"])
