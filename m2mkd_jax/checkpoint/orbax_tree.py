"""Reading one Orbax PyTree directory: what it holds, its arrays, and failing quietly."""

import contextlib
import gc
import io
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
    noise = io.StringIO()
    # On a damaged file Orbax leaves dozens of coroutines behind, each of which prints a stack.
    with contextlib.redirect_stderr(noise):
        try:
            result = job()
        except Exception as error:
            reason = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
        if reason:
            gc.collect()  # they print when they are freed: let it be now
    if not reason:
        sys.stderr.write(noise.getvalue())
    if together and jax.process_count() > 1:
        fine = multihost_utils.process_allgather(np.array(not reason)).all()
        if not fine:
            return None, reason or "another process cannot read it"
    return result, reason
