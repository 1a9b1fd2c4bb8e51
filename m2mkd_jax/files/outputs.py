"""What a command must not write over: what it reads, and what is there already."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from m2mkd_jax.errors import UserError
from m2mkd_jax.files.paths import in_bucket


def whole(path: str | os.PathLike) -> Path:
    """A path from the root on, through links; one in a bucket as it is."""
    return Path(path) if in_bucket(path) else Path(path).resolve()


def refuse_inputs(
    output: str | os.PathLike, inputs: Iterable[str | os.PathLike], name: str
) -> None:
    """Refuses an output that is an input, or that lies in a directory that is one.

    A run's directory may hold further files beside its own.

    Args:
        output: path that is written.
        inputs: paths that are read; "" and what is no path, such as hf://..., are passed over.
        name: of the output, for the message.

    Raises:
        UserError: names the output and the input.
    """
    target = whole(output)
    for given in inputs:
        if not os.fspath(given):
            continue
        source = whole(given)
        if source == target:
            raise UserError(f"{name}: it is read; choose another path")
        if source in target.parents and not _beside_a_run(target, source):
            raise UserError(f"{name} lies in {given}, which is read; choose a path outside it")


def _beside_a_run(target: Path, source: Path) -> bool:
    """Whether a path lies in a run's directory, and is none of what the run has there."""
    own = ("config.json", "summary.json")
    return target.parent == source and (source / "jobs").is_dir() and target.name not in own


def check_file(output: str | os.PathLike, name: str) -> None:
    """Refuses a local path where no file can be written.

    Args:
        output: the path; missing directories above it can be made.
        name: of the output, for the message.

    Raises:
        UserError: a directory is there, or what it would lie in is none, or read-only.
    """
    path = Path(output)
    if path.is_dir():
        raise UserError(f"{name} is a directory; give the path of a file")
    check_place(path, name)


def check_new_directory(output: str | os.PathLike, name: str) -> None:
    """Refuses a local path where no new directory can be made; arguments and errors as above."""
    if os.path.lexists(output):
        raise UserError(f"{name} is there already; choose another directory")
    check_place(Path(output), name)


def check_place(path: Path, name: str) -> None:
    """Refuses a path below what is no directory, or one that cannot be written to."""
    above = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not above.is_dir():
        raise UserError(f"{name} cannot be written: {above} is not a directory")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{name} cannot be written: {above} is read-only")
