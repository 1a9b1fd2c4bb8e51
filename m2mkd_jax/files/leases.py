"""Leases: locks of directories in a bucket, where no system frees those of a process that died.

A lease is an object DIRECTORY/lease/NUMBER, which its holder renews. Who wants a lease that is free
makes the object of the next number, which a bucket lets one process alone do; the highest number
holds. A lease is free that was given back, whose holder ended on this machine, or that was not
renewed for EXPIRY_SECONDS, by the clock of who waits: clocks of different machines are never
compared. A holder that cannot renew its lease for so long, or finds a higher number, has lost it.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from m2mkd_jax.files.paths import file_names, file_system, write_bytes

RENEW_SECONDS, EXPIRY_SECONDS = 10.0, 60.0
_POLL_SECONDS = 1.0
FOLDER = "lease"

# What this process has seen of the holders of leases: when one was last seen to renew; who is dead.
_alive: dict[str, float] = {}
_dead: set[str] = set()


def this_process() -> dict[str, Any]:
    """Which process this is: of all machines, and for people."""
    facts = {"host": socket.gethostname(), "pid": os.getpid(), "place": "", "began": 0}
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place = f"{boot} {os.readlink('/proc/self/ns/pid')}"
        return facts | {"place": place, "began": _began(os.getpid())}
    except OSError:  # not Linux
        return facts


def _began(pid: int) -> int:
    """When a process began, in the kernel's ticks since it started; -1 if it has ended.

    Not by the clock, which may be set. Raises OSError where there is no such process.
    """
    state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return -1 if state in "ZX" else int(fields[18])


def _ended_here(holder: Mapping[str, Any]) -> bool:
    """Whether a process ran where this one does, and is gone."""
    mine, began = this_process(), holder.get("began")
    if not mine["place"] or holder.get("place") != mine["place"] or type(began) is not int:
        return False
    try:
        return _began(holder["pid"]) != began
    except OSError:
        return True


def _numbers(directory: Path) -> list[int]:
    names = file_names(directory / FOLDER)
    return sorted(int(name) for name in names if name.isdecimal())


def _read(directory: Path, number: int) -> dict[str, Any]:
    """What a lease says; a damaged or vanished one counts as given back."""
    try:
        found = json.loads((directory / FOLDER / f"{number:08d}").read_bytes())
        return found if isinstance(found, dict) and "holder" in found else {"released": True}
    except (FileNotFoundError, ValueError):
        return {"released": True}


def _who(lease: Mapping[str, Any]) -> str:
    holder = lease["holder"]
    return f"process {holder.get('pid')} on {holder.get('host')}"


def is_leased(directory: Path) -> bool:
    """Whether the lease of a directory is held, as far as one look at it can tell."""
    numbers = _numbers(directory)
    if not numbers:
        return False
    found = _read(directory, numbers[-1])
    if found.get("released") or _ended_here(found["holder"]):
        return False
    path = directory / FOLDER / f"{numbers[-1]:08d}"
    renewed = file_system(path).modified(os.fspath(path))
    return time.time() - renewed.timestamp() < EXPIRY_SECONDS


def _wait_until_free(directory: Path, number: int) -> bool:
    """Whether a lease is free, after a look at it for as long as that takes."""
    first = _read(directory, number)
    if first.get("released"):
        return True
    holder = json.dumps(first["holder"], sort_keys=True)
    if _ended_here(first["holder"]):
        print(
            f"{directory}: the lease of {_who(first)} is taken over: it has ended", file=sys.stderr
        )
        return True
    if holder in _dead:
        return True
    if time.monotonic() - _alive.get(holder, -EXPIRY_SECONDS) < EXPIRY_SECONDS:
        return False
    began = time.monotonic()
    while time.monotonic() - began < EXPIRY_SECONDS:
        time.sleep(min(_POLL_SECONDS, RENEW_SECONDS / 4))
        now = _read(directory, number)
        if now.get("released"):
            return True
        if now != first:
            _alive[holder] = time.monotonic()
            return False
    _dead.add(holder)
    print(
        f"{directory}: the lease of {_who(first)} is taken over: it was not renewed for "
        f"{EXPIRY_SECONDS:.0f} s",
        file=sys.stderr,
    )
    return True


class Lease:
    """A lease that this process holds, and renews in the background until it is closed.

    Args:
        directory: that it is of.
        number: of its object, which exists.
        content: what the object says.
        lost: called with one line, in the background, where the lease is lost.
    """

    def __init__(
        self, directory: Path, number: int, content: dict[str, Any], lost: Callable[[str], None]
    ):
        self._directory, self._number, self._content, self._lost = directory, number, content, lost
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def _write(self, **changes: Any) -> None:
        self._content = self._content | changes
        path = self._directory / FOLDER / f"{self._number:08d}"
        write_bytes(path, json.dumps(self._content).encode())

    def _renew(self) -> None:
        renewed = time.monotonic()
        while not self._over.wait(RENEW_SECONDS):
            reason = ""
            try:
                numbers = _numbers(self._directory)
                if numbers and numbers[-1] > self._number:
                    taken = _who(_read(self._directory, numbers[-1]))
                    self._lost(f"{self._directory}: its lease was taken over by {taken}")
                    return
                self._write(beat=self._content["beat"] + 1)
                renewed = time.monotonic()
            except Exception as error:  # whatever the storage complains of
                reason = " ".join(str(error).split())[:200] or type(error).__name__
            if time.monotonic() - renewed > EXPIRY_SECONDS:
                self._lost(f"{self._directory}: its lease cannot be renewed ({reason})")
                return

    def close(self) -> None:
        """Gives the lease back; once is enough."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join()
        with contextlib.suppress(Exception):  # else it expires
            self._write(released=True)


def lease(directory: Path, lost: Callable[[str], None]) -> Lease | None:
    """Takes the lease of a directory in a bucket.

    Args:
        directory: in a bucket.
        lost: see `Lease`.

    Returns:
        The lease; None: another process has it.
    """
    numbers = _numbers(directory)
    if numbers and not _wait_until_free(directory, numbers[-1]):
        return None
    number = (numbers or [0])[-1] + 1
    path = directory / FOLDER / f"{number:08d}"
    content = {"holder": this_process(), "beat": 0, "token": uuid.uuid4().hex}
    try:
        file_system(path).pipe_file(os.fspath(path), json.dumps(content).encode(), mode="create")
    except FileExistsError:
        # A request that was repeated finds what it made itself.
        if _read(directory, number).get("token") != content["token"]:
            return None
    now = _numbers(directory)
    if now[-1] > number:  # this number had been taken, given back and removed meanwhile
        path.unlink(missing_ok=True)
        return None
    for old in now[:-1]:
        (directory / FOLDER / f"{old:08d}").unlink(missing_ok=True)
    return Lease(directory, number, content, lost)
