"""How many processes decode images, where the config leaves it open."""

import math
import os
import shutil
from pathlib import Path

import psutil

# A worker holds about this many local batches in shared memory at once (Grain 0.2), and this much
# for itself: Python and the libraries.
BATCHES_PER_WORKER = 4
_OWN_BYTES = 500 << 20


def usable_cores():
    """Cores that this process may use, whole ones: affinity and cgroup counted in."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limit = Path("/sys/fs/cgroup/cpu.max")
    if limit.is_file():
        quota, period = limit.read_text().split()
        if quota != "max":
            cores = min(cores, max(1, math.ceil(int(quota) / int(period))))
    return cores


def automatic_workers(batch_bytes):
    """Processes for batches of this size: as many as cores, less one in eight for the program.

    Fewer where shared memory (a container may have 64 MB) or memory does not hold what they keep
    in flight: at most half of what is free. 0, threads instead, where it does not hold one.
    """
    cores = usable_cores()
    kept = BATCHES_PER_WORKER * batch_bytes
    shared = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else math.inf
    free = psutil.virtual_memory().available
    return int(min(cores - cores // 8, shared / 2 // kept, free / 2 // (kept + _OWN_BYTES)))
