"""What a measurement needs to know of the machine: names and versions, and the matrix rate."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import jax
import jax.numpy as jnp

from m2mkd_jax.parallel.matrix_rate import measure_matrix_rate

PACKAGES = ("jax", "jaxlib", "flax", "torch", "timm")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that are measured, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe() -> dict:
    """The machine as result files name it."""
    processor = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        processor = names[0] if names else processor
    except OSError:
        pass
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "processor": processor,
        "cores": cores(),
        "load_before": load,
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }


def matrix_rate(dtype: jnp.dtype) -> float:
    """FLOP/s of a square matrix product on this device, the best of ten."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    return measure_matrix_rate(dtype, side, repetitions=10)
