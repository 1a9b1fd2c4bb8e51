"""A run in a bucket, of a server on loopback: killed twice and resumed, and what is refused."""

import json
import os
import re
import signal
import time

import psutil
import pytest

from m2mkd_jax.files import leases, paths
from m2mkd_jax.jobs.progress import CLOCK
from m2mkd_jax.report.records import read_run
from tests.bucket_server import server_of_this_process
from tests.e2e import command as commands
from tests.e2e.forked import Forks

FLAGS = [
    f"--config={commands.ROOT / 'tests' / 'e2e' / 'tiny.py'}",
    "--only=pt,mt/0",
    "--config.data.train_images=96",
    *(f"--config.recipes.{phase}.epochs=2" for phase in ("pt", "mt")),
]
JOBS = ("pt", "mt/0")


def objects() -> dict:
    return server_of_this_process().objects.buckets["bucket"]


@pytest.fixture(scope="module")
def forks(tmp_path_factory):
    server = server_of_this_process()
    folder = tmp_path_factory.mktemp("forks")
    scratch = {"M2MKD_SCRATCH": str(folder / "scratch")}
    env = commands.environment(tmp_path_factory) | server.environment | scratch
    with Forks(env, folder / "printed") as found:
        yield found


def entries(content: bytes) -> list[dict]:
    found = [json.loads(line) for line in content.splitlines()]
    return [{k: v for k, v in entry.items() if k not in CLOCK} for entry in found]


def test_a_bucket_that_is_none_is_refused_in_one_line(forks):
    before = dict(objects())
    for workdir, said in (
        ("gs://nowhere/run", "there is no such bucket"),
        ("gs://forbidden/run", "the bucket cannot be used"),
        ("s3://bucket/run", "s3:// cannot hold a run"),
    ):
        code, printed = forks.run(*FLAGS, f"--workdir={workdir}")
        lines = [line for line in printed.splitlines() if "google_auth_provider" not in line]
        assert code == 2 and len(lines) == 1 and said in lines[0], printed
    assert objects() == before


def test_a_second_process_is_refused(forks, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.2)
    held = leases.lease(paths.as_path("gs://bucket/held/jobs/pt"), pytest.fail)
    code, printed = forks.run(*FLAGS, "--workdir=gs://bucket/held")
    held.close()
    assert code == 2, printed
    assert "pt: another process is running it in gs://bucket/held" in printed


def test_killed_twice_and_resumed_it_ends_as_in_a_directory(forks, tmp_path):
    code, printed = forks.run(*FLAGS, f"--workdir={tmp_path}")
    assert code == 0, printed
    for job in ("pt", "mt/0"):
        child = forks.start(*FLAGS, "--workdir=gs://bucket/run")
        saved = re.compile(f"run/jobs/{job}/checkpoints/[0-9]+/commit_success.txt")
        deadline = time.monotonic() + commands.TIMEOUT
        while not any(map(saved.fullmatch, list(objects()))):
            assert time.monotonic() < deadline and psutil.pid_exists(child), forks.log.read_text()
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        assert forks.wait()[0] == -signal.SIGKILL
        assert f"run/jobs/{job}/done.json" not in objects()
    code, printed = forks.run(*FLAGS, "--workdir=gs://bucket/run")
    assert code == 0, printed
    assert "[mt/0] resumed at step" in printed and "has ended" in printed
    remote = {name.removeprefix("run/"): data for name, (data, _) in objects().items()}
    mine, local = (
        json.loads(text)
        for text in (remote["summary.json"], (tmp_path / "summary.json").read_bytes())
    )
    for found in (mine, local):
        for job in found["jobs"]:
            job.pop("seconds")
    assert mine == local
    for job in JOBS:
        log, weights = f"jobs/{job}/metrics.jsonl", f"jobs/{job}/weights/description.json"
        steps = [entry["step"] for entry in entries(remote[log])]
        assert steps == sorted(steps)
        evaluated = [
            [e for e in entries(content) if "eval_accuracy" in e]
            for content in (remote[log], (tmp_path / log).read_bytes())
        ]
        assert evaluated[0] == evaluated[1] and evaluated[0]
        # Checksums of the arrays: equal byte for byte.
        trees = [
            json.loads(c)["trees"] for c in (remote[weights], (tmp_path / weights).read_bytes())
        ]
        assert trees[0] == trees[1] and trees[0]
    shown = read_run(paths.as_path("gs://bucket/run")).jobs
    assert {shown[job].status for job in JOBS} == {"done"}
