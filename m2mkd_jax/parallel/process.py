"""The processes of a run: how they find each other, agree, and end together.

Every process runs the same program on its own devices and its own share of each batch. Process 0
is the main one: it alone writes files and prints.
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
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its key-value store has no public name; Orbax uses it as well
from jax.experimental import multihost_utils

CONNECT_SECONDS = 300
_END, _LEFT = "m2mkd_jax/end", "m2mkd_jax/left"
_POLL_SECONDS, _FAREWELL_SECONDS = 0.5, 5.0
_steps = itertools.count()


def alone() -> bool:
    """True where the run has no other process."""
    return distributed.global_state.client is None


def is_main() -> bool:
    """True in the one process that writes files and prints for all (process 0)."""
    return jax.process_index() == 0


def say(text: str) -> None:
    """Prints in the main process alone."""
    if is_main():
        print(text, flush=True)


def barrier(name: str) -> None:
    """Returns once every process has called it with this name; nothing to do with one process."""
    if not alone():
        multihost_utils.sync_global_devices(name)


def wait_for_all(name: str) -> None:
    """`barrier` without the devices, for once: a name cannot be used again."""
    if not alone():
        distributed.global_state.client.wait_at_barrier(
            f"m2mkd_jax/{name}", timeout_in_ms=1000 * CONNECT_SECONDS
        )


def from_main(value: Any) -> Any:
    """The main process's value (JSON) in every process; the others' values are dropped.

    For what may look different to each: clocks, and files seen through a network.
    """
    if alone():
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.array(len(text))))
    # Of the others only the number of bytes matters.
    text = text if is_main() else np.zeros(length, np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(text).tobytes())


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Gives a function, called after each step: whether SIGTERM or SIGINT wants a stop here.

    With several processes a signal to one of them is enough, and all stop after the same step.
    A second SIGINT (with one process, also SIGTERM) raises KeyboardInterrupt. Signals are caught in
    the main thread only.
    """
    by_itself = alone()
    arrived: list[int] = []
    previous = {}

    def handler(number, _):
        arrived.append(number)
        if len(arrived) > 1:  # a second one means it
            raise KeyboardInterrupt
        if not by_itself:
            os.kill(os.getpid(), signal.SIGTERM)

    def stop() -> bool:
        if by_itself:
            return bool(arrived)
        # jax catches SIGTERM itself, and agrees in the background on a step that no process has
        # reached; the numbers must never go down, so they count the steps of all jobs.
        return multihost_utils.reached_preemption_sync_point(next(_steps))

    with contextlib.suppress(ValueError):  # not the main thread
        for number in (signal.SIGTERM, signal.SIGINT) if by_itself else (signal.SIGINT,):
            previous[number] = signal.signal(number, handler)
    try:
        yield stop
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def fail(message: str, code: int) -> int:
    """Says on stderr why the run ends, once for all processes, and ends them all.

    With one process it returns `code`. With several it does not return: the others may be waiting
    for this one in the middle of a step, so every process watches for this and leaves as it is.
    The first process to fail is the one that speaks, and its code is everybody's.
    """
    if alone():
        print(message, file=sys.stderr, flush=True)
        return code
    client = distributed.global_state.client
    try:
        client.key_value_set(_END, str(code))
    except Exception:  # another process was first, or process 0 is gone and with it the store
        with contextlib.suppress(Exception):
            code = int(client.key_value_try_get(_END))
    else:
        print(message, file=sys.stderr, flush=True)
    _leave(client, code)


def watch(client: Any) -> None:
    """Leaves, in the background, when another process has called `fail`."""
    over = threading.Event()

    def poll():
        while not over.wait(_POLL_SECONDS):
            with contextlib.suppress(Exception):  # not there: the usual case
                code = client.key_value_try_get(_END)
                _leave(client, int(code))

    thread = threading.Thread(target=poll, daemon=True)
    thread.start()
    atexit.register(lambda: (over.set(), thread.join()))


def _leave(client: Any, code: int) -> None:
    """Ends this process at once; the one that keeps the store (process 0) as the last."""
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
