"""Runs that are killed or stopped at random moments end with the weights of one that was not.

CHAOS_KILLS and CHAOS_SIGNALS set how many, CHAOS_SEED where, CHAOS_CONFIGS of which configs. With
CHAOS_PROCESSES above 1 a run has so many processes, of which a kill hits one; signals go to the
launcher. `make chaos` runs this file; the kills of `make test` are those of tests/e2e.
"""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.command import checksums

SEED = int(os.environ.get("CHAOS_SEED", "0"))
KILLS = int(os.environ.get("CHAOS_KILLS", "2"))
SIGNALS = int(os.environ.get("CHAOS_SIGNALS", "2"))
ROOT = Path(__file__).parents[2]
CONFIGS = os.environ.get("CHAOS_CONFIGS", "tests/e2e/tiny.py,tests/e2e/tiny_vmoe.py").split(",")
PROCESSES = int(os.environ.get("CHAOS_PROCESSES", "1"))
LONGEST = 60.0  # seconds; moments in longer runs are drawn as in one of so many
PREEMPTED = 3


def start(config, workdir):
    command = [sys.executable, "-m", "m2mkd_jax.main"]
    if PROCESSES > 1:
        command = [ROOT / "launch" / "local.sh", "-n", str(PROCESSES), "--"]
    return subprocess.Popen(
        [*command, f"--config={ROOT / config}", f"--workdir={workdir}"],
        cwd=ROOT,
        # Whole runs: compiled as users' are.
        env={**os.environ, "XLA_FLAGS": "", "PYTHON": sys.executable},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(config, workdir):
    run = start(config, workdir)
    error = run.communicate()[1]
    assert run.returncode == 0, error


def results(workdir):
    summary = json.loads((workdir / "summary.json").read_text())
    return [(job["name"], job["status"], job["steps"], job["metrics"]) for job in summary["jobs"]]


def files(workdir):
    """Paths of all files, without checkpoints and Orbax's data files, whose names are random."""
    found = [path.relative_to(workdir) for path in workdir.rglob("*") if path.is_file()]
    return sorted(
        {p.as_posix() for p in found if p.parent.name != "d" and "checkpoints" not in p.parts}
    )


def most_checkpoints(workdir):
    """The largest number of checkpoints, and of what is left of others, in a job's directory."""
    return max(len(list(path.iterdir())) for path in workdir.glob("jobs/**/checkpoints"))


@pytest.fixture(scope="module", params=CONFIGS)
def whole(request, tmp_path_factory):
    """A run that nothing disturbs, its config and its seconds; it also fills the cache."""
    finish(request.param, tmp_path_factory.mktemp("cache"))
    workdir = tmp_path_factory.mktemp("whole")
    began = time.monotonic()
    finish(request.param, workdir)
    return request.param, workdir, min(time.monotonic() - began, LONGEST)


def assert_same(whole, workdir):
    assert checksums(workdir) == checksums(whole)
    assert results(workdir) == results(whole)
    assert files(workdir) == files(whole)
    assert most_checkpoints(workdir) <= 3  # the latest two and the best


def strike(config, directory, draw, count, span, end):
    """Runs that are struck `count` times in all at random moments, then go on to their ends.

    Args:
        config: of the run.
        directory: of the workdirs; one that has ended is followed by another.
        draw: source of the moments.
        count: how often.
        span: earliest and latest moment, seconds.
        end: (run) -> None, strikes a run and waits for it.

    Returns:
        The workdirs, all of them with finished runs.
    """
    workdirs, left = [directory / "0"], count
    while left:
        run = start(config, workdirs[-1])
        try:
            run.wait(draw.uniform(*span))
            error = run.communicate()[1]
            assert run.returncode == 0, error
            workdirs.append(directory / str(len(workdirs)))
        except subprocess.TimeoutExpired:
            end(run)
            left -= 1
    finish(config, workdirs[-1])
    return workdirs


def processes(run):
    """The processes of a run, as far as they have not ended."""
    if PROCESSES == 1:
        return [run.pid]
    listed = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


def test_killed_at_random_moments(whole, tmp_path):
    config, expected, seconds = whole
    kills, draw = [], random.Random(SEED)

    def kill(run):
        os.kill(draw.choice(processes(run)), signal.SIGKILL)
        error = run.communicate(timeout=120)[1]
        assert "Traceback" not in error, error
        kills.append(run.returncode)

    span = (0.1 * seconds, 0.6 * seconds)
    workdirs = strike(config, tmp_path, draw, KILLS, span, kill)
    hit = len(kills) - kills.count(0)
    print(f"{config}, {PROCESSES} processes, seed {SEED}: {hit} kills over {len(workdirs)} runs")
    for workdir in workdirs:
        assert_same(expected, workdir)


def test_stopped_by_signals_at_random_moments(whole, tmp_path):
    config, expected, seconds = whole
    codes, numbers = [], itertools.cycle((signal.SIGTERM, signal.SIGINT))

    def stop(run):
        number = next(numbers)
        run.send_signal(number)
        error = run.communicate(timeout=120)[1]
        assert "Traceback" not in error, error
        # While Python itself starts, a signal ends the process as any other.
        codes.append(run.returncode)
        assert run.returncode in (0, PREEMPTED, -number, 128 + number), error

    span = (0.2 * seconds, 0.6 * seconds)
    workdirs = strike(config, tmp_path, random.Random(SEED + 1), SIGNALS, span, stop)
    print(f"{config}, seed {SEED}: exit codes {codes} over {len(workdirs)} runs")
    for workdir in workdirs:
        assert_same(expected, workdir)
