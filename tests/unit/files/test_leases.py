"""Leases: one process holds a directory of a bucket at a time, and the dead hold none."""

import json
import subprocess
import sys
import time
from types import SimpleNamespace

import psutil
import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.files import leases, paths
from m2mkd_jax.jobs import rounds
from m2mkd_jax.jobs.locks import acquire, is_held
from tests.bucket_server import server_of_this_process


@pytest.fixture
def job(request, monkeypatch):
    """A job's directory; leases are renewed and expire at once."""
    server = server_of_this_process()
    monkeypatch.setattr(leases, "RENEW_SECONDS", 0.05)
    monkeypatch.setattr(leases, "EXPIRY_SECONDS", 1.0)
    monkeypatch.setattr(leases, "_alive", {})
    monkeypatch.setattr(leases, "_dead", set())
    yield paths.as_path(f"gs://bucket/{request.node.name}")
    server.objects.buckets["bucket"].clear()


def forget() -> None:
    """What another process would know of the holders."""
    leases._alive.clear()


def put(job, number: int, holder: dict, **content) -> None:
    lease = {"holder": holder, "beat": 0, "token": "", **content}
    paths.write_bytes(job / "lease" / f"{number:08d}", json.dumps(lease).encode())


def elsewhere(**facts) -> dict:
    return {"host": "other", "pid": 7, "place": "other", "began": 0.0, **facts}


def test_a_lease_is_held_until_it_is_given_back(job):
    first = acquire(job)
    assert first is not None and is_held(job)
    assert acquire(job) is None
    first.close()
    assert not is_held(job)
    second = acquire(job)
    assert second is not None
    second.close()
    assert paths.file_names(job) == ["lease/00000002"]


def test_the_lease_of_a_process_that_ended_here_is_free_at_once(job, capsys):
    code = (
        "from m2mkd_jax.files.leases import this_process as t; import json; print(json.dumps(t()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    put(job, 4, json.loads(done.stdout))
    assert not is_held(job)
    began = time.monotonic()
    lease = acquire(job)
    assert lease is not None and time.monotonic() - began < leases.EXPIRY_SECONDS
    assert "is taken over: it has ended" in capsys.readouterr().err
    lease.close()


def test_a_process_is_known_though_the_clock_was_set(monkeypatch):
    """By its number and when it began; not by the clock, from which psutil has its times."""
    holder, began = leases.this_process(), psutil.Process.create_time
    monkeypatch.setattr(psutil.Process, "create_time", lambda process: began(process) + 60.0)
    assert not leases._ended_here(holder)
    # Another process has its number.
    assert leases._ended_here({**holder, "began": holder["began"] - 1})


def test_the_lease_of_another_machine_is_free_once_it_is_not_renewed(job, capsys):
    put(job, 4, elsewhere())
    lease = acquire(job)
    assert lease is not None
    assert "process 7 on other is taken over: it was not renewed" in capsys.readouterr().err
    lease.close()
    # All other leases of that process are then free without waiting.
    put(job, 9, elsewhere())
    began = time.monotonic()
    lease = acquire(job)
    assert lease is not None and time.monotonic() - began < leases.EXPIRY_SECONDS
    lease.close()


def test_of_two_that_take_over_a_dead_lease_one_gets_it(job, monkeypatch):
    put(job, 4, elsewhere())
    wait = leases._wait_until_free

    def slow(directory, number):
        free = wait(directory, number)
        put(job, 5, elsewhere(pid=8))  # the other is faster
        return free

    monkeypatch.setattr(leases, "_wait_until_free", slow)
    assert acquire(job) is None
    # Or it has come and gone, and a third process holds the directory.
    numbers = leases._numbers
    put(job, 7, elsewhere(pid=9))
    found = iter([[4]])
    monkeypatch.setattr(leases, "_wait_until_free", lambda *_: True)
    monkeypatch.setattr(leases, "_numbers", lambda d: next(found, None) or numbers(d))
    (job / "lease" / "00000005").unlink()
    assert acquire(job) is None
    assert paths.file_names(job / "lease") == ["00000004", "00000007"]


def test_a_lease_that_another_took_over_is_lost(job):
    said = []
    lease = leases.lease(job, said.append)
    put(job, 2, elsewhere())
    lease._thread.join(5)
    assert said == [f"{job}: its lease was taken over by process 7 on other"]


def test_a_lease_that_cannot_be_renewed_is_lost(job, monkeypatch):
    said = []
    lease = leases.lease(job, said.append)

    def refuse(*_):
        raise OSError("Forbidden")

    monkeypatch.setattr(leases, "write_bytes", refuse)
    lease._thread.join(5)
    assert said == [f"{job}: its lease cannot be renewed (Forbidden)"]
    lease.close()


def test_a_running_job_refuses_a_second_process(job):
    """As a second command sees it: the only job is refused in one line."""
    lease = acquire(job)
    run = SimpleNamespace(directory=lambda name: job, workdir=job.parent)
    with pytest.raises(UserError, match="another process is running it in gs://bucket"):
        rounds._lock(run, SimpleNamespace(name="pt"), {}, False)
    lease.close()
