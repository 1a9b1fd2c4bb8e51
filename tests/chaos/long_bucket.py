"""The digits' whole V-MoE pipeline in a bucket, killed twice, ends as in a directory.

`make bucket` runs this file, against the storage server of tests/bucket_server.py on loopback.
CHAOS_SEED says where the run is killed, BUCKET_EPOCHS how many epochs every phase has (0: those of
the config).
"""

import json
import os
import random
import re
import subprocess
import sys
import time
from pathlib import Path

from tests.bucket_server import serving

SEED = int(os.environ.get("CHAOS_SEED", "0"))
EPOCHS = int(os.environ.get("BUCKET_EPOCHS", "0"))
ROOT = Path(__file__).parents[2]
RECIPES = ("pt", "mt", "ft", "m2mkd", "e2e")
# In the order in which they run; one kill strikes the jobs of modules, one a whole network's.
KILLED = (("mt/1", "m2mkd/0", "m2mkd/2"), ("e2e", "e2e/1", "e2e_scratch"))
TIMEOUT = 7200


def flags() -> list[str]:
    if not EPOCHS:
        return []
    short = [(f"{name}.epochs={EPOCHS}", f"{name}.warmup_epochs=1") for name in RECIPES]
    whole = [f"--config.recipes.{flag}" for pair in short for flag in pair]
    return [*whole, "--config.recipes.mt.modules={}", "--config.recipes.m2mkd.modules={}"]


def start(workdir: str | Path, env: dict, log: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "m2mkd_jax.main", f"--config={ROOT}/configs/vmoe_digits.py"]
    with open(log, "wb") as file:
        return subprocess.Popen(
            [*command, f"--workdir={workdir}", *flags()],
            cwd=ROOT,
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
        )


def finish(workdir: str | Path, env: dict, log: Path) -> None:
    code = start(workdir, env, log).wait(TIMEOUT)
    assert code == 0, log.read_text()


def summary(content: str | bytes) -> dict:
    """summary.json without the clock."""
    found = json.loads(content)
    for job in found["jobs"]:
        job.pop("seconds")
    return found


def kill_in(job: str, objects: dict, run: subprocess.Popen, log: Path, delay: float) -> None:
    """Kills a run a moment after the first checkpoint of a job is whole."""
    saved = re.compile(f"run/jobs/{job}/checkpoints/[0-9]+/commit_success.txt")
    deadline = time.monotonic() + TIMEOUT
    while not any(map(saved.fullmatch, list(objects))):
        assert time.monotonic() < deadline and run.poll() is None, log.read_text()
        time.sleep(0.02)
    time.sleep(delay)
    run.kill()
    assert run.wait() < 0, log.read_text()


def test_the_whole_pipeline_in_a_bucket_killed_twice(tmp_path):
    draw, log = random.Random(SEED), tmp_path / "printed"
    began = time.monotonic()
    # Compiled as a run is: the tests' own flags round otherwise from program to program.
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    finish(tmp_path / "run", env, log)
    print(f"in a directory: {time.monotonic() - began:.0f} s")
    with serving("bucket") as server:
        env |= server.environment | {"M2MKD_SCRATCH": str(tmp_path / "scratch")}
        objects, began = server.objects.buckets["bucket"], time.monotonic()
        for jobs in KILLED:
            job, delay = draw.choice(jobs), draw.uniform(0, 0.5)
            kill_in(job, objects, start("gs://bucket/run", env, log), log, delay)
            done = sorted(n.split("/", 2)[2] for n in list(objects) if n.endswith("/done.json"))
            print(f"seed {SEED}: killed {delay:.2f} s after the first checkpoint of {job}; {done}")
        finish("gs://bucket/run", env, log)
        print(f"in the bucket: {time.monotonic() - began:.0f} s, {len(objects)} objects")
        print("\n".join(line for line in log.read_text().splitlines() if "resumed at" in line))
        remote = {name.removeprefix("run/"): data for name, (data, _) in objects.items()}
    local = tmp_path / "run"
    assert summary(remote["summary.json"]) == summary((local / "summary.json").read_bytes())
    for path in sorted(local.glob("jobs/**/weights/description.json")):
        name = path.relative_to(local).as_posix()
        mine, theirs = (
            json.loads(content)["trees"] for content in (path.read_bytes(), remote[name])
        )
        assert mine == theirs, name  # checksums of the arrays: equal byte for byte
    print(json.dumps(summary(remote["summary.json"])["jobs"], indent=None)[:2000])
