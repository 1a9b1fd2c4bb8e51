"""Watches the processes of a run: where one dies or hangs, the others end, and one line names it.

Without it they would wait in a collective operation for ever. Every process keeps a beat in the
key-value store of jax's coordination service: that it lives, and how many of the points where
processes wait for each other it has come to (`process.reached`). Process 0 holds the store.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from jax._src import distributed  # its key-value store has no public name; Orbax uses it as well

from m2mkd_jax.parallel import process

LOST = 4  # exit code where another process is lost
AGAIN = "; start the run again, it goes on from its last checkpoint"
_BEATS, _ENDED = "m2mkd_jax/beats", "ended"
_MISSED = 3  # beats, after which a process is dead if a collective operation has failed too
_PERIODS = (0.2, 2.0)  # bounds, in seconds, of the time between two beats


@dataclass(frozen=True)
class Beat:
    """What a process says of itself.

    Attributes:
        number: of this beat.
        reached: how many points it has come to where processes wait for each other.
        place: the last step that it has reported.
        host: the machine.
        pid: its number there.
    """

    number: int
    reached: int
    place: str
    host: str
    pid: int


@dataclass
class _Seen:
    """The last beat of a process, when it came, and when the process last came further."""

    beat: Beat
    came: float
    moved: float


class Beats:
    """What is known of all processes.

    Args:
        own: number of this process.
        seconds: how long a process may be silent, or keep the others waiting.
    """

    def __init__(self, own: int, seconds: float):
        self._own, self._seconds = own, seconds
        self._seen: dict[int, _Seen] = {}

    def note(self, beats: Mapping[int, Beat | None], now: float) -> None:
        """Takes the latest beats, by process; None: it has ended as it should."""
        for index, beat in beats.items():
            if beat is None:
                self._seen.pop(index, None)
                continue
            before = self._seen.get(index)
            if before is None:
                self._seen[index] = _Seen(beat, now, now)
            elif beat.number != before.beat.number:
                moved = now if beat.reached != before.beat.reached else before.moved
                self._seen[index] = _Seen(beat, now, moved)

    def dead(self, now: float, silence: float) -> str:
        """A line on a process that has been silent for so many seconds; "": there is none."""
        for index, seen in self._seen.items():
            if index != self._own and now - seen.came > silence:
                return f"{self.name(index)} is dead or cut off: nothing from it for " + (
                    f"{now - seen.came:.0f} s, {self.last(index)}"
                )
        return ""

    def hung(self, now: float) -> str:
        """A line on a process that the others have been waiting for too long; "": there is none."""
        furthest = max((seen.beat.reached for seen in self._seen.values()), default=0)
        for index, seen in self._seen.items():
            if seen.beat.reached < furthest and now - seen.moved > self._seconds:
                return f"{self.name(index)} hangs: the others have waited for it for " + (
                    f"{now - seen.moved:.0f} s (config.watchdog_seconds), {self.last(index)}"
                )
        return ""

    def name(self, index: int) -> str:
        """A process by its number, machine and process id."""
        if index not in self._seen:
            return f"process {index}"
        beat = self._seen[index].beat
        return f"process {index} ({beat.host}, pid {beat.pid})"

    def last(self, index: int) -> str:
        """The last step that a process has reported."""
        place = self._seen[index].beat.place if index in self._seen else ""
        return f"the last step it reported is {place}" if place else "it had reported no step"


class Watchdog:
    """The beats of this process, and a look at those of the others, in background threads.

    Args:
        client: of jax's coordination service.
        own: number of this process.
        seconds: how long a process may be silent, or keep the others waiting.
    """

    def __init__(self, client: Any, own: int, seconds: float):
        self._client, self._own, self._seconds = client, own, seconds
        self._period = min(max(seconds / 20, _PERIODS[0]), _PERIODS[1])
        self._beats = Beats(own, seconds)
        self._host, self._answered = socket.gethostname(), time.monotonic()
        self._over = threading.Event()

    def start(self) -> None:
        """Starts both threads; they end before the interpreter does."""
        threads = [threading.Thread(target=f, daemon=True) for f in (self._exchange, self._watch)]
        for thread in threads:
            thread.start()
        atexit.register(self.stop)

    def stop(self) -> None:
        """Says that this process ends as it should."""
        self._over.set()
        with contextlib.suppress(Exception):  # process 0 has ended
            self._client.key_value_set(f"{_BEATS}/{self._own}", _ENDED, allow_overwrite=True)

    def blame(self) -> str:
        """A line on a process whose loss may be why an operation has failed here; "": all live."""
        deadline = time.monotonic() + (_MISSED + 2) * self._period
        while (now := time.monotonic()) < deadline:
            if line := self._beats.dead(now, _MISSED * self._period) or self._silent_store(
                _MISSED * self._period
            ):
                return line + AGAIN
            time.sleep(self._period / 4)
        return ""

    def store_died(self) -> str:
        """The line on process 0, with which the store has ended."""
        return f"{self._beats.name(0)} is dead, {self._beats.last(0)}{AGAIN}"

    def _exchange(self) -> None:
        number = 0
        while not self._over.wait(self._period):
            number += 1
            progress = process.progress()
            own = Beat(number, progress.reached, progress.place, self._host, os.getpid())
            text = json.dumps(dataclasses.asdict(own))
            with contextlib.suppress(Exception):  # process 0 has ended
                self._client.key_value_set(f"{_BEATS}/{self._own}", text, allow_overwrite=True)
                self._beats.note(_parsed(self._client.key_value_dir_get(_BEATS)), time.monotonic())
                self._answered = time.monotonic()

    def _watch(self) -> None:
        while not self._over.wait(self._period):
            now = time.monotonic()
            if line := self._silent_store(self._seconds):
                say_and_exit(line + AGAIN)
            if line := self._beats.dead(now, self._seconds) or self._beats.hung(now):
                process.fail(f"m2mkd_jax: {line}{AGAIN}", LOST)

    def _silent_store(self, silence: float) -> str:
        """A line on process 0 where its store has not answered for so many seconds."""
        waited = time.monotonic() - self._answered
        if self._own == 0 or waited <= silence:
            return ""
        return f"{self._beats.name(0)} hangs or is cut off: it has not answered for " + (
            f"{waited:.0f} s, {self._beats.last(0)}"
        )


def _parsed(entries: Iterable[tuple[str, str]]) -> dict[int, Beat | None]:
    """Beats by process, as the store holds them."""
    return {
        int(key.rpartition("/")[2]): None if text == _ENDED else Beat(**json.loads(text))
        for key, text in entries
    }


def say_and_exit(line: str) -> None:
    """Ends this process where the store, and so all that the processes agree by, is gone."""
    print(f"m2mkd_jax: {line}", file=sys.stderr, flush=True)
    os._exit(LOST)


_watchdog: list[Watchdog] = []


def start(seconds: float) -> None:
    """Watches over the other processes from here on; nothing with a single process.

    Args:
        seconds: config.watchdog_seconds.
    """
    state = distributed.global_state
    if state.client is None or _watchdog:
        return
    _watchdog.append(Watchdog(state.client, state.process_id, seconds))
    _watchdog[0].start()
    if state.process_id:
        _explain_abort(_watchdog[0], str(state.coordinator_address))


def blame() -> str:
    """A line on a lost process that may be why this one failed; "": none is lost."""
    return _watchdog[0].blame() if _watchdog else ""


def _explain_abort(watchdog: Watchdog, address: str) -> None:
    """Has jax's abort at the end of process 0 end in a line that says so, and exit code LOST.

    jax calls abort() in a thread of its own as soon as the coordination service is gone, and takes
    no callback from Python for that. A handler of Python's would never run; one of C's does.
    """
    libc = ctypes.CDLL("msvcrt" if sys.platform == "win32" else None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)

    def on_abort(number: int) -> None:
        if not _answers(address):
            say_and_exit(watchdog.store_died())
        libc.signal(number, None)  # SIG_DFL: abort() goes on

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    libc.signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    _handlers.append(handler)  # ctypes frees one that nothing refers to


_handlers: list[Any] = []


def _answers(address: str) -> bool:
    """Whether something listens at "host:port"."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=3.0):
            return True
    except OSError:
        return False
