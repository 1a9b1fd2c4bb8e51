"""Tables of paths and classes: CSV with a header, or JSON Lines.

    root/train.csv, root/val.csv (or test.csv)      or the same names with .jsonl
    root/metadata.csv, or a file that is itself the root, with a column `split` or without

Paths are relative to the table's folder, or absolute. Classes are the texts of the label column,
sorted. Axes: N images.
"""

import csv
import dataclasses
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.data.formats.folder import FolderFiles, check_same_classes
from m2mkd_jax.data.formats.text import read_text
from m2mkd_jax.errors import UserError, did_you_mean
from m2mkd_jax.files import strict_json

EXPECTED = "tables of paths and labels (train.csv and val.csv, metadata.csv, or .jsonl)"
SUFFIXES = (".csv", ".jsonl")
_STEMS = {"train": ("train",), "test": ("test", "val", "validation")}
_SPLITS = {"train": ("train",), "test": ("test",), "val": ("val", "validation", "valid")}
_WHOLE = ("metadata",)  # a table of all splits
# Names of columns that are known, the first one found is taken.
IMAGE_COLUMNS = ("image", "path", "file", "file_name", "filename", "img", "image_path")
LABEL_COLUMNS = ("label", "class", "class_name", "target", "category", "fine_label", "labels")
_SPLIT_COLUMN = "split"


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where images and classes are in a table.

    Attributes:
        image: the column of images or of their paths; "": one of IMAGE_COLUMNS.
        label: the column of classes; "": one of LABEL_COLUMNS.
    """

    image: str = ""
    label: str = ""

    def choose(self, where: str, present: Sequence[str]) -> tuple[str, str]:
        """The columns of images and labels among those that are present.

        Args:
            where: the table, for messages.
            present: the names of its columns.

        Raises:
            UserError: a column is missing.
        """
        image = _chosen(where, present, self.image, IMAGE_COLUMNS, "image")
        return image, _chosen(where, present, self.label, LABEL_COLUMNS, "label")


FOUND = Columns()


def _chosen(
    where: str, present: Sequence[str], wanted: str, known: Sequence[str], what: str
) -> str:
    listed = f"it has {', '.join(present)}"
    if wanted:
        if wanted not in present:
            hint = did_you_mean(wanted, present, listed)
            raise UserError(f"{where} has no column {wanted!r} (data.{what}_column): {hint}")
        return wanted
    found = next((name for name in known if name in present), None)
    if found is None:
        raise UserError(
            f"{where} has no column {' or '.join(known[:3])}: {listed}; name the one of the "
            f"{what}s, data.{what}_column=..."
        )
    return found


def find(root: str | Path) -> bool:
    """Whether a path is a table, or a folder with tables by their names."""
    root = Path(root)
    if root.suffix.lower() in SUFFIXES and root.is_file():
        return True
    return bool(_table(root, _WHOLE) or _table(root, _STEMS["train"]))


def _table(root: Path, stems: Sequence[str]) -> Path | None:
    """The first table of these names; UserError where it is there as CSV and JSON Lines."""
    for stem in stems:
        paths = [root / f"{stem}{suffix}" for suffix in SUFFIXES]
        found = [path for path in paths if path.is_file()]
        if len(found) > 1:
            raise UserError(
                f"{found[0]} and {found[1].name}: which of them is meant? Move one elsewhere"
            )
        if found:
            return found[0]
    return None


def _whole(root: Path) -> Path | None:
    """The table that holds all splits."""
    return root if root.is_file() else _table(root, _WHOLE)


def has_test(root: str | Path) -> bool:
    """Whether there are rows of a test split."""
    root = Path(root)
    whole = _whole(root)
    if whole is None:
        return _table(root, _STEMS["test"]) is not None
    return any(_split_of(row, "") != "train" for _, row in _rows(whole))


def _split_of(row: Mapping[str, Any], where: str) -> str:
    """The split that a row is of, a key of _SPLITS; 'train' without a column for it."""
    name = str(row.get(_SPLIT_COLUMN, "train")).strip().lower()
    for split, names in _SPLITS.items():
        if name in names:
            return split
    raise UserError(f"{where} is of split {name!r}: use train, val or test")


def list_images(
    root: str | Path, split: str, columns: Columns
) -> tuple[FolderFiles, np.ndarray, tuple[str, ...]]:
    """Lists the images of a split, in the order of the table.

    Args:
        root: a folder or a table.
        split: 'train' or 'test'.
        columns: where images and classes are.

    Returns:
        The files, labels int32 (N,) and class names.

    Raises:
        UserError: no table of the split, a row without an image or class, a file that does not
            exist or stands in two rows, or classes of the test split that the training images lack.
    """
    root = Path(root)
    whole = _whole(root)
    path = whole or _table(root, _STEMS[split])
    if path is None:
        raise UserError(f"{root} has no table of {split} images: {EXPECTED}")
    own = split if whole else ""
    if own == "test" and all(_split_of(row, where) != "test" for where, row in _rows(path)):
        own = "val"
    rows = list(_images(path, columns, own))
    names = sorted({name for _, name in rows})
    if split == "test":
        train = whole or _table(root, _STEMS["train"])
        known = list(_images(train, columns, "train" if whole else "")) if train else []
        if train and not whole:
            _check_apart(path, [file for file, _ in rows], train, [file for file, _ in known])
        given, names = names, sorted({name for _, name in known}) or names
        check_same_classes(path, names, given)
    number = {name: label for label, name in enumerate(names)}
    files = np.array([os.fsencode(file) for file, _ in rows])
    labels = np.array([number[name] for _, name in rows], np.int32)
    return FolderFiles(path.parent, files), labels, tuple(names)


def _images(path: Path, columns: Columns, split: str) -> Iterator[tuple[str, str]]:
    """The path and class of each row; of one split, or of all ("")."""
    chosen: tuple[str, str] | None = None
    seen: dict[str, str] = {}  # where each file stands
    for where, row in _rows(path):
        chosen = chosen or columns.choose(str(path), list(row))
        file, name = (_text(row.get(column), where, column) for column in chosen)
        if not file or not name:
            missing = chosen[0] if not file else chosen[1]
            raise UserError(f"{where} has no {missing}: fill it in, or remove the row")
        if (before := seen.setdefault(_whole_path(path, file), where)) != where:
            raise UserError(f"{where}: {file} stands in {before} already: remove one of the rows")
        if split and _split_of(row, where) != split:
            continue
        if not (path.parent / file).is_file():
            raise UserError(f"{where}: there is no file {path.parent / file}")
        yield file, name


def _text(value: Any, where: str, column: str) -> str:
    """A value of a table as text; "" where there is none. A whole number is one, 1.0 as 1."""
    if isinstance(value, list | dict):
        raise UserError(f"{where}: {column} is a {type(value).__name__}, no text or number")
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return "" if value is None else str(value).strip()


def _whole_path(table: Path, file: str) -> str:
    return os.path.normpath(table.parent / file)


def _check_apart(test: Path, tested: Sequence[str], train: Path, trained: Sequence[str]) -> None:
    """Refuses images that are both trained on and tested."""
    known = {_whole_path(train, file) for file in trained}
    if both := [file for file in tested if _whole_path(test, file) in known]:
        raise UserError(
            f"{test}: {both[0]} is in {train.name} too ({len(both)} such images): keep them in one"
        )


def _rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each row is, for messages, and its values by column."""
    text = read_text(path)
    if path.suffix.lower() == ".jsonl":
        yield from _json_rows(text, str(path))
        return
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        _check_once(reader.fieldnames or (), str(path))
        for row in reader:
            where = f"{path} line {reader.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where} has other columns than the header")
            yield where, row
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is no CSV ({error})") from None


def _check_once(names: Sequence[str], where: str) -> None:
    """Refuses a column that is there twice, of which only one would be read."""
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise UserError(f"{where} has the column {twice[0]!r} twice: remove one")


def _json_rows(text: str, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of JSON Lines: all say their split, or none, for which "train" is taken."""
    says: bool | None = None
    # Not `splitlines`, which cuts at characters that a text of JSON may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row, where = _json_row(line, f"{path} line {number}"), f"{path} line {number}"
        says = _SPLIT_COLUMN in row if says is None else says
        if says != (_SPLIT_COLUMN in row):
            raise UserError(f"{where}: some rows have a {_SPLIT_COLUMN!r}, others none: add it")
        yield where, row


def _json_row(line: str, where: str) -> dict[str, Any]:
    try:
        row = strict_json.parse(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is no JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{where} is no JSON object: {{'image': ..., 'label': ...}} is expected")
    return row
