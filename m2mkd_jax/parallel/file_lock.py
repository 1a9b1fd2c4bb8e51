"""Locks of open files that the system frees with the process; POSIX and Windows.

The two calls are the standard library's. The packages for this (portalocker, filelock) would be one
more requirement of every installation; filelock has no shared locks, by which the lock of another
process is looked at.
"""

from __future__ import annotations

import errno
import importlib
from typing import IO, Any


def lock(file: IO[str], *, shared: bool = False) -> None:
    """Locks a file until it is closed, without waiting.

    Args:
        file: open; for reading alone is enough for a shared lock.
        shared: others may share it. Windows has no such locks here: there it is let go at once.

    Raises:
        OSError: another process has the lock (EACCES, EAGAIN), or the file system has none.
    """
    try:
        posix: Any = importlib.import_module("fcntl")
    except ImportError:
        _lock_on_windows(file, keep=not shared)
        return
    posix.flock(file, (posix.LOCK_SH if shared else posix.LOCK_EX) | posix.LOCK_NB)


def _lock_on_windows(file: IO[str], keep: bool) -> None:
    """Locks the first byte, which the file need not have."""
    try:
        windows: Any = importlib.import_module("msvcrt")
    except ImportError:
        raise OSError(errno.ENOLCK, "this system has no locks of files") from None
    file.seek(0)
    windows.locking(file.fileno(), windows.LK_NBLCK, 1)
    if not keep:
        file.seek(0)
        windows.locking(file.fileno(), windows.LK_UNLCK, 1)
