"""The worker processes that decode images: how many, and that they end with their parent."""

import ast
import contextlib
import functools
import math
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from m2mkd_jax.errors import UserError

# A worker holds about this many local batches in shared memory (Grain 0.2), and this many bytes
# for Python and the libraries.
BATCHES_PER_WORKER = 4
_OWN_BYTES = 500 << 20
# Signals that stop a run; Windows has not all.
_STOPPING = {
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
    if hasattr(signal, name)
}
_PARENT_SECONDS = 1.0  # between looks for the parent


def usable_cores() -> int:
    """The number of cores this process may use, by its affinity mask and cgroup quota."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    limit = Path("/sys/fs/cgroup/cpu.max")
    if limit.is_file():
        quota, period = limit.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def automatic_workers(batch_bytes: int) -> int:
    """The number of worker processes for local batches of this size.

    Seven eighths of the cores, or fewer if their batches would take more than half of the free
    memory or shared memory (64 MB in some containers). 0 means threads instead of processes.
    """
    cores = usable_cores()
    kept = BATCHES_PER_WORKER * batch_bytes
    shared = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf
    free = psutil.virtual_memory().available
    return int(min(cores - cores // 8, shared / 2 // kept, free / 2 // (kept + _OWN_BYTES)))


# Exit code of a worker in which the program's main module starts the program again.
_UNGUARDED = 86


def end_in_worker() -> None:
    """Ends this process if it is a worker that is still importing the program's main module.

    A spawned process imports that module first. One without `if __name__ == "__main__"` would start
    the whole program in every worker.
    """
    # Python has no public name for it; it is what multiprocessing itself asks before it raises.
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        os._exit(_UNGUARDED)


@functools.cache
def check_main_module() -> None:
    """Refuses to start workers from a script that they would start again.

    A script without an `if` on `__name__` is tried with one process that does nothing else.

    Raises:
        UserError: one line that names the script.
    """
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    if not file or getattr(main, "__spec__", None) or not os.path.isfile(file):  # not a script
        return
    body = ast.parse(Path(file).read_bytes()).body
    if any(isinstance(node, ast.If) and "__name__" in ast.dump(node.test) for node in body):
        return
    trial = multiprocessing.get_context("spawn").Process(target=os.getpid)
    trial.start()
    trial.join()
    if trial.exitcode == _UNGUARDED:
        raise UserError(
            f"{file} starts its work when it is imported, and every worker process of data.workers "
            'imports it: put its last lines below `if __name__ == "__main__":`, or set '
            "data.workers=0"
        )


@contextlib.contextmanager
def beginning() -> Iterator[None]:
    """No signal ends worker processes, started inside by threads that are, as they begin.

    If one ended before it had read what it works on, its parent would write that forever. Until
    `end_with_parent` in the worker, signals wait.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def end_with_parent(parent: int, worker: int, workers: int) -> None:
    """Ends this worker process soon after its parent, which may be killed without a word to it.

    What the worker had in shared memory is then freed by Python's resource tracker.

    Args:
        parent: the parent's process id.
        worker, workers: as Grain gives them; not needed.
    """
    del worker, workers

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    # A terminal sends its signals to every process. They are for the parent, which may need more
    # batches; by SIGTERM Python itself ends the workers of a process that exits.
    for number in _STOPPING - {signal.SIGTERM}:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
