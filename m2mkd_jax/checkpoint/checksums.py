"""Checksums of a checkpoint's files, written before it is committed and compared before it is read.

Orbax and TensorStore restore a file with a flipped bit without a word.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from m2mkd_jax.checkpoint.files import read_record, write_record
from m2mkd_jax.checkpoint.orbax_tree import not_of_the_file
from m2mkd_jax.errors import UserError
from m2mkd_jax.files.paths import as_path, file_names, in_bucket

FILE = "checksums.json"
OWNER = ("job", "run")  # what a checkpoint says about whose it is
_BLOCK, _AT_ONCE = 1 << 22, 8  # bytes that are read at once, of as many objects


class CheckedPyTreeHandler(ocp.PyTreeCheckpointHandler):
    """Orbax's handler of PyTrees, which also leaves checksums of the files that it wrote.

    Orbax calls `finalize` in the background, once all processes have written, and before it renames
    the directory to its final name: no checkpoint is ever without its checksums.
    """

    _facts: Mapping[str, Any] = MappingProxyType({})

    async def async_save(self, directory: Any, *others: Any, args: Any = None) -> Any:
        self._facts = {
            "step": args.step,
            **args.owner,
            "metrics": args.metrics,
            "together": list(args.together),
        }
        return await super().async_save(directory, *others, args=args)

    def finalize(self, directory: epath.Path) -> None:
        super().finalize(directory)
        path = as_path(directory)
        write_record(path / FILE, {**self._facts, "files": file_checksums(path)})


@ocp.args.register_with_handler(CheckedPyTreeHandler, for_save=True, for_restore=True)
@dataclass
class CheckedPyTreeSave(ocp.args.PyTreeSave):
    """What `CheckedPyTreeHandler` saves.

    Attributes:
        step: of the checkpoint.
        owner: whose state it is, by OWNER.
        metrics: kept beside the checksums, because Orbax keeps them in a file of its own.
        together: the jobs whose states are saved at this step by one program.
    """

    step: int = 0
    owner: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    together: tuple[str, ...] = ()


def file_checksums(directory: Path) -> dict[str, str]:
    """sha256 (hex) of every file below a directory, by relative path; without FILE itself."""
    names = [name for name in file_names(directory) if name != FILE]

    def digest(name: str) -> str:
        with (directory / name).open("rb") as file:
            found = hashlib.sha256()
            while block := file.read(_BLOCK):
                found.update(block)
        return found.hexdigest()

    # One at a time from a disk; a bucket answers slowly, but many at once.
    with ThreadPoolExecutor(_AT_ONCE if in_bucket(directory) else 1) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def damage(directory: Path, step: int, owner: Mapping[str, str] = MappingProxyType({})) -> str:
    """What is wrong with a checkpoint's files: one line, "" where nothing is.

    Args:
        directory: that `CheckedPyTreeHandler` wrote.
        step: whose checkpoint it should be.
        owner: likewise, by OWNER; what either does not say is not compared.

    Raises:
        OSError: the system refuses to read, which says nothing about the files.
    """
    try:
        with contextlib.suppress(FileNotFoundError), (directory / FILE).open("rb"):
            pass
        content = read_record(directory / FILE)
        expected: dict[str, str] = content["files"]
        if content["step"] != step:
            return f"it is the checkpoint of step {content['step']}"
        if stranger := _stranger(content, owner):
            return f"it is a checkpoint of {stranger}"
        have = file_checksums(directory)
    except UserError as error:
        return str(error)
    except (OSError, KeyError, TypeError) as error:
        if not_of_the_file(error):
            raise
        return f"{directory / FILE}: {type(error).__name__}: {error}"
    if missing := sorted(expected.keys() - have.keys()):
        return f"{missing[0]} is missing"
    changed = sorted(name for name, digest in expected.items() if have[name] != digest)
    return f"{changed[0]} has another checksum" if changed else ""


def _stranger(content: Mapping[str, Any], owner: Mapping[str, str]) -> str:
    """Whose a checkpoint is, where that is another than it should be; else ""."""
    names = {"job": content.get("job"), "run": "another run, or of an earlier start of the job"}
    for key in OWNER:
        have, wanted = content.get(key), owner.get(key)
        if have and wanted and have != wanted:
            return str(names[key])
    return ""


def saved_metrics(directory: Path) -> dict[str, Any] | None:
    """The metrics that a checkpoint was saved with; None where they cannot be read."""
    try:
        return read_record(directory / FILE)["metrics"]
    except (UserError, KeyError):
        return None


def saved_together(directory: Path) -> tuple[str, ...]:
    """The jobs that a checkpoint was saved with, its own among them; () where that is not said."""
    try:
        return tuple(read_record(directory / FILE)["together"])
    except (UserError, KeyError, TypeError):
        return ()
