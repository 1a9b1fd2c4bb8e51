"""The processes of a run: how they find each other, agree, and end together.

Every process runs the same program on its own devices and its own share of each batch. Process 0
is the main one: it alone writes files and prints.
"""

import atexit
import contextlib
import hashlib
import itertools
import json
import os
import platform
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # its key-value store has no public name; Orbax uses it as well
from jax.experimental import multihost_utils
from jax.experimental.compilation_cache import compilation_cache

from m2mkd_jax.errors import UserError

CONNECT_SECONDS = 300
_END, _LEFT = "m2mkd_jax/end", "m2mkd_jax/left"
_POLL_SECONDS, _FAREWELL_SECONDS = 0.5, 5.0
_steps = itertools.count()


def distributed_arguments(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` needs to know here; None: this process runs alone.

    In this order:
        M2MKD_PROCESSES=1 (this process alone, whatever else is set)
        M2MKD_COORDINATOR=host:port, M2MKD_PROCESSES=N, M2MKD_PROCESS=i (launch/local.sh)
        M2MKD_PROCESSES=auto: a TPU pod (launch/tpu_pod.sh) or a cluster that jax recognises
        a SLURM step of several tasks (launch/slurm.sh nodes). An array job has one task per
            element, so its elements run alone.
        several names in TPU_WORKER_HOSTNAMES

    Raises:
        UserError: the three variables are incomplete or make no sense.
    """
    given = {name: environment.get(f"M2MKD_{name}", "")
             for name in ("COORDINATOR", "PROCESSES", "PROCESS")}  # fmt: skip
    if given["PROCESSES"] == "1":
        return None
    if given["PROCESSES"] == "auto":
        return {}
    if any(given.values()):
        return _explicit(given)
    tasks = environment.get("SLURM_STEP_NUM_TASKS") or environment.get("SLURM_NTASKS", "1")
    if "SLURM_STEP_ID" in environment and tasks.isdigit() and int(tasks) > 1:
        alone_on_node = tasks == environment.get("SLURM_STEP_NUM_NODES")
        # jax would give each task the one device of its local number.
        own = {"local_device_ids": []} if alone_on_node else {}
        return own | _slurm_coordinator(environment)
    return {} if "," in environment.get("TPU_WORKER_HOSTNAMES", "") else None


def _slurm_coordinator(environment: Mapping[str, str]) -> dict[str, str]:
    """The first node of a step, at jax's port; jax itself makes n1 of n[1-4]-ib."""
    nodes, job = (environment.get(f"SLURM_{name}", "") for name in ("STEP_NODELIST", "JOB_ID"))
    first = re.match(r"(\[[^]]*]|[^,[])*", nodes)[0]
    host = re.sub(r"\[([^],-]*)[^]]*]", r"\1", first)
    if not host or not job.isdigit() or environment.get("JAX_COORDINATOR_ADDRESS"):
        return {}
    port = environment.get("JAX_COORDINATOR_PORT") or int(job) % 2**12 + 2**16 - 2**12
    return {"coordinator_address": f"{host}:{port}"}


def _explicit(given: Mapping[str, str]) -> dict[str, Any]:
    for name, value in given.items():
        if not value:
            raise UserError(
                f"M2MKD_{name} is not set; M2MKD_COORDINATOR=host:port, M2MKD_PROCESSES=N and "
                "M2MKD_PROCESS=0..N-1 belong together"
            )
    host, _, port = given["COORDINATOR"].rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"M2MKD_COORDINATOR is {given['COORDINATOR']!r}; it must be host:port")
    if not given["PROCESSES"].isdigit() or int(given["PROCESSES"]) < 1:
        raise UserError(
            f"M2MKD_PROCESSES is {given['PROCESSES']!r}; it must be a number of processes, or auto"
        )
    count = int(given["PROCESSES"])
    if not given["PROCESS"].isdigit() or int(given["PROCESS"]) >= count:
        raise UserError(f"M2MKD_PROCESS is {given['PROCESS']!r}; it must be 0 to {count - 1}")
    return {
        "coordinator_address": given["COORDINATOR"],
        "num_processes": count,
        "process_id": int(given["PROCESS"]),
        "local_device_ids": [],
    }


def start_distributed() -> None:
    """Joins this process to the others of its run, if there are others; before jax is used.

    Where they do not all come within CONNECT_SECONDS it says so and ends the process, exit code 2.

    Raises:
        UserError: wrong variables.
    """
    arguments = distributed_arguments(os.environ)
    if arguments is None:
        return
    # At its own time limit jax aborts with a page of stack, and nothing can be caught.
    patience = threading.Timer(CONNECT_SECONDS, _nobody_comes)
    patience.daemon = True
    patience.start()
    try:
        jax.distributed.initialize(**arguments, initialization_timeout=2 * CONNECT_SECONDS)
    except (RuntimeError, ValueError, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot join the other processes of this run: {reason}") from None
    finally:
        patience.cancel()
    _watch(distributed.global_state.client)


def _nobody_comes() -> None:
    state = distributed.global_state
    print(
        f"m2mkd_jax: after {CONNECT_SECONDS} s not all of {state.num_processes or 'the'} processes "
        f"are at {state.coordinator_address}; look at what the others say, and whether they can "
        "reach it",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    os._exit(2)


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


def _watch(client: Any) -> None:
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


def enable_compilation_cache(directory: str | os.PathLike | None = None) -> Path | None:
    """Keeps compiled programs on disk, so that a second run of the same job starts at once.

    Args:
      directory: where; by default $JAX_COMPILATION_CACHE_DIR, else ~/.cache/m2mkd_jax/xla.  Entries
        go in a subdirectory for this jax version and CPU.

    Returns:
      The subdirectory, or None (with one line on stderr) where it cannot be written: a run without
      a cache is slower, not wrong.
    """
    base = directory or os.environ.get("JAX_COMPILATION_CACHE_DIR") or "~/.cache/m2mkd_jax/xla"
    path = Path(base).expanduser().absolute() / _machine_key()
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        print(f"no compilation cache: {path}: {error.strerror}", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    # The default skips whatever compiled in under a second: on a small model, everything.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # jax looks for the cache once, at the first compilation: make it look again.
    compilation_cache.reset_cache()
    return path


def _machine_key() -> str:
    """jax version and CPU: jax's own key leaves out the CPU's instruction set, and a home directory
    is often shared by unlike machines (a program for the wrong one dies by SIGILL)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):  # not Linux
        cpu = platform.processor()
    fingerprint = hashlib.sha256(f"{platform.machine()} {cpu}".encode()).hexdigest()[:8]
    return f"jax-{jax.__version__}-{fingerprint}"
