"""Checkpoints of a run and finished weights: kept, damaged, killed, mistaken for others."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from m2mkd_jax.checkpoint.store import (
    RunCheckpoints,
    checksum,
    load_weights,
    match_tree,
    save_weights,
)
from m2mkd_jax.errors import UserError


def make_state(value, size=64):
    kernels = np.random.default_rng(value).normal(size=(3, size, 3))  # too random to compress away
    params = {
        "stages": {str(i): {"kernel": jnp.asarray(k, jnp.float32)} for i, k in enumerate(kernels)},
        "head": {"bias": jnp.full((5,), value, jnp.bfloat16)},
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    opt_state = jax.tree.map(lambda x: x + jnp.asarray(value, x.dtype), optimizer.init(params))
    return {"step": jnp.int32(value), "params": params, "opt_state": opt_state, "fixed": {}}


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def steps_in(directory):
    return sorted(int(p.name) for p in Path(directory).iterdir() if p.name.isdigit())


def cut_off(directory):
    """The largest file under `directory` loses its second half."""
    largest = max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def test_state_with_optax_tuples_comes_back_as_it_was(tmp_path):
    state = make_state(3)
    run = RunCheckpoints(tmp_path)
    assert run.restore_latest(abstract(state)) is None
    assert run.save(3, state, {"eval_accuracy": 0.5})
    assert not run.save(3, state)
    run.close()
    run = RunCheckpoints(tmp_path)
    step, restored = run.restore_latest(abstract(state))
    assert step == 3
    assert_same(restored, state)
    placed, wanted = restored["params"]["head"]["bias"], state["params"]["head"]["bias"]
    assert placed.sharding == wanted.sharding
    _, on_host = run.restore_latest(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    )
    assert isinstance(on_host["step"], np.ndarray)
    assert_same(on_host, state)
    run.close()


def test_keeps_the_latest_two_and_the_best_over_a_restart(tmp_path):
    run = RunCheckpoints(tmp_path)
    for step, accuracy in [(1, 0.2), (2, 0.9), (3, float("nan")), (4, 0.4)]:
        run.save(step, make_state(step), {"eval_accuracy": np.float32(accuracy), "loss": 1.0})
    run.close()
    assert steps_in(tmp_path) == [2, 3, 4]
    run = RunCheckpoints(tmp_path)
    run.save(5, make_state(5))
    run.save(6, make_state(6), {"eval_accuracy": 0.5})
    run.close()
    assert steps_in(tmp_path) == [2, 5, 6]
    run = RunCheckpoints(tmp_path / "no_best", best_metric=None)
    for step in range(4):
        run.save(step, make_state(step), {"eval_accuracy": 1.0 - step})
    run.close()
    assert steps_in(tmp_path / "no_best") == [2, 3]


def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path):
    state = {"params": {f"w{i}": jnp.full((512, 1024), 1.0) for i in range(8)}}
    host = {"mean": np.ones(1000)}
    train_step = jax.jit(lambda s: jax.tree.map(lambda x: x * 2 + 1, s), donate_argnums=0)
    train_step(jax.tree.map(jnp.copy, state))  # compile
    want = jax.tree.map(lambda x: np.array(x), state)
    spec = abstract(state)
    run = RunCheckpoints(tmp_path)
    run.save(1, {**state, "fixed": host})
    host["mean"][:] = -1
    second = state = train_step(state)
    for _ in range(4):
        state = train_step(state)
    assert second["params"]["w0"].is_deleted()  # train_step does donate
    run.wait()
    mean = {"mean": jax.ShapeDtypeStruct((1000,), np.float64)}
    _, restored = run.restore_latest({**spec, "fixed": mean})
    assert_same(restored, {**want, "fixed": {"mean": np.ones(1000)}})
    run.close()


@pytest.mark.parametrize("damage", ["cut off", "empty", "no state"])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, capfd, damage):
    run = RunCheckpoints(tmp_path)
    for step in (1, 2):
        run.save(step, make_state(step, size=4096), {"eval_accuracy": 0.1})
    run.close()
    if damage == "cut off":
        cut_off(tmp_path / "2" / "state")
    else:
        shutil.rmtree(tmp_path / "2" / ("" if damage == "empty" else "state"))
        (tmp_path / "2").mkdir(exist_ok=True)
    capfd.readouterr()
    run = RunCheckpoints(tmp_path)
    step, restored = run.restore_latest(abstract(make_state(1, size=4096)))
    assert step == 1
    assert_same(restored, make_state(1, size=4096))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert str(tmp_path / "2") in lines[0] and "damaged" in lines[0]
    assert run.save(2, make_state(7, size=4096))  # the same step again, after the repeat
    run.wait()
    step, restored = run.restore_latest(abstract(make_state(1, size=4096)))
    assert (step, int(restored["step"])) == (2, 7)
    run.close()


@pytest.mark.parametrize(("at", "expected"), [(4, 4), (2, 2), (0, None), (3, 4)])
def test_goes_back_to_a_step_and_deletes_those_after_it(tmp_path, at, expected):
    run = RunCheckpoints(tmp_path)
    for step, accuracy in ((2, 0.9), (3, 0.1), (4, 0.2)):
        run.save(step, make_state(step), {"eval_accuracy": accuracy})
    run.close()
    if at == 3:  # cannot be read: the newest is good, though the job goes on without the others
        cut_off(tmp_path / "3")
    run = RunCheckpoints(tmp_path)
    restored = run.restore_latest(abstract(make_state(0)), at)
    left = {4: [2, 3, 4], 2: [2], 0: [], 3: [2, 4]}
    assert steps_in(tmp_path) == left[at]
    if expected is None:
        assert restored is None
    else:
        assert restored[0] == expected
        assert_same(restored[1], make_state(expected))
    assert run.save((expected or 0) + 1, make_state(5))
    run.close()


def test_all_damaged_is_an_error_and_touches_nothing(tmp_path):
    run = RunCheckpoints(tmp_path)
    run.save(1, make_state(1, size=4096))
    run.wait()
    cut_off(tmp_path / "1" / "state")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(steps \[1\]"):
        run.restore_latest(abstract(make_state(1, size=4096)))
    assert steps_in(tmp_path) == [1]
    run.close()


def test_a_damaged_metrics_file_does_not_lock_the_directory(tmp_path):
    run = RunCheckpoints(tmp_path)
    run.save(1, make_state(1), {"eval_accuracy": 0.1})
    run.close()
    (tmp_path / "1" / "metrics" / "metrics").write_text('{"eval_')
    run = RunCheckpoints(tmp_path)
    assert run.restore_latest(abstract(make_state(1)))[0] == 1
    run.close()


def test_another_model_is_an_error_not_damage(tmp_path):
    run = RunCheckpoints(tmp_path)
    run.save(1, make_state(1, size=8))
    with pytest.raises(UserError, match=r"kernel' has shape \(8, 3\), expected \(9, 3\)"):
        run.restore_latest(abstract(make_state(1, size=9)))
    other = make_state(1, size=8)
    other["params"]["head"]["bias"] = jnp.zeros(5)
    with pytest.raises(UserError, match=r"bias' has dtype bfloat16, expected float32"):
        run.restore_latest(abstract(other))
    run.close()
    assert steps_in(tmp_path) == [1]


RESTORE_DAMAGED = """
import gc, sys, time, jax, numpy as np
from pathlib import Path
from m2mkd_jax.checkpoint.store import RunCheckpoints
run = RunCheckpoints(sys.argv[1])
state = {f"w{i}": np.random.randn(200, 200) for i in range(12)}
abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
run.save(1, state)
for keep in (0, 0.5):  # Orbax stumbles in another place over an empty file than over half of it
    run.save(2, state)
    run.wait()
    files = [p for p in Path(sys.argv[1], "2").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:int(keep * largest.stat().st_size)])
    assert run.restore_latest(abstract)[0] == 1
run.close()
gc.collect()
time.sleep(0.5)
"""


def test_a_damaged_checkpoint_costs_one_line_of_the_screen(tmp_path):
    # In a process of its own: pytest keeps from capfd what a freed coroutine prints.
    done = subprocess.run(
        [sys.executable, "-c", RESTORE_DAMAGED, str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2 and all("is damaged, not used" in line for line in lines), done.stderr


SAVE_FOREVER = """
import sys, jax.numpy as jnp
from m2mkd_jax.checkpoint.store import RunCheckpoints
run = RunCheckpoints(sys.argv[1])
for step in range(1, 10000):
    run.save(step, {"step": jnp.int32(step), "w": jnp.full((1500, 1000), step, jnp.float32)})
"""


def test_killed_in_a_save_leaves_the_earlier_steps(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", SAVE_FOREVER, str(tmp_path)])
    deadline, half_written = time.monotonic() + 120, False
    while not half_written and time.monotonic() < deadline and process.poll() is None:
        names = os.listdir(tmp_path)
        half_written = "3" in names and any("tmp" in name for name in names)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and half_written
    run = RunCheckpoints(tmp_path)
    step, state = run.restore_latest(
        {"step": jax.ShapeDtypeStruct((), np.int32), "w": jax.ShapeDtypeStruct((1500, 1000), "f4")}
    )
    assert step == int(state["step"]) >= 2 and (state["w"] == step).all()
    run.save(step + 9, state)  # not the step that was being saved: that would hide leftovers
    run.close()
    assert steps_in(tmp_path) == [step, step + 9]
    assert len(os.listdir(tmp_path)) == 2  # what the killed save left is gone


def weights():
    rng = np.random.default_rng(0)
    return {
        "module_0": {"blocks": {"kernel": rng.normal(size=(40, 50)).astype(np.float32)}},
        "module_1": {"kernel": jnp.arange(6, dtype=jnp.bfloat16).reshape(2, 3), "scale": 2.5},
        "stitch": {},
    }


def test_what_a_full_disk_says_is_an_oserror(tmp_path):
    """A limit on the size of files stands for the disk; Orbax has its own error for both."""
    state, (soft, hard) = make_state(1), resource.getrlimit(resource.RLIMIT_FSIZE)
    checkpoints = RunCheckpoints(tmp_path)
    checkpoints.save(1, state)
    checkpoints.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match="File too large") as error:
            checkpoints.save(2, state)
            checkpoints.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(tmp_path)
    again = RunCheckpoints(tmp_path)
    assert again.restore_latest(abstract(state))[0] == 1
    assert again.save(2, state)
    again.close()


def test_weights_come_back_all_or_one_alone(tmp_path):
    trees = weights()
    path = tmp_path / "a" / "teacher"
    save_weights(path, {"old": {"x": np.zeros(3)}}, {"step": 1})
    save_weights(path, trees, {"architecture": "vit", "step": np.int32(7)})  # replaces
    assert [p.name for p in path.parent.iterdir()] == ["teacher"]
    loaded, description = load_weights(path)
    assert description == {"architecture": "vit", "step": 7}
    assert list(loaded) == list(trees) and loaded["stitch"] == {}
    assert loaded["module_1"]["kernel"].dtype == ml_dtypes.bfloat16
    assert [checksum(loaded[k]) for k in trees] == [checksum(trees[k]) for k in trees]
    shutil.rmtree(path / "module_0")
    loaded, _ = load_weights(path, ["module_1"])
    np.testing.assert_array_equal(loaded["module_1"]["kernel"], trees["module_1"]["kernel"])
    with pytest.raises(UserError, match="module_0 is damaged"):
        load_weights(path)
    with pytest.raises(UserError, match="no weights named 'module_9'"):
        load_weights(path, ["module_9"])
    with pytest.raises(UserError, match="holds no finished weights"):
        load_weights(tmp_path)


def test_a_flipped_bit_anywhere_is_refused_or_harmless(tmp_path):
    trees = {"m": weights()["module_0"]}
    save_weights(tmp_path / "w", trees, {})
    refused = []
    for file in sorted(p for p in (tmp_path / "w" / "m").rglob("*") if p.is_file()):
        good = file.read_bytes()
        for at in {len(good) // 3, len(good) // 2, len(good) - 1}:
            bad = bytearray(good)
            bad[at] ^= 4
            file.write_bytes(bad)
            try:
                np.testing.assert_array_equal(
                    load_weights(tmp_path / "w")[0]["m"]["blocks"]["kernel"],
                    trees["m"]["blocks"]["kernel"],
                )
            except UserError as error:
                assert str(tmp_path / "w" / "m") in str(error) and "\n" not in str(error)
                refused.append(str(error))
        file.write_bytes(good)
    assert any("checksum" in message for message in refused)  # what Orbax itself lets pass


def test_weights_appear_whole_or_not_at_all(tmp_path, monkeypatch):
    save_weights(tmp_path / "w", {"m": {"x": np.zeros(3)}}, {"step": 1})

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk full"):
        patch.setattr("m2mkd_jax.checkpoint.store.write_record", fail)
        save_weights(tmp_path / "w", {"m": {"x": np.ones(3)}}, {"step": 2})
    loaded, description = load_weights(tmp_path / "w")
    assert description == {"step": 1} and not loaded["m"]["x"].any()
    save_weights(tmp_path / "w", {"m": {"x": np.ones(3)}}, {"step": 2})  # over the leftovers
    assert [p.name for p in tmp_path.iterdir()] == ["w"]
    with pytest.raises(ValueError, match="cannot name"):
        save_weights(tmp_path / "w", {"../m": {}}, {})


def test_weights_replace_only_weights_that_are_alone(tmp_path):
    tree = {"m": {"x": np.zeros(3)}}

    def refused(path, words):
        before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
        with pytest.raises(UserError, match=words):
            save_weights(path, tree, {})
        assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before

    for name, content in (("notes.txt", "mine"), ("description.json", "{}")):
        (tmp_path / name[0]).mkdir()
        (tmp_path / name[0] / name).write_text(content)
    refused(tmp_path / "n", "n holds other files")
    refused(tmp_path / "d", "description.json is not one of m2mkd_jax")
    refused(tmp_path / "n" / "notes.txt", "is a file")
    save_weights(tmp_path / "w", tree | {"k": {"x": np.zeros(3)}}, {})
    (tmp_path / "w" / "thesis.txt").write_text("mine")
    refused(tmp_path / "w", "w holds thesis.txt, which is none of its weights")
    (tmp_path / "w" / "thesis.txt").unlink()
    (tmp_path / "empty").mkdir()
    for name in ("w", "empty"):
        save_weights(tmp_path / name, tree, {"step": 1})
        assert list(load_weights(tmp_path / name)[0]) == ["m"]
    assert not list(tmp_path.glob(".*"))


def test_match_tree_names_the_first_thing_wrong():
    stages = {i: np.zeros(1) for i in range(11)}  # ints, as nnx.List has; files have strings
    numbered = {str(i): stages[i] for i in stages}
    assert match_tree(numbered, stages, "F") == stages
    have = {"a": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}, "0": np.zeros(1)}
    want = {"a": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}, "0": np.zeros(1)}
    matched = match_tree(have, want, "F")
    assert jax.tree.structure(matched) == jax.tree.structure(want)
    assert matched["a"]["kernel"] is have["a"]["kernel"]
    cases = [
        (
            {"a": {"kernl": 1, "bias": 1}, "0": 1},
            r"F: unexpected array 'a/kernl' \(did you mean 'a/"
            r"kernel'\?\); ",
        ),
        ({"x": 1, "y": 1, **have}, r"unexpected array 'x', and 1 more like it"),
        ({"0": np.zeros(1)}, r"array 'a/bias' is missing, and 1 more"),
        ({**have, "0": np.zeros((1, 1))}, r"'0' has shape \(1, 1\), expected \(1,\)"),
        ({**have, "0": np.zeros(1, np.float16)}, r"'0' has dtype float16, expected float64"),
    ]
    for wrong, message in cases:
        with pytest.raises(UserError, match=message):
            match_tree(wrong, want, "F")


def test_checksum_sees_values_names_shapes_and_dtypes_but_not_order():
    base = {"a": np.zeros((2, 3), np.float32), "b": np.ones(4, np.int32)}
    assert checksum(base) == checksum({"b": jnp.ones(4, jnp.int32), "a": jnp.zeros((2, 3))})
    others = [
        {**base, "a": base["a"].reshape(3, 2)},
        {**base, "a": base["a"].view(np.int32)},
        {**base, "a": -base["a"]},
        {"a": base["a"], "c": base["b"]},
    ]
    assert len({checksum(tree) for tree in [base, *others]}) == 5
