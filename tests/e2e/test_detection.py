"""A detector on a given network: killed and resumed it ends as in one go; it is measured."""

import json
import shutil

import pytest

import m2mkd_jax
from m2mkd_jax.checkpoint.store import load_weights, save_weights
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.phases.initial_weights import fresh_stage
from tests.e2e import command as commands
from tests.e2e import tiny_detect
from tests.e2e.command import records, run, summary
from tests.support import assert_trees_close

FLAGS = ("--config.phases=('detect','eval')", "--config.detection.network=e2e")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return commands.environment(tmp_path_factory)


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """Weights of a classifier that nothing has trained."""
    path, config = tmp_path_factory.mktemp("network"), tiny_detect.get_config()
    phase = build_phase(config, "e2e_scratch")
    stages = {n: fresh_stage(config, spec, n, 0) for n, spec in phase.stages.items()}
    trees = {n: {k: v for k, v in stage.items() if v} for n, stage in stages.items()}
    scale = {"mean": list(config.data.mean), "std": list(config.data.std)}
    save_weights(path / "weights", trees, phase.describe | {"normalisation": scale})
    return path / "weights"


@pytest.fixture(scope="module")
def whole(environment, network, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("detect")
    result = run("tiny_detect", environment, workdir, *FLAGS, f"--config.init.network={network}")
    assert result.returncode == 0, result.stderr
    return workdir


def test_killed_and_resumed_it_ends_alike(whole, environment, network, tmp_path):
    """From what a kill in the last epoch leaves: a checkpoint, and a log that is longer."""
    folder = tmp_path / "jobs" / "detect"
    shutil.copytree(whole / "jobs" / "detect", folder)
    (folder / "done.json").unlink()
    for name in ("weights", "detections", "checkpoints/24"):
        shutil.rmtree(folder / name)
    flags = (*FLAGS, f"--config.init.network={network}", "--only=detect")
    result = run("tiny_detect", environment, tmp_path, *flags)
    assert result.returncode == 0, result.stderr
    assert "[detect] resumed at step 16/24" in result.stdout
    mine, other = (load_weights(d / "jobs/detect/weights")[0] for d in (tmp_path, whole))
    assert_trees_close(mine, other, 0)
    assert records(tmp_path, "detect") == records(whole, "detect")


def test_a_line_of_the_log_comes_every_so_many_updates_not_steps(whole):
    steps = [record["step"] for record in records(whole, "detect") if "lr" in record]
    assert steps == [4, 8, 12, 16, 20, 24]  # two updates of two parts each


def test_results_weights_and_pictures(whole):
    jobs = {job["name"]: job for job in summary(whole)["jobs"]}
    metrics = jobs["detect"]["metrics"]
    assert len([name for name in metrics if name.startswith("eval_box_")]) == 12
    assert len([name for name in metrics if name.startswith("eval_mask_")]) == 12
    assert set(jobs["detect"]["per_class"]["mask"]) == set("0123456789")
    measured = json.loads((whole / "jobs/eval/done.json").read_text())["networks"]["detect"]
    assert {k: v for k, v in measured.items() if k.startswith("eval_")} == metrics
    folder = whole / "jobs" / "detect"
    assert (folder / "images.png").is_file()
    assert sorted(p.name for p in (folder / "detections").iterdir()) == ["0.png", "1.png"]
    model = m2mkd_jax.load(folder / "weights")
    assert model.class_names == tuple("0123456789")
    assert model.category_ids == tuple(range(10))
    assert model.is_detector and model.spec.detections == 5
