"""What to do where a device has no memory left, and what this process has taken."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import re
import sys

import psutil

# How jax, XLA's allocators and CUDA say it.
_EXHAUSTED = re.compile(r"RESOURCE_EXHAUSTED|out of memory|OUT_OF_MEMORY", re.IGNORECASE)
# At the start of the backend, or of its libraries, nothing of this run is in memory yet.
_AT_START = re.compile(r"initiali[sz]|CUDA_ERROR|cuInit|cuDevice|cublasCreate|cudnnCreate|NCCL")
_ASKED = re.compile(r"allocat\w+ ([\d.]+ ?(?:[KMGT]iB|bytes))")
SHARE = (
    "if another process has this GPU too, start both with XLA_PYTHON_CLIENT_PREALLOCATE=false, or "
    "with XLA_PYTHON_CLIENT_MEM_FRACTION=0.45 each, or give each a GPU (CUDA_VISIBLE_DEVICES)"
)
IN_TRAINING = (
    "lower config.recipes.*.batch or raise config.recipes.*.accumulate, or set "
    'remat="always" for the networks'
)
IN_INFERENCE = "lower --batch or --images where the command has it, or set JAX_PLATFORMS=cpu"


def exhausted(error: BaseException, otherwise: str = IN_TRAINING) -> str:
    """A line on a device without memory left: what happened, and what to set; "": another error.

    Args:
        error: as jax raises it, at the start of its backend or in an allocation.
        otherwise: what to do where no other process has the device's memory.
    """
    text = str(error)
    if not isinstance(error, RuntimeError | ValueError | MemoryError):
        return ""
    if not _EXHAUSTED.search(text) or "os_error_code" in text:  # the latter: TensorStore, a disk
        return ""
    if _AT_START.search(text):
        return f"the device has no memory left at the start; {SHARE}"
    found = _ASKED.search(text)
    asked = f" for {found[1]}" if found else ""
    return f"the device has no memory left{asked}; {SHARE}; if not, {otherwise}"


def give_back() -> None:
    """Gives memory that this process has freed back to the system, where the C library is glibc.

    glibc keeps what is freed in the middle of its heaps. After compiling a step that is up to a
    third of what the process holds (benchmarks/RESULTS.md); it takes a fifth of a second or less.
    """
    # Another C library has no malloc_trim, Windows no CDLL(None).
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    try:
        usage = importlib.import_module("resource")  # Windows has none
    except ImportError:
        now = psutil.Process().memory_info()
        return int(getattr(now, "peak_wset", now.rss))
    peak = usage.getrusage(usage.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # others count in KiB
