"""What the machine does to a run: full, read-only and vanished disks, odd names, a clock set back.

A port that is taken is in tests/unit/parallel/test_agreement.py, a hung process in
tests/multidevice/test_watchdog.py.
"""

import contextlib
import errno
import itertools
import json
import os
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from absl import logging

from m2mkd_jax.checkpoint.files import write_record
from m2mkd_jax.checkpoint.orbax_tree import attempt
from m2mkd_jax.checkpoint.steps import saved_steps
from m2mkd_jax.checkpoint.store import RunCheckpoints, load_weights, save_weights
from m2mkd_jax.config.defaults import module_recipe
from m2mkd_jax.errors import Lost, UserError
from m2mkd_jax.jobs import pipeline, rounds, training
from m2mkd_jax.main import command as main
from m2mkd_jax.train.schedule import learning_rate
from m2mkd_jax.train.stops import Preempted
from tests.e2e import tiny
from tests.unit.checkpoint.test_store import abstract, assert_same, make_state

NOBODY = 65534


@pytest.fixture(autouse=True)
def quiet():
    """As the command has it: Orbax logs stacks of what it raises."""
    before = logging.get_absl_logger().level
    logging.get_absl_logger().setLevel("CRITICAL")
    yield
    logging.get_absl_logger().setLevel(before)


@contextlib.contextmanager
def small_disk():
    """A directory, and what fills its file system; where mounting is not allowed, a limit on files.

    The limit is that of `ulimit -f`, which the system answers with another error.
    """
    directory = tempfile.mkdtemp()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", directory]
    if shutil.which("mount") and not subprocess.run(mount, capture_output=True).returncode:
        try:
            yield Path(directory), fill
        finally:
            subprocess.run(["umount", "-l", directory], check=True)
            os.rmdir(directory)
    else:
        with file_limit() as limited:
            yield limited


@contextlib.contextmanager
def file_limit():
    """A directory, and what forbids files of more than 100 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    @contextlib.contextmanager
    def limited(_):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory), limited


@contextlib.contextmanager
def fill(directory):
    """Fills the file system of a directory."""
    path = directory / "fill"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(1024)):
            pass
    yield
    path.unlink()


@contextlib.contextmanager
def read_only(directory):
    """Takes away the right to write; from root too, who becomes another user."""
    for path in [directory, *directory.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    root = os.geteuid() == 0
    if root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)
        for path in [directory, *directory.rglob("*")]:
            path.chmod(0o755 if path.is_dir() else 0o644)


@contextlib.contextmanager
def open_directory():
    """A directory into which every user may go, and what makes it read-only."""
    with tempfile.TemporaryDirectory() as directory:
        yield Path(directory), read_only


@pytest.mark.parametrize("disk", [small_disk, file_limit, open_directory])
def test_a_disk_that_refuses_costs_the_save_alone(disk):
    """The error is one of those that the command answers with a line; the step before is whole."""
    state = make_state(10, size=8)
    with disk() as (directory, trouble):
        checkpoints = RunCheckpoints(directory / "run")
        checkpoints.save(10, state)
        checkpoints.wait()
        with trouble(directory):
            with pytest.raises(OSError) as refused:
                checkpoints.save(20, make_state(20, size=8))
                checkpoints.wait()
            assert refused.value.errno in main.USER_ERRORS and refused.value.filename
            with pytest.raises(OSError) as refused:
                save_weights(directory / "weights", {"m": state["params"]}, {})
            assert refused.value.errno in main.USER_ERRORS and refused.value.filename
        with contextlib.suppress(Exception):  # of the save that failed, once more
            checkpoints.close()
        assert sorted(p.name for p in directory.iterdir()) == ["run"]
        again = RunCheckpoints(directory / "run")
        restored = again.restore_latest(abstract(state))
        assert restored is not None
        step, whole = restored  # 20 where Orbax's threads came to it after the trouble only
        assert_same(whole, make_state(step, size=8))
        assert again.save(20, make_state(20, size=8)) == (step == 10)
        again.close()
        assert sorted(p.name for p in (directory / "run").iterdir()) == ["10", "20"]


def test_a_vanished_directory_is_not_made_again(tmp_path):
    checkpoints = RunCheckpoints(tmp_path / "run")
    checkpoints.save(10, make_state(10, size=8))
    checkpoints.wait()
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(UserError, match="has vanished, with the checkpoints in it"):
        checkpoints.save(20, make_state(20, size=8))
    assert not (tmp_path / "run").exists()
    checkpoints.close()


def of_system(code, *name):
    return OSError(code, os.strerror(code), *name)


LINES = {
    "a full disk": (of_system(errno.ENOSPC), 2, "runs/a: No space left on device"),
    "too many files": (of_system(errno.EMFILE, "b"), 2, "b: Too many open files"),
    "a bad disk": (of_system(errno.EIO, "b"), 2, "b: Input/output error"),
    "a lost disk": (
        of_system(errno.ENOENT, "/none/a/b"),
        2,
        "/none/a has vanished; restore it, and run the same command again",
    ),
    "a lost worker": (
        Lost("a worker was ended"),
        4,
        "a worker was ended; run the same command again",
    ),
}


@pytest.mark.parametrize(("error", "code", "line"), LINES.values(), ids=LINES)
def test_the_line_on_what_the_system_refuses(error, code, line, monkeypatch, capsys):
    def run(*_):
        raise error

    monkeypatch.setattr(main, "_run", run)
    monkeypatch.setattr(main, "CONFIG", type("Flag", (), {"value": None}))
    monkeypatch.setattr(main, "WORKDIR", type("Flag", (), {"value": "runs/a"}))
    monkeypatch.setattr(main.signal, "signal", lambda *_: None)  # pytest keeps its own
    assert main.main([]) == code
    assert capsys.readouterr().err == f"m2mkd_jax: {line}\n"


def test_after_an_error_no_thread_is_waited_for(monkeypatch):
    """Orbax's wait for minutes for a directory that cannot be made."""
    ended = []
    monkeypatch.setattr(main.os, "_exit", ended.append)
    for code in (0, main.WRONG_INPUT, main.PREEMPTED):
        monkeypatch.setattr(main, "main", lambda _, code=code: code)
        assert main._to_the_end([]) == code
    assert ended == [main.WRONG_INPUT]


def test_a_checkpoint_that_may_not_be_read_now_is_not_damaged(tmp_path):
    checkpoints = RunCheckpoints(tmp_path / "run")
    for step in (10, 20):
        checkpoints.save(step, make_state(step, size=8))
        checkpoints.wait()
    shut = tmp_path / "run" / "20" / "state"
    tmp_path.chmod(0o755)
    tmp_path.parent.chmod(0o755)
    shut.chmod(0)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(NOBODY)
        with pytest.raises(PermissionError):
            checkpoints.restore_latest(abstract(make_state(0, size=8)))
    finally:
        if root:
            os.seteuid(0)
        shut.chmod(0o755)
    step, _ = checkpoints.restore_latest(abstract(make_state(0, size=8)))
    assert step == 20
    checkpoints.close()


@pytest.mark.parametrize(
    "error",
    [
        of_system(errno.EMFILE),
        MemoryError(),
        ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8 bytes"),
        ValueError("NOT_FOUND: Error opening [source locations='os_error_code='24'']"),
    ],
)
def test_what_says_nothing_of_a_file_is_no_damage(error):
    def read():
        raise error

    with pytest.raises(type(error)):
        attempt(read)
    assert attempt(lambda: {}["a"]) == (None, "'a'")


def test_a_summary_that_cannot_be_written_hides_nothing(tmp_path, monkeypatch):
    def refuse(*_):
        raise of_system(errno.ENOSPC)

    def stopped(*_, **__):
        raise Preempted("stopped by a signal")

    monkeypatch.setattr(pipeline, "enable_compilation_cache", lambda: None)
    monkeypatch.setattr(pipeline, "summarise", refuse)
    monkeypatch.setattr(pipeline, "run_training", stopped)
    config = tiny.get_config()
    config.phases = ("pt",)
    with pytest.raises(Preempted):
        pipeline.run(config, tmp_path)
    monkeypatch.setattr(pipeline, "run_training", lambda *_, **__: None)
    with pytest.raises(OSError, match="No space"):
        pipeline.run(config, tmp_path)


def test_a_directory_that_vanishes_while_a_state_is_saved_is_told(tmp_path, monkeypatch):
    """Orbax makes a new one in its place, and fails."""
    monkeypatch.setattr(pipeline, "enable_compilation_cache", lambda: None)
    workdir, save = tmp_path / "run", training.RunCheckpoints.save

    def saved(self, *arguments):
        save(self, *arguments)
        self.wait()
        workdir.rename(tmp_path / "renamed")
        (workdir / "jobs" / "pt" / "checkpoints").mkdir(parents=True)
        raise ValueError("No ArrayMetadata found")

    monkeypatch.setattr(training.RunCheckpoints, "save", saved)
    config = tiny.get_config()
    config.phases, config.recipes.pt.epochs = ("pt",), 1
    with pytest.raises(UserError, match="jobs/pt has vanished"):
        pipeline.run(config, workdir)
    assert not [path for path in workdir.rglob("*") if path.is_file()]
    assert saved_steps(tmp_path / "renamed" / "jobs" / "pt" / "checkpoints") == [10]


@pytest.mark.parametrize("what", ["vanished", "another"])
def test_a_result_stays_with_its_run(what, tmp_path, monkeypatch):
    """A directory that was renamed, or that another run has taken, gets no weights."""
    monkeypatch.setattr(pipeline, "enable_compilation_cache", lambda: None)
    workdir, close = tmp_path / "run", training.RunCheckpoints.close

    def closed(self):
        close(self)
        if workdir.exists():
            workdir.rename(tmp_path / "renamed")
        if what == "another":
            write_record(workdir / "jobs/pt/inputs.json", {"run": {"id": "another"}})

    monkeypatch.setattr(training.RunCheckpoints, "close", closed)
    config = tiny.get_config()
    config.phases, config.recipes.pt.epochs = ("pt",), 1
    line = "has vanished" if what == "vanished" else "is now of another run"
    with pytest.raises(UserError, match=f"jobs/pt {line}"):
        pipeline.run(config, workdir)
    assert not (workdir / "jobs" / "pt" / "weights").exists()
    assert workdir.exists() == (what == "another")


def test_odd_names_a_clock_set_back_and_more_epochs(tmp_path, monkeypatch, capsys):
    """One run of one job: in a directory with such a name, while the clock goes backwards."""
    monkeypatch.setattr(pipeline, "enable_compilation_cache", lambda: None)
    clock = itertools.count(2 * 10**9, -3600)
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    monkeypatch.setattr(time, "time_ns", lambda: next(clock) * 10**9)
    seconds = SimpleNamespace(monotonic=itertools.count(0, 1000).__next__)
    for module in (rounds, training):
        monkeypatch.setattr(module, "time", seconds)
    workdir = tmp_path / "mein Lauf, größer: 100 %" / "実験 'a'"
    config = tiny.get_config()
    config.phases, config.log_every, config.recipes.pt.epochs = ("pt",), 1, 1
    (first,) = pipeline.run(config, workdir)["jobs"]
    assert first["steps"] == 10
    config.recipes.pt.epochs = 2
    with pytest.raises(UserError, match=r"--extend=pt goes on with it to 2 epochs"):
        pipeline.run(config, workdir)
    capsys.readouterr()
    (longer,) = pipeline.run(config, workdir, extend="pt")["jobs"]
    assert longer["steps"] == 20 and longer["seconds"] > first["seconds"]  # of both starts
    said = capsys.readouterr().out
    assert said.count("[pt] extended from 1 to 2 epochs from step 10 on, where its learning") == 1
    assert said.count("[pt] resumed at step 10/20") == 1
    lines = (workdir / "jobs" / "pt" / "metrics.jsonl").read_text().splitlines()
    rates = {entry["step"]: entry["lr"] for entry in map(json.loads, lines) if "lr" in entry}
    assert sorted(rates) == list(range(1, 21))
    for epochs, steps in ((1, range(1, 11)), (2, range(11, 21))):
        config.recipes.pt.epochs = epochs
        rate = learning_rate(module_recipe(config, "pt"), 10)
        assert [rates[s] for s in steps] == pytest.approx([float(rate(s - 1)) for s in steps])
    assert load_weights(workdir / "jobs" / "pt" / "weights")[1]["step"] == 20
