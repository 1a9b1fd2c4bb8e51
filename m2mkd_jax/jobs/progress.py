"""How fast a job goes, and how much memory it takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import psutil

from m2mkd_jax.parallel.matrix_rate import matrix_rate

# Numbers of the log that differ between two runs of one config.
CLOCK = (
    "seconds_per_step",
    "data_wait",
    "images_per_second",
    "matrix_share",
    "memory",
    "seconds_left",
    "run_seconds_left",
)


def memory_in_use() -> int:
    """Peak bytes on the first device; on a CPU bytes of this process."""
    device = jax.local_devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats:
        return int(stats.get("peak_bytes_in_use", 0))
    return int(psutil.Process().memory_info().rss)


def pace(entry: Mapping[str, Any], images: int, total: int, flops: int, dtype: Any) -> dict:
    """Further numbers of a log entry.

    Args:
        entry: with step and seconds_per_step.
        images: of a step, over all devices.
        total: steps of the job.
        flops: of a step of the program that the job trains in, on all devices; 0: unknown.
        dtype: of activations.

    Returns:
        images_per_second, memory (see `memory_in_use`), seconds_left of the job, and where FLOPs
        are known matrix_share, the share of the devices' matrix rate.
    """
    seconds = max(float(entry["seconds_per_step"]), 1e-9)
    found = {
        "images_per_second": images / seconds,
        "memory": memory_in_use(),
        "seconds_left": (total - int(entry["step"])) * seconds,
    }
    if flops:
        found["matrix_share"] = flops / seconds / (matrix_rate(dtype) * jax.device_count())
    return found
