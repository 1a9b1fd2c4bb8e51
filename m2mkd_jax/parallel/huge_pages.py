"""Large arrays in huge pages of memory.

XLA allocates the temporary arrays of a program anew in every run of it, and the kernel then maps
them page by page: with pages of 4 KiB that is 10 to 20% of a training step on a CPU
(benchmarks/RESULTS.md). Linux's usual setting gives huge pages to those who ask, and glibc asks if
one of its tunables says so. It reads them as a process begins, so that the command starts itself
again, in the same process, with the tunable set.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from m2mkd_jax.streams import open_missing

TUNABLES = "GLIBC_TUNABLES"
HUGE_PAGES = "glibc.malloc.hugetlb"
SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
FIRST_GLIBC = (2, 35)  # that has the tunable


def start_again() -> None:
    """Starts this command again with huge pages, if they are to be had and nothing is said of them.

    `GLIBC_TUNABLES=glibc.malloc.hugetlb=0` in the environment prevents it.
    """
    open_missing()
    environment = with_huge_pages(os.environ, _glibc(), _setting())
    # Not where another program calls the command with arguments of its own.
    if environment and sys.orig_argv[-len(sys.argv[1:]) :] == sys.argv[1:] and sys.executable:
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def with_huge_pages(
    environment: Mapping[str, str], glibc: tuple[int, ...], setting: str
) -> dict[str, str] | None:
    """The environment in which glibc asks for huge pages.

    Args:
        environment: as it is.
        glibc: its version; () without it.
        setting: of the kernel, such as "always [madvise] never".

    Returns:
        None where they are not to be had, or asked for or refused already.
    """
    tunables = environment.get(TUNABLES, "")
    if glibc < FIRST_GLIBC or "[madvise]" not in setting or HUGE_PAGES in tunables:
        return None
    found = [part for part in (tunables, f"{HUGE_PAGES}=1") if part]
    return {**environment, TUNABLES: ":".join(found)}


def _glibc() -> tuple[int, ...]:
    """Its version; () without it."""
    try:
        name, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").split()
        return tuple(map(int, version.split("."))) if name == "glibc" else ()
    except (AttributeError, ValueError, OSError):  # another system
        return ()


def _setting() -> str:
    try:
        return SETTING.read_text()
    except OSError:
        return ""
