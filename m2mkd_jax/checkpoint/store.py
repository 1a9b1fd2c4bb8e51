"""Checkpoints of a job in training, and finished weights, both on Orbax (v0).

Training checkpoints (`RunCheckpoints`) are saved in the background, thinned out, and forgiving: a
damaged one is passed over.  Finished weights (`save_weights`, `load_weights`) are few, are read by
other jobs and people, and unforgiving: each carries a checksum.  Local (or mounted) paths only.
"""

import contextlib
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from m2mkd_jax.checkpoint.files import read_json, write_json
from m2mkd_jax.checkpoint.orbax_tree import attempt, read, silence_orphans, spec
from m2mkd_jax.checkpoint.trees import Tree, checksum, flatten, match_tree, nested
from m2mkd_jax.errors import UserError
from m2mkd_jax.parallel.process import barrier, is_main

__all__ = ["RunCheckpoints", "checksum", "load_weights", "match_tree", "save_weights"]

_STATE = "state"
_FORMAT = 1


class RunCheckpoints:
    """The checkpoints of one job: DIRECTORY/<step>/state, the latest two and the best one.

    A state is any pytree of arrays: {'step', 'params', 'opt_state', 'fixed', 'ema'}; optax's
    namedtuples and tuples are stored as nested dicts and restored as what they were.  In a
    multi-process run every process makes every call.

    Args:
      directory: made if it is not there; what a killed save left in it is removed.
      best_metric: the metric whose largest value marks the best checkpoint; None keeps no best.

    Raises:
      UserError: the directory cannot be made.
    """

    def __init__(self, directory: str | os.PathLike, best_metric: str | None = "eval_accuracy"):
        self.directory = Path(directory).absolute()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.directory} cannot be made: {error.strerror}") from None
        if is_main():
            _drop_damaged_metrics(self.directory)
        barrier("checkpoints")

        def score(metrics: Mapping[str, float]) -> float:
            value = metrics.get(best_metric, math.nan)
            return -math.inf if math.isnan(value) else value  # NaN would break the sorting

        policies = ocp.checkpoint_managers
        keep = [policies.LatestN(2)]
        if best_metric is not None:
            keep.append(
                policies.BestN(n=1, get_metric_fn=score, keep_checkpoints_without_metrics=False)
            )
        self._manager = ocp.CheckpointManager(
            epath.Path(self.directory),
            item_handlers={_STATE: ocp.PyTreeCheckpointHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                # Overruled by the policy; but without it Orbax does not write the metrics down.
                best_fn=None if best_metric is None else score,
                cleanup_tmp_directories=True,
            ),
        )

    def save(self, step: int, state: Tree, metrics: Mapping[str, Any] | None = None) -> bool:
        """Copies the state to the host and writes it in the background.

        When it returns, the caller may donate the state's buffers to the next step (checked; on CPU
        Orbax keeps a view, not a copy, and XLA then does not overwrite the buffer).  It waits for
        the save before it, if that one is not done.

        Args:
          step: steps taken; not smaller than any saved one.
          state: pytree of arrays.
          metrics: name -> scalar; `best_metric` among them, or this one is never the best.

        Returns:
          False where `step` is saved already (nothing is written then).

        Raises:
          OSError: the file system refuses, now or in the save before this one.
        """
        arrays = nested({path: _array(leaf) for path, leaf in flatten(state).items()})
        with _writing(self.directory):
            return self._manager.save(
                step,
                args=ocp.args.Composite(**{_STATE: ocp.args.PyTreeSave(arrays)}),
                # Orbax warns on every save without metrics; {} ranks below all that have some.
                metrics={name: float(value) for name, value in (metrics or {}).items()},
            )

    def restore_latest(self, abstract_state: Tree) -> tuple[int, Tree] | None:
        """The newest checkpoint that can be read.

        One that cannot (a file missing or cut off) is passed over with one line on stderr and,
        once an older one was read, renamed to <step>.damaged, so that its step can be saved again.

        Args:
          abstract_state: the state's structure with `jax.ShapeDtypeStruct` leaves (or arrays).  A
            leaf with a sharding is restored with it, one without as a numpy array.

        Returns:
          (step, state), or None where there is no checkpoint.

        Raises:
          UserError: a checkpoint has other arrays, shapes or dtypes (nothing is cast); or there are
            checkpoints and none can be read.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            path = self.directory / str(step) / _STATE
            held, reason = attempt(lambda path=path: spec(path))
            if not reason:
                match_tree(held, abstract_state, where=f"checkpoint {path}")
                state, reason = attempt(lambda path=path: read(path, abstract_state))
            if not reason:
                self._set_aside(damaged)
                return step, state
            damaged[step] = reason
            if is_main():
                print(f"checkpoint {path} is damaged, not used: {reason}", file=sys.stderr)
        if damaged:
            raise UserError(
                f"no checkpoint in {self.directory} can be read (steps {sorted(damaged)}: "
                f"{damaged[max(damaged)]}); remove the directory to start this job over"
            )
        return None

    def wait(self) -> None:
        """Returns when the save under way, if any, is on disk; raises what went wrong in it."""
        with _writing(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the background threads; no call after this one."""
        self.wait()
        self._manager.close()

    def _set_aside(self, steps: Mapping[int, str]) -> None:
        # Orbax counts a damaged step as the latest and would refuse to save before or at it.
        if not steps:
            return
        if is_main():
            for step in steps:
                aside = self.directory / f"{step}.damaged"
                shutil.rmtree(aside, ignore_errors=True)
                (self.directory / str(step)).rename(aside)
        barrier("damaged checkpoints aside")
        self._manager.reload()


def save_weights(
    directory: str | os.PathLike,
    trees: Mapping[str, Tree],
    description: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
) -> None:
    """Writes finished weights: DIRECTORY/<name> (an Orbax PyTree each) and description.json.

    The directory appears complete or not at all; one that is there is replaced.  In a multi-process
    run every process makes the call, and process 0 writes the description.  Trees are taken out of
    `trees` one by one, each when it is written.

    Args:
      directory: the new directory.
      trees: name -> nested dict of arrays; names of letters, digits, '_', '-' and '.'.
      description: what a reader should know (architecture, who made it, step, metrics); JSON.  A
        function is called once all trees are written.

    Raises:
      ValueError: a name is not a plain file name.
      OSError: the file system refuses; nothing is left then.
    """
    for name in trees:
        if not re.fullmatch(r"\w[\w.-]*", name) or name == "description.json":
            raise ValueError(f"{name!r} cannot name a tree of weights")
    target = Path(directory).absolute()
    tmp = target.with_name(f".{target.name}.writing")
    if is_main():
        shutil.rmtree(tmp, ignore_errors=True)  # of a killed process
        tmp.mkdir(parents=True)
    barrier(f"weights begin {target}")
    try:
        sums = {name: _save_tree(tmp / name, trees[name]) for name in trees}
        if is_main():
            described = description() if callable(description) else description
            content = {"format": _FORMAT, "description": dict(described), "trees": sums}
            write_json(tmp / "description.json", content)
            old = target.with_name(f".{target.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():  # a directory cannot be renamed onto a full one
                target.rename(old)
            tmp.rename(target)
            shutil.rmtree(old, ignore_errors=True)
    except BaseException:
        shutil.rmtree(tmp, ignore_errors=True)
        raise
    barrier(f"weights end {target}")


def _save_tree(path: Path, tree: Tree) -> dict[str, Any]:
    flat = flatten(tree)
    if flat:  # a module without weights is a legitimate module; Orbax refuses an empty tree
        arrays = nested({key: _array(leaf) for key, leaf in flat.items()})
        # Without a second copy of host arrays, which only a save in the background needs.
        handlers = ocp.type_handlers
        registry = handlers.create_type_handler_registry(
            (jax.Array, handlers.ArrayHandler()),
            (np.ndarray, handlers.NumpyHandler(deepcopy_host_arrays=False)),
        )
        handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
        with _writing(path), ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(epath.Path(path), ocp.args.PyTreeSave(arrays))
    return {"sha256": checksum(tree), "arrays": len(flat)}


def load_weights(
    directory: str | os.PathLike, names: Sequence[str] | None = None
) -> tuple[dict[str, dict], dict]:
    """Reads what `save_weights` wrote, and checks it.

    Args:
      directory: the one given to `save_weights`.
      names: which trees; all by default.  The others are not read.

    Returns:
      (name -> nested dict of numpy arrays, with string keys; the description).  Pass a tree through
      `match_tree` before it goes into a model.

    Raises:
      UserError: not a directory of weights, no such name, or a tree that cannot be read or whose
        bytes are not the ones written.
    """
    directory = Path(directory).absolute()
    if not (directory / "description.json").is_file():
        raise UserError(f"{directory} holds no finished weights (it has no description.json)")
    content = read_json(directory / "description.json")
    try:
        known, description, version = content["trees"], content["description"], content["format"]
        sums = {name: entry["sha256"] for name, entry in known.items()}
    except (KeyError, TypeError, IndexError, AttributeError):
        raise UserError(f"{directory / 'description.json'} is not one of m2mkd_jax") from None
    if version != _FORMAT:
        raise UserError(f"{directory} has format {version}; this program reads {_FORMAT}")
    loaded: dict[str, dict] = {}
    for name in sums if names is None else names:
        path = directory / name
        if name not in sums:
            raise UserError(f"{directory} has no weights named {name!r}, only {sorted(sums)}")
        tree, reason = {}, ""
        if known[name]["arrays"]:
            tree, reason = attempt(lambda path=path: read(path, spec(path)), together=False)
        if not reason and checksum(tree) != sums[name]:
            reason = "its checksum is not the one written in description.json"
        if reason:
            raise UserError(f"{path} is damaged ({reason}); restore it or make it again")
        loaded[name] = tree
    return loaded, description


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """What the system says to Orbax's writers (a full disk, a quota) as OSError, with the path."""
    silence_orphans()
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    except ValueError as error:
        if not (code := re.search(r"os_error_code='(\d+)'", str(error))):
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(path)) from None


def _drop_damaged_metrics(directory: Path) -> None:
    # One cut-off metrics file keeps Orbax from opening the directory at all.
    for file in directory.glob("[0-9]*/metrics/metrics"):
        try:
            read_json(file)
        except UserError as error:
            print(f"{error}; its step cannot be the best one", file=sys.stderr)
            file.unlink()


def _array(leaf: Any) -> jax.Array | np.ndarray:
    # Numbers become arrays.  Orbax copies numpy arrays itself before it returns from a save.
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
