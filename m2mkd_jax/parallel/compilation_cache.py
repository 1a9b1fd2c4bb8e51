"""The cache of compiled programs on disk."""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from pathlib import Path

import jax
from jax.experimental.compilation_cache import compilation_cache

from m2mkd_jax.errors import UserError
from m2mkd_jax.files.paths import at_home


def enable_compilation_cache(directory: str | os.PathLike | None = None) -> Path | None:
    """Keeps compiled programs on disk, so that a second run of the same job starts at once.

    Args:
        directory: by default $JAX_COMPILATION_CACHE_DIR, else ~/.cache/m2mkd_jax/xla. Entries go in
            a subdirectory for this jax version and CPU.

    Returns:
        The subdirectory; None, with one line on stderr, if it cannot be written.
    """
    base = directory or os.environ.get("JAX_COMPILATION_CACHE_DIR") or "~/.cache/m2mkd_jax/xla"
    try:
        path = at_home(base).absolute() / _machine_key()
    except UserError as error:
        print(f"no compilation cache: {error}", file=sys.stderr)
        return None
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        print(f"no compilation cache: {path}: {error.strerror}", file=sys.stderr)
        return None
    jax.config.update("jax_compilation_cache_dir", os.fspath(path))
    # The default leaves out programs compiled in under a second: on a small model, all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # jax looks for the cache only at the first compilation: make it look again.
    compilation_cache.reset_cache()
    return path


def _machine_key() -> str:
    """The jax version and a fingerprint of the CPU.

    jax's own key lacks the CPU's instruction set, and a home directory may be shared by different
    machines: a program for another one would end with SIGILL.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):  # not Linux
        cpu = platform.processor()
    fingerprint = hashlib.sha256(f"{platform.machine()} {cpu}".encode()).hexdigest()[:8]
    return f"jax-{jax.__version__}-{fingerprint}"
