"""The worker processes that decode images: how many, and that they end with their parent."""

import math
import os
import shutil
import threading
import time
from pathlib import Path

import psutil

# A worker holds about this many local batches in shared memory (Grain 0.2), and this many bytes
# for Python and the libraries.
BATCHES_PER_WORKER = 4
_OWN_BYTES = 500 << 20
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
