"""The processes of a run: barriers, shared values, signals and joint termination.

Every process runs the same program on its own devices and its own share of each batch. Only
process 0, the main process, writes files and prints.
"""

import atexit
import contextlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import numpy as np
from jax._src import distributed  # its key-value store has no public name; Orbax uses it as well
from jax.experimental import multihost_utils

from m2mkd_jax.streams import leave_terminal

CONNECT_SECONDS = 300
USER_SIGNAL = getattr(signal, "SIGUSR1", None)  # Windows has none
# Of these jax catches the first.
SIGNALS: tuple[signal.Signals, ...] = (signal.SIGTERM, signal.SIGINT)
SIGNALS += (USER_SIGNAL,) if USER_SIGNAL else ()
HANGUP = getattr(signal, "SIGHUP", None)
if HANGUP and signal.getsignal(HANGUP) is not signal.SIG_IGN:  # which is what nohup asks for
    SIGNALS += (HANGUP,)
_END, _LEFT = "m2mkd_jax/end", "m2mkd_jax/left"
_POLL_SECONDS, _FAREWELL_SECONDS = 0.5, 5.0
_steps = itertools.count()
_arrived: list[int] = []  # signals since the begin of `stopping`


@dataclass
class Progress:
    """How far this process is.

    Attributes:
        reached: how many points it has come to where processes wait for each other.
        place: the last step that it has reported.
    """

    reached: int = 0
    place: str = ""


_progress = Progress()


def progress() -> Progress:
    """How far this process is."""
    return _progress


def reached(place: str = "") -> None:
    """Says that this process has come to a point where processes wait for each other.

    All come to the same points in the same order: who is behind is whom the others wait for.

    Args:
        place: such as "step 12 of pt"; "": the step is the one before.
    """
    _progress.reached += 1
    _progress.place = place or _progress.place


def alone() -> bool:
    """Whether the run has a single process."""
    return distributed.global_state.client is None


def is_main() -> bool:
    """Whether this is the process that writes files and prints (process 0)."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints in the main process only."""
    if is_main():
        print(text, flush=True)


def barrier(name: str) -> None:
    """A barrier over all devices: returns once every process has called it with this name."""
    reached()
    if not alone():
        multihost_utils.sync_global_devices(name)


def wait_for_all(name: str) -> None:
    """A host-only barrier; each name can be used only once."""
    reached()
    client = distributed.global_state.client
    if client is not None:
        client.wait_at_barrier(f"m2mkd_jax/{name}", timeout_in_ms=1000 * CONNECT_SECONDS)


def from_main(value: Any) -> Any:
    """The main process's value in every process, for values that may differ between processes.

    Such as clocks, and files seen through a network.

    Args:
        value: anything that JSON can represent; ignored outside of the main process.
    """
    reached()
    if alone():
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(text))))
    # The other processes need a buffer of the same length.
    text = text if is_main() else np.zeros(length, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(text).tobytes())


def any_process(value: bool) -> bool:
    """Whether it is true in one of the processes; every process makes this call."""
    reached()
    if alone():
        return value
    return bool(multihost_utils.process_allgather(np.array(value)).any())


def union(numbers: Collection[int]) -> set[int]:
    """The numbers, 0 or larger, that any of the processes gives; every process makes this call."""
    reached()
    if alone():
        return set(numbers)
    most = int(multihost_utils.process_allgather(np.array(len(numbers))).max())
    padded = np.full(most, -1)
    padded[: len(numbers)] = sorted(numbers)
    found = multihost_utils.process_allgather(padded) if most else padded
    return {int(number) for number in found.flat if number >= 0}


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Catches SIGTERM, SIGINT, SIGUSR1 and SIGHUP, in the main thread only.

    A second signal ends this process at once (with several processes: a second SIGINT), but for one
    after SIGUSR1, by which SLURM announces the end of the time before SIGTERM comes, and after
    SIGHUP, which both the terminal and the shell send. What is half written then is not taken for
    whole: it has no final name yet.

    Yields:
        A function to be called after each step: whether to stop. With several processes a signal
        to one of them is enough, and all stop after the same step.
    """
    by_itself = alone()
    arrived = _arrived
    arrived.clear()
    previous: dict[int, Any] = {}

    def handler(number: int, _: Any) -> None:
        arrived.append(number)
        if number == HANGUP:
            leave_terminal()
        if sum(other not in (USER_SIGNAL, HANGUP) for other in arrived) > 1:
            os._exit(128 + number)
        if not by_itself:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop() -> bool:
        return bool(arrived) if by_itself else _agreed()

    with contextlib.suppress(ValueError):  # not the main thread
        for caught in SIGNALS if by_itself else SIGNALS[1:]:
            previous[caught] = signal.signal(caught, handler)
    try:
        yield stop
    finally:
        arrived.clear()
        for number, old in previous.items():
            signal.signal(number, old)


def _agreed() -> bool:
    """Whether all of several processes stop here; they come to the same points in the same order.

    jax catches SIGTERM itself, and the processes agree in the background on a point that none has
    reached. The numbers must never decrease, so they count those of all jobs.
    """
    return bool(multihost_utils.reached_preemption_sync_point(next(_steps)))


def interrupted() -> bool:
    """Whether a signal asks the run to stop in the middle of an evaluation.

    Every process makes this call, before each batch.
    """
    return bool(_arrived) if alone() else _agreed()


def fail(message: str, code: int) -> int:
    """Ends all processes of the run with a message on stderr.

    With several processes it does not return: the others may be waiting for this one in the middle
    of a step, so each polls for a failure and exits at once. The first process to fail prints its
    message, and all exit with its code.

    Args:
        message: printed on stderr.
        code: the exit code.

    Returns:
        `code`, with a single process.
    """
    client = distributed.global_state.client
    if client is None:
        print(message, file=sys.stderr, flush=True)
        return code
    try:
        client.key_value_set(_END, str(code))
    except Exception:  # another process failed first, or process 0 has ended and with it the store
        with contextlib.suppress(Exception):
            code = int(client.key_value_try_get(_END))
    else:
        print(message, file=sys.stderr, flush=True)
    _leave(client, code)


def watch(client: Any) -> None:
    """Polls in the background whether another process has called `fail`, and then exits.

    Args:
        client: of jax's distributed key-value store.
    """
    over = threading.Event()

    def poll() -> None:
        while not over.wait(_POLL_SECONDS):
            with contextlib.suppress(Exception):  # no failure yet
                code = client.key_value_try_get(_END)
                _leave(client, int(code))

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    atexit.register(thread.join)
    atexit.register(over.set)  # runs first


def _leave(client: Any, code: int) -> NoReturn:
    """Exits at once; process 0, which keeps the store, waits for the others first."""
    sys.stdout.flush()
    state = distributed.global_state
    with contextlib.suppress(Exception):
        client.key_value_set(f"{_LEFT}/{state.process_id}", "")
    deadline = time.monotonic() + _FAREWELL_SECONDS
    while state.process_id == 0 and time.monotonic() < deadline:
        with contextlib.suppress(Exception):
            if len(client.key_value_dir_get(_LEFT)) == state.num_processes:
                break
        time.sleep(0.05)
    os._exit(code)
