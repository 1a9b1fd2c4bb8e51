"""Checkpoints of a job in training, and finished weights, both stored by Orbax (v0).

Training checkpoints (`RunCheckpoints`) are saved in the background, and only some are kept; a
damaged one is skipped. Finished weights (`save_weights`, `load_weights`) are read by other jobs and
by people, and a damaged one is an error. Both carry checksums, which are compared before anything
is used. In a bucket a checkpoint is whole once Orbax has left its commit file, and weights are once
description.json is there.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from m2mkd_jax.checkpoint.checksums import (
    CheckedPyTreeHandler,
    CheckedPyTreeSave,
    damage,
    saved_metrics,
)
from m2mkd_jax.checkpoint.files import read_json, read_record, write_record
from m2mkd_jax.checkpoint.orbax_tree import (
    attempt,
    read_tree,
    silence_abandoned_reads,
    stored_shapes,
    system_code,
)
from m2mkd_jax.checkpoint.replacing import replace_directory, why_kept
from m2mkd_jax.checkpoint.trees import Tree, checksum, flatten, match_tree, nested
from m2mkd_jax.errors import UserError
from m2mkd_jax.files.paths import (
    absolute,
    in_bucket,
    make_directory,
    move_tree,
    naming,
    remove_tree,
)
from m2mkd_jax.parallel.process import barrier, from_main, is_main

__all__ = [
    "RunCheckpoints",
    "checksum",
    "load_weights",
    "match_tree",
    "save_weights",
]

_STATE = "state"
_FORMAT = 1
_numbers = itertools.count()


class RunCheckpoints:
    """The checkpoints of one job: DIRECTORY/<step>/state, the latest two and the best one.

    A state is any pytree of arrays: {'step', 'params', 'opt_state', 'fixed', 'ema'}. Namedtuples
    and tuples (of optax) are stored as nested dicts and restored as namedtuples and tuples. In a
    multi-process run every process makes every call.

    Args:
        directory: made if it does not exist; the remains of an interrupted save are removed.
        best_metric: the checkpoint with its largest value is the best one; None keeps no best one.
        job, run: its name, and what tells it from the same job elsewhere, which its checkpoints
            carry: those of another job or run are not used; "" takes any.

    Raises:
        UserError: the directory cannot be made.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        best_metric: str | None = "eval_accuracy",
        job: str = "",
        run: str = "",
    ):
        self.directory, self._owner = absolute(directory), {"job": job, "run": run}
        try:
            make_directory(self.directory)
        except OSError as error:
            raise UserError(f"{self.directory} cannot be made: {error.strerror}") from None
        if is_main():
            _drop_damaged_metrics(self.directory)
        barrier("checkpoints")

        def score(metrics: Mapping[str, float]) -> float:
            value = metrics.get(best_metric or "", math.nan)
            return -math.inf if math.isnan(value) else value  # NaN would break the sorting

        # Orbax names the barriers of its threads by their step: those of two jobs that save at once
        # would meet, and a checkpoint be taken for whole that only one process has written.
        own = ocp.options.MultiprocessingOptions(barrier_sync_key_prefix=f"job_{next(_numbers)}")
        policies = ocp.checkpoint_managers
        keep = [policies.LatestN(2)]
        if best_metric is not None:
            keep.append(
                policies.BestN(n=1, get_metric_fn=score, keep_checkpoints_without_metrics=False)
            )
        self._manager = ocp.CheckpointManager(
            epath.Path(self.directory),
            item_handlers={_STATE: CheckedPyTreeHandler()},
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(keep),
                # The policy decides; but without best_fn Orbax does not store the metrics.
                best_fn=None if best_metric is None else score,
                cleanup_tmp_directories=True,
                multiprocessing_options=own,
            ),
        )

    def save(
        self,
        step: int,
        state: Tree,
        metrics: Mapping[str, Any] | None = None,
        together: Sequence[str] = (),
        program: Sequence[str] = (),
    ) -> bool:
        """Copies the state to the host and writes it in the background.

        Once it returns, the caller may donate the state's buffers to the next step. (On CPU Orbax
        keeps a view, not a copy; XLA does not overwrite a buffer that has a view.) If the previous
        save is not finished, it waits for it.

        Args:
            step: steps taken; at least that of every saved checkpoint.
            state: pytree of arrays.
            metrics: name -> scalar; without `best_metric` this checkpoint is never the best one.
            together, program: the jobs that train in one program from here on, and those that it
                was made for; see steps.py.

        Returns:
            Whether it is saved; False if `step` already was.

        Raises:
            UserError: the directory has vanished; Orbax would make another in its place.
            OSError: the file system refuses, in this save or in the previous one.
        """
        if is_main() and not in_bucket(self.directory):
            self._check_writable()
        arrays = nested({path: _array(leaf) for path, leaf in flatten(state).items()})
        # JSON has no NaN. Orbax warns about a save without metrics; {} ranks below all others.
        numbers = {name: float(value) for name, value in (metrics or {}).items()}
        numbers = {name: value for name, value in numbers.items() if math.isfinite(value)}
        jobs = {"together": tuple(together), "program": tuple(program)}
        saved = CheckedPyTreeSave(arrays, step=step, owner=self._owner, metrics=numbers, **jobs)
        with _writing(self.directory):
            return self._manager.save(
                step,
                args=ocp.args.Composite(**{_STATE: saved}),
                metrics=numbers,
            )

    def _check_writable(self) -> None:
        """Raises UserError and OSError as `save` does.

        Where Orbax cannot make a directory, its threads wait for it for minutes, and the process
        does not end until they do.
        """
        probe = self.directory / ".writable"
        try:
            probe.touch()
            probe.unlink()
        except FileNotFoundError:
            raise UserError(
                f"{self.directory} has vanished, with the checkpoints in it: mount its disk again, "
                "or restore it, and start the run again"
            ) from None

    def restore_latest(
        self, abstract_state: Tree, at: int | None = None
    ) -> tuple[int, Tree] | None:
        """Restores the newest checkpoint that can be read, or the one of a step.

        A damaged checkpoint (a file is missing, or has not the checksum that it was saved with) is
        skipped, with one line on stderr. Once an older one is read, it is renamed to
        <step>.damaged, so that its step can be saved again.

        Args:
            abstract_state: the state's structure with `jax.ShapeDtypeStruct` leaves (or arrays). A
                leaf with a sharding is restored with it, one without as a numpy array.
            at: the step of the checkpoint to go back to, if it can be read; newer ones are then
                deleted, since their steps are made again. 0: all are. None: the newest.

        Returns:
            (step, state), or None if there is no checkpoint.

        Raises:
            UserError: a checkpoint has other arrays, shapes or dtypes (nothing is cast), or no
                checkpoint can be read.
        """
        self.wait()
        damaged: dict[int, str] = {}
        steps = sorted(self._manager.all_steps(), reverse=True)
        if at == 0:
            self._drop(steps, {})
            return None
        for step in sorted(steps, key=lambda step: step != at):  # the others from the newest on
            path = self.directory / str(step) / _STATE
            reason = from_main(damage(path, step, self._owner) if is_main() else "")
            if not reason:
                held, reason = attempt(functools.partial(stored_shapes, path))
            if not reason:
                match_tree(held, abstract_state, where=f"checkpoint {path}")
                state, reason = attempt(functools.partial(read_tree, path, abstract_state))
            if not reason:
                self._drop([s for s in steps if s > step and s not in damaged], damaged)
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
        """Waits until the save in progress, if any, is on disk; raises its OSError."""
        with _writing(self.directory):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, then ends the background threads. No other method may be called after it."""
        self.wait()
        self._manager.close()

    def _drop(self, superseded: Sequence[int], damaged: Mapping[int, str]) -> None:
        """Deletes checkpoints, and renames damaged ones.

        Orbax refuses to save at or before the latest step.
        """
        if not superseded and not damaged:
            return
        if is_main():
            for step in superseded:
                remove_tree(self.directory / str(step))
            for step in damaged:
                aside = self.directory / f"{step}.damaged"
                remove_tree(aside)
                move_tree(self.directory / str(step), aside)
        barrier("checkpoints dropped")
        self._manager.reload()


def save_weights(
    directory: str | os.PathLike,
    trees: Mapping[str, Tree],
    description: Mapping[str, Any] | Callable[[], Mapping[str, Any]],
) -> None:
    """Writes finished weights: DIRECTORY/<name> (an Orbax PyTree each) and description.json.

    The directory appears complete or not at all; one that this function wrote, with nothing else in
    it, is replaced. In a multi-process run every process makes the call, and process 0 writes the
    description.

    Args:
        directory: the new directory.
        trees: name -> nested dict of arrays; names of letters, digits, '_', '-' and '.'. Each is
            looked up once, when it is written.
        description: JSON that tells a reader what the weights are (network, job, step, metrics), or
            a function that returns it, called once all trees are written.

    Raises:
        UserError: the directory holds something else.
        ValueError: a name is not a plain file name.
        OSError: the file system refuses; then nothing is left.
    """
    for name in trees:
        if not re.fullmatch(r"\w[\w.-]*", name) or name == "description.json":
            raise ValueError(f"{name!r} cannot name a tree of weights")
    target = absolute(directory)
    if reason := from_main(why_kept(target, trees.keys()) if is_main() else ""):
        raise UserError(reason)
    # Nothing is renamed in a bucket: there the description, written last, makes weights of it.
    tmp = target if in_bucket(target) else target.with_name(f".{target.name}.writing")
    if is_main():
        if in_bucket(target):
            (target / "description.json").unlink(missing_ok=True)
        remove_tree(tmp)  # the remains of a killed process
        make_directory(tmp)
    barrier(f"weights begin {target}")
    try:
        sums = {name: _save_tree(tmp / name, trees[name]) for name in trees}
        if is_main():
            described = description() if callable(description) else description
            content = {"format": _FORMAT, "description": dict(described), "trees": sums}
            write_record(tmp / "description.json", content)
            if tmp != target:
                replace_directory(tmp, target)
    except BaseException:
        remove_tree(tmp, if_possible=True)
        raise
    barrier(f"weights end {target}")


def _save_tree(path: Path, tree: Tree) -> dict[str, Any]:
    """Writes one tree, and returns its checksum and number of arrays."""
    flat = flatten(tree)
    if flat:  # a module may have no weights; Orbax refuses an empty tree
        arrays = nested({key: _array(leaf) for key, leaf in flat.items()})
        # Only a save in the background needs a second copy of host arrays.
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
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Reads what `save_weights` wrote, and checks it.

    Args:
        directory: the one given to `save_weights`.
        names: of the trees to read; None reads all.

    Returns:
        (name -> nested dict of numpy arrays, the description). `match_tree` must check a tree
        before a model uses it.

    Raises:
        UserError: it is not a directory of weights, there is no such name, or a tree cannot be read
            or has another checksum.
    """
    directory = absolute(directory)
    if not (directory / "description.json").is_file():
        raise UserError(f"{directory} holds no finished weights (it has no description.json)")
    content = read_record(directory / "description.json")
    try:
        known, description, version = content["trees"], content["description"], content["format"]
        sums = {name: entry["sha256"] for name, entry in known.items()}
    except (KeyError, TypeError, IndexError, AttributeError):
        raise UserError(f"{directory / 'description.json'} is not one of m2mkd_jax") from None
    if version != _FORMAT:
        raise UserError(f"{directory} has format {version}; this program reads {_FORMAT}")
    loaded: dict[str, dict[str, Any]] = {}
    for name in sums if names is None else names:
        path = directory / name
        if name not in sums:
            raise UserError(f"{directory} has no weights named {name!r}, only {sorted(sums)}")
        tree, reason = attempt(functools.partial(_load_tree, path, known[name]), together=False)
        if not reason and checksum(tree) != sums[name]:
            reason = "its checksum is not the one written in description.json"
        if reason:
            raise UserError(f"{path} is damaged ({reason}); restore it or make it again")
        loaded[name] = tree
    return loaded, description


def _load_tree(path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Reads one tree; `facts` is what `_save_tree` returned."""
    return read_tree(path, stored_shapes(path)) if facts["arrays"] else {}


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Raises system errors in Orbax's writers (a full disk, a quota) as OSError of `path`."""
    silence_abandoned_reads()
    try:
        with naming(path):
            yield
    except ValueError as error:
        if (code := system_code(error)) is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from None


def _drop_damaged_metrics(directory: Path) -> None:
    """Deletes damaged metrics files; with one of them Orbax cannot open the directory."""
    for file in directory.glob("[0-9]*/metrics/metrics"):
        expected = saved_metrics(file.parents[1] / _STATE)
        try:
            if expected is None or read_json(file) == expected:
                continue
            reason = f"{file} is damaged: it has other metrics than were saved"
        except UserError as error:
            reason = str(error)
        print(f"{reason}; its step cannot be the best one", file=sys.stderr)
        file.unlink()


def _array(leaf: Any) -> jax.Array | np.ndarray:
    """A leaf as an array: numbers become arrays. Orbax copies numpy arrays in `save`."""
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
