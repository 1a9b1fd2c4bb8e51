"""Locks of jobs: one process trains a job at a time.

In a directory the system frees a dead process's lock; a bucket has leases instead.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from typing import IO, Protocol

from m2mkd_jax.files.leases import is_leased, lease
from m2mkd_jax.files.paths import in_bucket
from m2mkd_jax.parallel import file_lock, process
from m2mkd_jax.parallel.watchdog import LOST

# Errors of a lock that another process has; others mean that the file system has no locks.
TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
LOOK_SECONDS = 0.4  # more than `is_held` of another process has a lock


class Lock(Protocol):
    """A lock that is held until it is closed."""

    def close(self) -> None:
        """Lets others have it."""


def _lost(line: str) -> None:
    """Ends the run at once: another process may train the job already."""
    os._exit(process.fail(f"m2mkd_jax: {line}; run the same command again", LOST))


def acquire(directory: Path) -> Lock | None:
    """Locks a job's directory until what is returned is closed.

    Where the file system has no locks it says so, and goes on without.

    Returns:
        The lock; None: another process has it.
    """
    if in_bucket(directory):
        return lease(directory, _lost)
    directory.mkdir(parents=True, exist_ok=True)
    lock, until = (directory / "lock").open("w"), time.monotonic() + LOOK_SECONDS
    try:
        while not _locked(lock):
            if time.monotonic() > until:
                lock.close()
                return None
            time.sleep(LOOK_SECONDS / 20)
    except OSError as error:
        print(
            f"warning: the file system of {directory} has no locks ({error.strerror}); let no "
            "other process run the same job there",
            file=sys.stderr,
        )
    return lock


def _locked(lock: IO[str]) -> bool:
    """Locks a file, unless another process has the lock. Raises OSError: there are no locks."""
    try:
        file_lock.lock(lock)
    except OSError as error:
        if error.errno in TAKEN:
            return False
        raise
    return True


def is_held(directory: Path) -> bool:
    """Whether another process has the lock of a job's directory."""
    if in_bucket(directory):
        return is_leased(directory)
    path = directory / "lock"
    if not path.is_file():
        return False
    with path.open() as lock:
        try:
            file_lock.lock(lock, shared=True)
        except OSError as error:
            return error.errno in TAKEN
    return False
