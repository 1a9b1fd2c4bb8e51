"""Few-shot episodes with a network that was trained before: run, go on, be refused."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.e2e import command as commands
from tests.e2e.command import run, summary

FLAGS = (
    "--config.phases=('e2e_scratch','fewshot')",
    "--config.few_shot.network=e2e_scratch",
    "--config.few_shot.data.name=digits",
    "--config.few_shot.data.classes=10",
    "--config.few_shot.ways=3",
    "--config.few_shot.shots=4",
    "--config.few_shot.episodes=4",
    "--config.recipes.fewshot.batch=6",
    "--config.recipes.fewshot.epochs=40",
    "--config.recipes.fewshot.lr=0.05",
    "--config.recipes.e2e.epochs=8",
)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return commands.environment(tmp_path_factory)


@pytest.fixture(scope="module")
def whole(environment, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("few")
    result = run("tiny", {**environment, "JAX_LOG_COMPILES": "1"}, workdir, *FLAGS)
    assert result.returncode == 0, result.stderr
    return workdir, result


def test_episodes_end_in_a_mean_and_an_interval(whole):
    workdir, result = whole
    found = summary(workdir)
    assert [job["status"] for job in found["jobs"]] == ["done", "done"]
    few = found["results"]["fewshot"]
    assert len(few["values"]) == 4 and few["mean"] == pytest.approx(np.mean(few["values"]))
    assert few["mean"] > 1 / 3 and few["interval95"] > 0
    assert "fewshot: " in result.stdout and "(95%, 4 episodes)" in result.stdout
    # Nine times four queries, each counted once.
    lines = (workdir / "jobs" / "fewshot" / "episodes.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["eval_images"] for record in records] == [36] * 4
    first = records[0]["seed"]
    assert [record["seed"] for record in records] == [first, first + 1, first + 2, first + 3]
    for job in ("e2e_scratch", "fewshot"):
        with Image.open(workdir / "jobs" / job / "images.png") as picture:
            assert picture.width >= 3 * 112  # 16 images, or the 6 of an episode's batch
    # A step for the network, one for all heads.
    for half in ("gradient", "update"):
        assert result.stderr.count(f"Finished XLA compilation of jit({half})") == 2


def test_an_interrupted_job_goes_on_with_the_next_episode(whole, environment):
    workdir, directory = whole[0], whole[0] / "jobs" / "fewshot"
    before, seconds = summary(workdir), _seconds(workdir)
    lines = (directory / "episodes.jsonl").read_text().splitlines(keepends=True)
    (directory / "done.json").unlink()
    drawn = (directory / "images.png").stat().st_mtime_ns
    (directory / "episodes.jsonl").write_text("".join(lines[:3]))
    result = run("tiny", environment, workdir, *FLAGS)
    assert result.returncode == 0, result.stderr
    assert "episode 4/4" in result.stdout and "episode 3/4" not in result.stdout
    assert summary(workdir) == before
    # Those of the start before count too, up to its last episode.
    third = json.loads(lines[2])["seconds"]
    assert 0 < third < seconds and third < _seconds(workdir)
    assert (directory / "images.png").stat().st_mtime_ns == drawn  # once per job


def _seconds(workdir):
    return json.loads((workdir / "jobs" / "fewshot" / "done.json").read_text())["seconds"]


def test_data_and_weights_that_are_missing_are_one_line(environment, tmp_path):
    def refused(**changes):
        flags = dict(flag.removeprefix("--config.").split("=", 1) for flag in FLAGS)
        flags |= {f"few_shot.{key.replace('__', '.')}": value for key, value in changes.items()}
        given = [f"--config.{key}={value}" for key, value in flags.items()]
        result = run("tiny", environment, tmp_path, *given)
        assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    line = refused(data__name="cub", data__root="/nowhere")
    assert "/nowhere" in line and "CUB_200_2011" in line
    assert "job e2e is not done" in refused(network="e2e")
