"""Signals that end a command: quietly, and not before it has tidied up; loads no jax.

Python drops what is raised inside a callback of the garbage collector or a destructor. A signal
that arrives there is raised again, until it is heard.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

AGAIN_SECONDS = 1.0
_ALARM: int | None = getattr(signal, "SIGALRM", None)  # Windows has none


class Stopped(BaseException):
    """A signal arrived that ends the command."""


def raising(make: Callable[[int], BaseException]) -> Callable[[int, FrameType | None], None]:
    """A handler of signals that raises, again and again until `heard` is called.

    Args:
        make: the exception, of the signal's number.
    """

    def handler(number: int, _: FrameType | None) -> None:
        if _ALARM is not None:
            signal.signal(_ALARM, lambda *_: handler(number, None))
            signal.setitimer(signal.ITIMER_REAL, AGAIN_SECONDS)
        error = make(number)
        _say_nothing_of(error)
        raise error

    return handler


def _say_nothing_of(error: BaseException) -> None:
    """Where Python drops what was raised, it prints that, with a stack."""
    before = sys.unraisablehook

    def hook(dropped: sys.UnraisableHookArgs) -> None:
        if dropped.exc_value is not error:
            before(dropped)

    sys.unraisablehook = hook


def heard() -> None:
    """Ends what `raising` repeats."""
    if _ALARM is not None:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGINT and SIGTERM end the process, quietly, as by default, after what is inside tidied up.

    Outside of the main thread nothing is changed.
    """
    arrived: list[int] = []

    def stopped(number: int) -> Stopped:
        arrived.append(number)
        return Stopped()

    previous: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # not the main thread
        for caught in (signal.SIGINT, signal.SIGTERM):
            previous[caught] = signal.signal(caught, raising(stopped))
    try:
        yield
    # An import that is broken off may raise whatever it likes.
    except BaseException:
        if not arrived:
            raise
        heard()
        signal.signal(arrived[0], signal.SIG_DFL)
        os.kill(os.getpid(), arrived[0])
    finally:
        heard()
        for number, old in previous.items():
            signal.signal(number, old)
