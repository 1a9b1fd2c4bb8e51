"""Which directories `save_weights` may replace: those that it wrote, with nothing else in them."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from m2mkd_jax.checkpoint.files import read_record
from m2mkd_jax.errors import UserError
from m2mkd_jax.files.paths import file_names, in_bucket, remove_tree

DESCRIPTION = "description.json"


def why_kept(directory: Path, names: Collection[str] = ()) -> str:
    """Why weights must not take the place of what is there, in one line; "": they may.

    Args:
        directory: where weights are to be.
        names: of the trees to write; in a bucket those of a killed process may lie there alone, for
            there the description comes last.
    """
    if in_bucket(directory):
        entries = {name.partition("/")[0] for name in file_names(directory)}
    elif directory.is_dir():
        entries = {entry.name for entry in directory.iterdir()}
    elif directory.exists():
        return f"{directory} is a file; give the path of a directory"
    else:
        entries = set()
    begun = {entry.partition(".orbax")[0] for entry in entries}  # Orbax's names under way
    if not entries or (in_bucket(directory) and begun <= {*names}):
        return ""
    try:
        if DESCRIPTION not in entries:
            raise UserError(f"{directory} holds other files")
        content = read_record(directory / DESCRIPTION)
        if not {"format", "description", "trees"} <= content.keys():
            raise UserError(f"{directory / DESCRIPTION} is not one of m2mkd_jax")
        if odd := sorted(entries - {DESCRIPTION, *content["trees"]}):
            raise UserError(f"{directory} holds {odd[0]}, which is none of its weights")
    except (UserError, TypeError) as error:
        return f"weights do not replace what they are not: {error}; choose another directory"
    return ""


def replace_directory(new: Path, target: Path) -> None:
    """Renames a local directory, in place of another."""
    old = target.with_name(f".{target.name}.old")
    remove_tree(old)
    if target.exists():  # a directory cannot be renamed onto a full one
        target.rename(old)
    new.rename(target)
    remove_tree(old, if_possible=True)
