"""Every file of a checkpoint, damaged in every way: the step before, said aloud, or a refusal."""

import shutil

import numpy as np
import pytest

from m2mkd_jax.checkpoint.checksums import FILE, damage
from m2mkd_jax.checkpoint.store import RunCheckpoints
from m2mkd_jax.errors import UserError
from tests.unit.checkpoint.test_store import abstract, assert_same, make_state

STEPS = (10, 20)
COMMITTED = "commit_success.txt"  # of Orbax, which it neither needs nor reads here
DAMAGES = ("truncate", "empty", "zeros", "delete", "flip", "swap")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    checkpoints = RunCheckpoints(directory)
    for step in STEPS:
        checkpoints.save(step, make_state(step, size=16), {"eval_accuracy": step / 100})
    checkpoints.close()
    return directory


def break_file(path, how, other, rng):
    """Damages a file; returns whether its content changed."""
    content = path.read_bytes()
    if how == "delete":
        path.unlink()
        return True
    new = {
        "truncate": content[: len(content) // 2],
        "empty": b"",
        "zeros": content[: len(content) // 3] + bytes(8) + content[len(content) // 3 + 8 :],
        "swap": other.read_bytes() if other.is_file() else content,
    }
    if how == "flip":
        position, bit = int(rng.integers(len(content))), int(rng.integers(8))
        flipped = bytearray(content)
        flipped[position] ^= 1 << bit
        new["flip"] = bytes(flipped)
    path.write_bytes(new[how])
    return new[how] != content


def files_of(directory):
    return sorted(p.relative_to(directory) for p in directory.rglob("*") if p.is_file())


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_file_is_noticed(saved, tmp_path, capfd, how):
    older, newest = STEPS
    rng = np.random.default_rng(0)
    states = {step: make_state(step, size=16) for step in STEPS}
    names = files_of(saved / str(newest))
    assert {name.parts[0] for name in names} >= {"state", "metrics"}
    for number, name in enumerate(names * (3 if how == "flip" else 1)):
        directory = tmp_path / f"{number}"
        shutil.copytree(saved, directory)
        path = directory / str(newest) / name
        changed = break_file(path, how, saved / str(older) / name, rng)
        checkpoints = RunCheckpoints(directory)
        restored = checkpoints.restore_latest(abstract(states[newest]))
        checkpoints.close()
        said = capfd.readouterr().err
        assert restored is not None
        step, state = restored
        assert_same(state, states[step])
        if changed and name.parts[0] == "state" and name.name != COMMITTED:
            assert step == older and "is damaged, not used" in said, (name, said)
        if changed and name.name == "metrics" and how != "delete":
            assert step == newest and "cannot be the best one" in said, (name, said)
        shutil.rmtree(directory)


def test_a_checkpoint_of_another_step_is_not_used(saved, tmp_path):
    directory = tmp_path / "run"
    shutil.copytree(saved, directory)
    shutil.rmtree(directory / "20")
    shutil.copytree(directory / "10", directory / "20")
    assert damage(directory / "20" / "state", 20) == "it is the checkpoint of step 10"
    shutil.rmtree(directory / "10")
    checkpoints = RunCheckpoints(directory)
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read"):
        checkpoints.restore_latest(abstract(make_state(20, size=16)))
    checkpoints.close()
    (directory / "20" / "state" / FILE).unlink()
    assert "does not exist" in damage(directory / "20" / "state", 20)


def test_a_checkpoint_of_another_job_is_not_used(tmp_path, capfd):
    """Jobs whose states have the same arrays, such as two seeds of one network."""
    states = {"e2e/1": make_state(1), "e2e/2": make_state(2)}
    for job, state in states.items():
        for step in STEPS:
            checkpoints = RunCheckpoints(tmp_path / job, job=job)
            checkpoints.save(step, state)
            checkpoints.close()
    shutil.rmtree(tmp_path / "e2e/1/20")
    shutil.copytree(tmp_path / "e2e/2/20", tmp_path / "e2e/1/20")
    checkpoints = RunCheckpoints(tmp_path / "e2e/1", job="e2e/1")
    step, state = checkpoints.restore_latest(abstract(states["e2e/1"]))
    checkpoints.close()
    assert step == 10 and "is a checkpoint of e2e/2" in capfd.readouterr().err
    assert_same(state, states["e2e/1"])


def test_a_checkpoint_of_another_run_is_not_used(tmp_path, capfd):
    """The same job in two directories, with other seeds or images."""
    states = {"a": make_state(1), "b": make_state(2)}
    for run, state in states.items():
        for step in STEPS:
            checkpoints = RunCheckpoints(tmp_path / run, job="pt", run=run)
            checkpoints.save(step, state)
            checkpoints.close()
    shutil.rmtree(tmp_path / "a/20")
    shutil.copytree(tmp_path / "b/20", tmp_path / "a/20")
    checkpoints = RunCheckpoints(tmp_path / "a", job="pt", run="a")
    step, state = checkpoints.restore_latest(abstract(states["a"]))
    checkpoints.close()
    assert step == 10 and "it is a checkpoint of another run" in capfd.readouterr().err
    assert_same(state, states["a"])
    # One of an earlier version says no run.
    checkpoints = RunCheckpoints(tmp_path / "c", job="pt")
    checkpoints.save(10, states["b"])
    checkpoints.close()
    checkpoints = RunCheckpoints(tmp_path / "c", job="pt", run="a")
    assert checkpoints.restore_latest(abstract(states["a"]))[0] == 10
    checkpoints.close()
