"""Reads one Orbax PyTree directory: its shapes, its arrays, and errors as plain text."""

from __future__ import annotations

import errno
import inspect
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from m2mkd_jax.checkpoint.trees import Tree, flatten, nested
from m2mkd_jax.parallel.memory import exhausted


def stored_shapes(path: Path) -> dict[str, Any]:
    """The nested dict of `jax.ShapeDtypeStruct` in the metadata of the Orbax PyTree at `path`."""
    metadata = ocp.PyTreeCheckpointHandler().metadata(epath.Path(path))
    return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), metadata.tree)


def read_tree(path: Path, abstract: Tree) -> Tree:
    """Reads an Orbax PyTree.

    It uses Orbax's handler directly: a Checkpointer ends with a barrier, at which the other
    processes would wait for one that failed to read.

    Args:
        path: of the directory.
        abstract: pytree of arrays or `jax.ShapeDtypeStruct`. A leaf with a sharding is restored
            with it, one without as a numpy array.

    Returns:
        The arrays in the structure of `abstract`.
    """
    flat = flatten(abstract)
    args = {}
    for key, leaf in flat.items():
        sharding = getattr(leaf, "sharding", None)
        if sharding is None:
            args[key] = ocp.RestoreArgs(restore_type=np.ndarray)
        else:
            args[key] = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=np.shape(leaf))
    restored = ocp.PyTreeCheckpointHandler().restore(
        epath.Path(path),
        args=ocp.args.PyTreeRestore(item=nested(flat), restore_args=nested(args)),
    )
    have = flatten(restored)
    return jax.tree.unflatten(jax.tree.structure(abstract), [have[key] for key in flat])


# The file is not there, is a directory, or its disk is damaged.
_OF_THE_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)


def system_code(error: BaseException) -> int | None:
    """The errno of an error of the system, TensorStore's included; None: it is another."""
    if found := re.search(r"os_error_code='(\d+)'", str(error)):  # TensorStore's
        return int(found[1])
    return error.errno if isinstance(error, OSError) else None


def not_of_the_file(error: BaseException) -> bool:
    """Whether an error in reading says nothing about what is read, so that another try may succeed.

    Such as a device without memory left, too many open files, or files of another user.
    """
    if (code := system_code(error)) is not None:
        return code not in _OF_THE_FILE
    return isinstance(error, MemoryError) or bool(exhausted(error))


def attempt(read: Callable[[], Any], together: bool = True) -> tuple[Any, str]:
    """Reads something that may be damaged.

    Args:
        read: does it.
        together: whether it fails in all processes if it fails in one; every process then makes
            this call.

    Returns:
        (result, "") if it succeeds, else (None, the reason in one line).

    Raises:
        Exception: what says nothing about what is read (`not_of_the_file`).
    """
    result, reason = None, ""
    silence_abandoned_reads()
    try:
        result = read()
    except Exception as error:
        if not_of_the_file(error):
            raise
        reason = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
    if together and jax.process_count() > 1:
        fine = multihost_utils.process_allgather(np.array(not reason)).all()
        if not fine:
            return None, reason or "another process cannot read it"
    return result, reason


class _QuietHook:
    """A `sys.unraisablehook` that drops messages about abandoned reads of Orbax.

    Args:
        before: the hook for all others.
    """

    def __init__(self, before: Callable[[Any], Any]):
        self.before = before

    def __call__(self, args: Any) -> None:
        abandoned, error = args.object, args.exc_value
        coroutine = inspect.iscoroutine(abandoned) and "orbax" in abandoned.cr_code.co_filename
        callback = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        if not (coroutine or callback):
            self.before(args)


def _was_retrieved(entry: logging.LogRecord) -> bool:
    return "exception was never retrieved" not in entry.getMessage()


def silence_abandoned_reads() -> None:
    """Suppresses messages about the pending reads that a failed one leaves; its error is raised.

    Orbax leaves one coroutine per array, which prints a stack of 60 lines when it is freed, and
    pending reads, which complain at their end of a closed event loop or of an error that was never
    retrieved. All this happens later, so it cannot be caught around the read.
    """
    if not isinstance(sys.unraisablehook, _QuietHook):
        sys.unraisablehook = _QuietHook(sys.unraisablehook)
    logging.getLogger("asyncio").addFilter(_was_retrieved)  # adds it once
