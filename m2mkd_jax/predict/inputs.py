"""Files that `predict` reads beside images, and how it writes arrays."""

from __future__ import annotations

import argparse
import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.data.formats.text import read_text
from m2mkd_jax.errors import UserError
from m2mkd_jax.files import strict_json
from m2mkd_jax.files.outputs import check_file, check_new_directory, refuse_inputs
from m2mkd_jax.files.paths import at_home

DIRECTORIES = ("attention", "draw")  # flags that name directories that are written
OUTPUTS = ("csv", "json", "npz", "features", *DIRECTORIES)


def read_npz(path: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Reads the file of --npz_in.

    Returns:
        The inputs as float32, and those of `codes` and `states` that the file has.

    Raises:
        UserError: there is no such file, or it has no array of inputs.
    """
    try:
        # Opened here: np.load leaves a file open that it cannot read.
        with open(path, "rb") as content, np.load(content, allow_pickle=False) as file:
            arrays = {
                k: file[k] for k in ("images", "tokens", "codes", "states") if k in file.files
            }
    except Exception as error:  # a broken file can cause any error in zipfile, zlib and numpy
        raise UserError(f"--npz_in: {path} cannot be read: {error}") from None
    inputs = [arrays.pop(key) for key in ("images", "tokens") if key in arrays]
    if len(inputs) != 1:
        raise UserError(
            f'--npz_in: {path} needs an array "images" (of a middle module, its tokens)'
        )
    if inputs[0].dtype.kind != "f" or not inputs[0].ndim or not inputs[0].size:
        raise UserError(
            f"--npz_in: {path}: the inputs are {inputs[0].dtype} of shape {inputs[0].shape}, not "
            "some floats"
        )
    with np.errstate(over="ignore"):
        images = inputs[0].astype(np.float32)
    for name, array in {"inputs": images, **arrays}.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"--npz_in: {path}: not all numbers of its {name} are finite")
    return images, arrays


def check_outputs(args: argparse.Namespace, files: Sequence[str]) -> None:
    """Refuses an output that would replace an input or another output, or cannot be written.

    Args:
        args: of the command.
        files: that it reads, and directories.

    Raises:
        UserError: names the flag and the file.
    """
    taken: dict[Path, str] = {}
    for flag in OUTPUTS:
        if not (given := getattr(args, flag)):
            continue
        name, path = f"--{flag}={given}", Path(given).resolve()
        refuse_inputs(given, files, name)
        if path in taken:
            raise UserError(f"{name}: {taken[path]} is written there; choose another path")
        (check_new_directory if flag in DIRECTORIES else check_file)(given, name)
        taken[path] = f"--{flag}"


@contextlib.contextmanager
def new_directory(given: str) -> Iterator[Path | None]:
    """A directory that appears at the end, complete, or not at all; None where none is asked for.

    Args:
        given: its path, which `check_outputs` has looked at.
    """
    if not given:
        yield None
        return
    target = at_home(given)
    tmp = target.with_name(f".{target.name}.writing")
    shutil.rmtree(tmp, ignore_errors=True)
    tmp.mkdir(parents=True)
    try:
        yield tmp
        tmp.rename(target)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def read_labels(path: str, classes: int) -> list[str]:
    """Reads the names of the classes.

    Args:
        path: of a file with one name per line, or of a .json file with a list, or with an object
            by class number.
        classes: how many there are.

    Raises:
        UserError: it cannot be read, or has another number of names.
    """
    if path.lower().endswith((".csv", ".tsv")):  # whose lines would be taken for names
        raise UserError(f"--labels: {path} is a table; give a text with a name per line, or JSON")
    try:
        text = read_text(path)
        names = strict_json.parse(text) if path.lower().endswith(".json") else text.splitlines()
    except (OSError, ValueError, RecursionError, UserError) as error:
        raise UserError(f"--labels: {path} cannot be read: {error}") from None
    if isinstance(names, dict):
        names = [names[str(i)] for i in range(len(names)) if str(i) in names]
    if isinstance(names, list):  # the common ones for ImageNet have [id, name]
        names = [name[-1] if isinstance(name, list) and name else name for name in names]
    if not isinstance(names, list) or not all(name and isinstance(name, str) for name in names):
        raise UserError(f"--labels: {path} is no list of names")
    if len(names) != classes:
        raise UserError(f"--labels: {path} has {len(names)} names for {classes} classes")
    return names


def save_npz(path: Path, arrays: Mapping[str, Any]) -> None:
    """Writes arrays; numpy appends .npz to a path, but not to an open file."""
    with open(path, "wb") as file:
        np.savez(file, **arrays)
