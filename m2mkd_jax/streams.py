"""The standard streams of a command: closed ones, and an output that takes nothing more; no jax."""

from __future__ import annotations

import contextlib
import io
import os
import stat
import sys


def open_missing() -> None:
    """Opens standard streams that are closed (`>&-`), to nothing.

    Python has None in their place. The first files of a run would get their numbers, and what a
    library prints would go into these files.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:  # the lowest free number is the one that a file gets
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w"))


def abandon_output() -> None:
    """Sends what is still to be printed to nowhere: at the exit Python would complain of it."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a number
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def output_failed() -> bool:
    """Whether nothing can be printed, as on a full disk, by an empty line; it is then abandoned."""
    try:
        print(flush=True)
    except OSError:
        abandon_output()
        return True
    return False


def leave_terminal() -> None:
    """Sends what is printed on a terminal, which is being closed, to nowhere."""
    for stream in (sys.stdout, sys.stderr):
        # A closed terminal does not say that it is one.
        with contextlib.suppress(OSError, ValueError, io.UnsupportedOperation):
            if stat.S_ISCHR(os.fstat(stream.fileno()).st_mode):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
