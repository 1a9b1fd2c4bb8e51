"""A V-MoE through every phase: routers watched, weights carried over, wrong input refused."""

import json
import shutil

import numpy as np
import pytest

from m2mkd_jax.checkpoint.store import load_weights
from tests.e2e import command as commands
from tests.e2e.command import run, summary
from tests.support import assert_trees_close

LAYERS = {"m2mkd/0": 1, "m2mkd/1": 0, "m2mkd/2": 2, "e2e": 3, "e2e_scratch": 3}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return commands.environment(str(tmp_path_factory.mktemp("xla")))


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
    programs = {"m2mkd" if job.startswith("m2mkd/") else job for job in jobs}
    assert whole[1].stderr.count("Finished XLA compilation of jit(step)") == len(programs)


def test_a_pair_by_itself_is_as_in_the_program_of_all(workdir, environment, tmp_path):
    for job in ("pt", "ft"):
        shutil.copytree(workdir / "jobs" / job, tmp_path / "jobs" / job)
    result = run("tiny_vmoe", environment, tmp_path, "--only=m2mkd/2")
    assert result.returncode == 0, result.stderr
    mine, other = (load_weights(d / "jobs/m2mkd/2/weights")[0] for d in (tmp_path, workdir))
    assert_trees_close(mine, other, 1e-5)


def records(workdir, job) -> list[dict]:
    lines = (workdir / "jobs" / job / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


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


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--config.vmoe.depths=(2,2)", "needs 2"),
        ("--config.vmoe.router=publisht", "one of published"),
        ("--config.mesh.expert=3", "3 does not divide 1 device"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(environment, tmp_path, flag, says):
    result = run("tiny_vmoe", environment, tmp_path / "new", flag)
    assert result.returncode == 2, result.stderr
    assert says in result.stderr and result.stderr.count("\n") == 1, result.stderr
    assert not (tmp_path / "new").exists()
