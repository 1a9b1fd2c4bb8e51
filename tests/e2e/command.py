"""Running the command of main.py on a config of this folder."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from m2mkd_jax.jobs.progress import CLOCK

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 1200


def environment(factory: pytest.TempPathFactory, fast: bool = True) -> dict:
    """The process's, with one cache of compiled programs for all runs of a test session.

    Args:
        factory: pytest's.
        fast: compile as fast as can be, by kernels that round otherwise from program to program.
    """
    base = factory.getbasetemp()
    # A worker of pytest-xdist has a directory of its own below the session's.
    session = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    # Unoptimised code: these networks are tiny, and compiling them is what takes the time.
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_backend_optimization_level" not in flags:
        flags += " --xla_backend_optimization_level=0"
    if not fast:
        flags = flags.replace("--xla_cpu_use_fusion_emitters=false", "")
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(session / "xla"),
        "XLA_FLAGS": flags.strip(),
    }


def command(config: str, workdir, *flags) -> list[str]:
    file = ROOT / "tests" / "e2e" / f"{config}.py"
    return [
        sys.executable,
        "-m",
        "m2mkd_jax.main",
        f"--config={file}",
        f"--workdir={workdir}",
        *flags,
    ]


def run(config: str, env: dict, workdir, *flags) -> subprocess.CompletedProcess:
    return subprocess.run(
        command(config, workdir, *flags),
        cwd=ROOT,
        env=env,
        timeout=TIMEOUT,
        capture_output=True,
        text=True,
    )


def start(config: str, env: dict, workdir, *flags) -> subprocess.Popen:
    """The command in the background; what it prints on stderr can be read from it."""
    return subprocess.Popen(
        command(config, workdir, *flags),
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_records(file: Path, count: int, process: subprocess.Popen) -> bool:
    """Whether the job wrote that many records before the process ended."""
    deadline = time.monotonic() + TIMEOUT
    while time.monotonic() < deadline:
        if file.is_file() and file.read_bytes().count(b"\n") >= count:
            return True
        if process.poll() is not None:
            return False
        time.sleep(0.005)
    raise AssertionError(f"{file} never had {count} records")


def records(workdir: Path, job: str) -> list[dict]:
    """The log of a job, without clocks."""
    lines = (workdir / "jobs" / job / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in found]


def checksums(workdir: Path) -> dict:
    """Of all finished weights, by job and tree."""
    return {
        (path.parent.parent.relative_to(workdir).as_posix(), name): tree["sha256"]
        for path in sorted(workdir.glob("jobs/**/weights/description.json"))
        for name, tree in json.loads(path.read_text())["trees"].items()
    }


def summary(workdir) -> dict:
    """summary.json without the clock."""
    found = json.loads((workdir / "summary.json").read_text())
    for job in found["jobs"]:
        job.pop("seconds")
    return found
