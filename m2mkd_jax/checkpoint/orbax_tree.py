"""Reading one Orbax PyTree directory: what it holds, its arrays, and failing quietly."""

import inspect
import logging
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


def spec(path: Path) -> dict:
    """The nested dict of `jax.ShapeDtypeStruct` that the Orbax PyTree at `path` says it holds."""
    metadata = ocp.PyTreeCheckpointHandler().metadata(epath.Path(path))
    return jax.tree.map(lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype), metadata.tree)


def read(path: Path, abstract: Tree) -> Tree:
    """The Orbax PyTree at `path` in the structure and with the shardings of `abstract`.

    Through the handler, not a Checkpointer: that one ends with a barrier, and where one process
    fails to read the others would wait for it there.
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


def attempt(job: Callable[[], Any], together: bool = True) -> tuple[Any, str]:
    """(result, "") or (None, why not), the same kind in all processes if `together`."""
    result, reason = None, ""
    silence_orphans()
    try:
        result = job()
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
    if together and jax.process_count() > 1:
        fine = multihost_utils.process_allgather(np.array(not reason)).all()
        if not fine:
            return None, reason or "another process cannot read it"
    return result, reason


def silence_orphans() -> None:
    """Keeps off the screen what a failed read leaves behind; its error itself is raised.

    Orbax leaves a coroutine per array, which prints a stack of 60 lines when it is freed, and reads
    under way, which complain when they end: of a closed event loop, or that nobody asked for their
    own error.  All this at any time later, so it cannot be caught around the read.
    """
    before = sys.unraisablehook
    if getattr(before, "drops_orphans", False):
        return

    def hook(args: Any) -> None:
        orphan, error = args.object, args.exc_value
        coroutine = inspect.iscoroutine(orphan) and "orbax" in orphan.cr_code.co_filename
        callback = isinstance(error, RuntimeError) and str(error) == "Event loop is closed"
        if not (coroutine or callback):
            before(args)

    def asked_for(record: logging.LogRecord) -> bool:
        return "exception was never retrieved" not in record.getMessage()

    hook.drops_orphans = True
    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(asked_for)
