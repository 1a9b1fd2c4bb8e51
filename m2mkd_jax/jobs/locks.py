"""Locks of jobs: one process trains a job at a time. The system frees a dead process's locks."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import IO

from m2mkd_jax.parallel import file_lock

# Errors of a lock that another process has; others mean that the file system has no locks.
TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)


def acquire(directory: Path) -> IO[str] | None:
    """Locks a job's directory until the returned file is closed.

    Where the file system has no locks it says so, and goes on without.

    Returns:
        The file; None: another process has the lock.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = (directory / "lock").open("w")
    try:
        file_lock.lock(lock)
    except OSError as error:
        if error.errno in TAKEN:
            lock.close()
            return None
        print(
            f"warning: the file system of {directory} has no locks ({error.strerror}); let no "
            "other process run the same job there",
            file=sys.stderr,
        )
    return lock


def is_held(directory: Path) -> bool:
    """Whether another process has the lock of a job's directory."""
    path = directory / "lock"
    if not path.is_file():
        return False
    with path.open() as lock:
        try:
            file_lock.lock(lock, shared=True)
        except OSError as error:
            return error.errno in TAKEN
    return False
