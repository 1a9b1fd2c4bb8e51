"""The list that gives the images of a flat validation folder their classes, as ImageNet's.

    val.txt                   lines of file and class: the folder's name in train/, or its number
                              from 0 in their order ("ILSVRC2012_val_00000001.JPEG 65")
    val.txt                   lines of a class's name alone, of the images in their order
    LOC_val_solution.csv      "ILSVRC2012_val_00048981,n03995372 85 1 499 272" below a header

Each lies beside the folder val/ or in it.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from m2mkd_jax.data.formats.text import read_text
from m2mkd_jax.errors import UserError

NAMES = ("val.txt", "LOC_val_solution.csv")
_HEADER = "ImageId"


def find(root: str | Path) -> Path | None:
    """The list of a data set's validation images, in root or in root/val."""
    root = Path(root)
    paths = (folder / name for folder in (root, root / "val") for name in NAMES)
    return next((path for path in paths if path.is_file()), None)


def read(path: Path, files: Sequence[str], names: Sequence[str]) -> list[tuple[str, int]]:
    """The images of a flat folder with their labels, in the order of the list.

    Args:
        path: of the list.
        files: names of the images in the folder.
        names: the classes, in the order of their labels.

    Raises:
        UserError: one line that names the first line of the list that does not fit.
    """
    lines = [line.replace(",", " ").split() for line in read_text(path).splitlines()]
    rows = [(number, words) for number, words in enumerate(lines, start=1) if words]
    rows = [row for row in rows if row[1][0] != _HEADER]
    if rows and all(len(words) == 1 for _, words in rows):
        return _in_order(path, rows, sorted(files), names)
    known = {os.path.splitext(file)[0]: file for file in files} | {file: file for file in files}
    number = {name: label for label, name in enumerate(names)}
    found: dict[str, int] = {}
    for line, words in rows:
        file = known.get(os.path.basename(words[0]))
        if file is None or file in found:
            why = "is named before" if file else "is not in the folder"
            raise UserError(f"{path} line {line}: image {words[0]!r} {why}")
        if len(words) < 2:
            raise UserError(f"{path} line {line}: image {words[0]!r} has no class")
        found[file] = _label(path, line, words[1], number)
    if missing := sorted(set(files) - found.keys()):
        raise UserError(
            f"{path} has no line for {len(missing)} of the images (the first: {missing[0]!r})"
        )
    return list(found.items())


def _label(path: Path, line: int, name: str, number: dict[str, int]) -> int:
    """The label of a class by name, or else by number from 0."""
    if name in number:
        return number[name]
    if name.isdecimal() and int(name) < len(number):
        return int(name)
    raise UserError(
        f"{path} line {line}: class {name!r} is no folder of train/, and no number from 0 to "
        f"{len(number) - 1}"
    )


def _in_order(
    path: Path,
    rows: Sequence[tuple[int, list[str]]],
    files: Sequence[str],
    names: Sequence[str],
) -> list[tuple[str, int]]:
    """Classes alone, one line an image. Numbers are refused, since ImageNet's own are others."""
    number = {name: label for label, name in enumerate(names)}
    for line, (name,) in rows:
        if name not in number:
            raise UserError(
                f"{path} line {line}: {name!r} is no folder of train/; lines of a class alone must "
                "name it (ILSVRC2012's own numbers have another order)"
            )
    if len(rows) != len(files):
        raise UserError(f"{path} has {len(rows)} lines for {len(files)} images")
    return [(file, number[name]) for file, (_, (name,)) in zip(files, rows, strict=True)]
