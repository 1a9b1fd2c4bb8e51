"""Running the command of main.py on a config of this folder."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 1200


def environment(cache: str) -> dict:
    """The process's, with one cache of compiled programs for all runs of a file."""
    # Unoptimised code: these networks are tiny, and compiling them is what takes the time.
    flags = "--xla_backend_optimization_level=0"
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": cache,
        "XLA_FLAGS": flags,
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


def summary(workdir) -> dict:
    """summary.json without the clock."""
    found = json.loads((workdir / "summary.json").read_text())
    for job in found["jobs"]:
        job.pop("seconds")
    return found
