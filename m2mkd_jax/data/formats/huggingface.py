"""Data sets of Hugging Face's `datasets`: what `save_to_disk` writes, and Parquet files.

    root/train/state.json, root/train/*.arrow ... [root/dataset_dict.json]
    root/state.json, root/*.arrow
    root/train-00000-of-00002.parquet, root/validation-*.parquet      or the same below root/data

Read by the library `datasets` (extra `huggingface`), because its Arrow tables under a memory map
give any row in place, and Parquet, which gives rows in groups alone, is turned into them once.
Axes: N images.
"""

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.data.formats.folder import check_same_classes, say_left_out
from m2mkd_jax.data.formats.parts import check_parts
from m2mkd_jax.data.formats.split_names import WORDS, split_of, words_of
from m2mkd_jax.data.formats.tables import Columns
from m2mkd_jax.errors import UserError

EXPECTED = "a data set of Hugging Face's datasets (dataset_dict.json, state.json, or *.parquet)"
_STATE = "state.json"  # of a saved table
_END = b"\xff\xff\xff\xff" + bytes(4)  # of a stream of Arrow: a batch of length 0


class TableFiles:
    """`EncodedFiles` that are the images of a table."""

    def __init__(self, where: str, table: Any, column: str, rows: np.ndarray) -> None:
        """Refers to rows of a table.

        Args:
            where: the directory, for messages.
            table: a `datasets.Dataset` whose images are left undecoded.
            column: of the images.
            rows: int64 (N,), the rows to use.
        """
        self.where, self.column, self.rows = where, column, rows
        self._table = table

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, index: int) -> str:
        """The row and directory of an image."""
        return f"row {self.rows[index]} of {self.where}"

    def content(self, index: int) -> bytes:
        """An image's bytes."""
        value = self._table[int(self.rows[index])][self.column]
        if isinstance(value, dict):
            if value.get("bytes") is None:
                path = value.get("path") or ""
                with open(os.path.join(self.where, path), "rb") as file:
                    return file.read()
            value = value["bytes"]
        if not isinstance(value, bytes):
            raise OSError(f"column {self.column} holds {type(value).__name__}, no image")
        return value

    def take(self, indices: np.ndarray) -> "TableFiles":
        """The rows at `indices`, in this order."""
        return TableFiles(self.where, self._table, self.column, self.rows[indices])


def find(root: str | Path) -> bool:
    """Whether a directory holds a saved data set or Parquet files."""
    root = Path(root)
    return _is_whole(root) or bool(_saved_splits(root) or _parquet(root))


def _is_whole(root: Path) -> bool:
    """Whether a directory is what one `save_to_disk` wrote."""
    return (root / "dataset_dict.json").is_file() or (root / _STATE).is_file()


def _saved_splits(root: Path) -> list[str]:
    """The names of the splits that are saved in folders of a directory."""
    known = [name for names in WORDS.values() for name in names]
    return [name for name in known if (root / name / _STATE).is_file()]


def _parquet(root: Path) -> dict[str, list[str]]:
    """Parquet files by the split that a word of their names tells; all of them 'train' if none.

    Those that tell none beside others that do are at "".

    Raises:
        UserError: a name that tells two splits, files in both places, or a part of a set that is
            missing.
    """
    above, below = (sorted(root.glob(pattern)) for pattern in ("*.parquet", "data/*.parquet"))
    if above and below:
        raise UserError(f"{above[0]} and {below[0]}: which of them is meant? Move one elsewhere")
    paths = above or below
    check_parts(paths)
    found: dict[str, list[str]] = {}
    for path in paths:
        split = split_of(path, path.stem)
        names = [word for word in WORDS.get(split or "", ()) if word in words_of(path.stem)]
        found.setdefault((names or [""])[0], []).append(str(path))
    return {"train": found[""]} if found.keys() == {""} else found


def _splits(root: Path) -> dict[str, Any]:
    """The tables by split; opening one costs no reading."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError:
        raise UserError(
            f"{root} is a data set of Hugging Face's: pip install 'm2mkd_jax[huggingface]'"
        ) from None
    datasets.disable_progress_bars()
    try:
        if parquet := _parquet(root):
            say_left_out(Path(), parquet.pop("", []), "the name tells no split")
            return {k: datasets.Dataset.from_parquet(files) for k, files in parquet.items()}
        if _is_whole(root):
            found = datasets.load_from_disk(str(root))
        else:
            found = {n: datasets.load_from_disk(str(root / n)) for n in _saved_splits(root)}
    except (OSError, ValueError, TypeError, KeyError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{root} cannot be read by `datasets` ({reason}): save it again") from None
    tables = dict(found) if isinstance(found, dict) else {"train": found}
    _check_ends(tables)
    return tables


def _check_ends(tables: Mapping[str, Any]) -> None:
    """Refuses files of a saved data set that are cut off between two of their batches of rows.

    Arrow reads such a stream as one of fewer rows.

    Raises:
        UserError: names the file.
    """
    for path in dict.fromkeys(f["filename"] for t in tables.values() for f in t.cache_files):
        with open(path, "rb") as file:
            file.seek(-len(_END), os.SEEK_END)
            if file.read() != _END:
                raise UserError(f"{path} has no end: it is cut off; copy it again")


def has_test(root: str | Path) -> bool:
    """Whether there is a test split."""
    root = Path(root)
    names = _parquet(root) or _saved_splits(root)
    return bool(set(WORDS["test"]) & set(names))


def list_images(
    root: str | Path, split: str, columns: Columns
) -> tuple[TableFiles, np.ndarray, tuple[str, ...]]:
    """Opens a split of a data set.

    Args:
        root: its directory.
        split: 'train' or 'test' ("validation" stands for it where there is no "test").
        columns: of images and labels; "": the first one of the type Image or ClassLabel, or else
            of a known name.

    Returns:
        The files, labels int32 (N,) and class names: those that the data set gives, or else the
        values of the label column, sorted.

    Raises:
        UserError: the library is missing, the data set cannot be read, no such split or column, or
            labels that are missing or unknown.
    """
    root = Path(root)
    tables = _splits(root)
    name = next((name for name in WORDS[split] if name in tables), None)
    if name is None:
        raise UserError(f"{root} has the splits {', '.join(tables)}: no {WORDS[split][0]}")
    table = tables[name]
    image, label = _columns(table, columns).choose(str(root), table.column_names)
    table = _undecoded(table, image)
    given, names = _classes(table, label, f"the split {name} of {root}")
    train = next((tables[n] for n in WORDS["train"] if n in tables), None)
    if split == "test" and train is not None:
        own, (_, names) = names, _classes(train, label, f"the split train of {root}")
        check_same_classes(root, _texts(names), _texts(own))
    number = {value: i for i, value in enumerate(names)}
    labels = np.array([number.get(value, -1) for value in given], np.int32)
    if (labels < 0).any():
        row = int(np.argmax(labels < 0))
        raise UserError(f"row {row} of the split {name} of {root} has no class (column {label})")
    images = table.select_columns([image])
    files = TableFiles(str(root), images, image, np.arange(len(table)))
    return files, labels, tuple(_texts(names))


def _classes(table: Any, label: str, where: str) -> tuple[list[Any], list[Any]]:
    """The classes of all rows, None where there is none, and the classes in their order.

    Raises:
        UserError: no such column, or one of lists.
    """
    if label not in table.features:
        raise UserError(f"{where} has no column {label!r}")
    given, names = table.with_format(None)[label][:], getattr(table.features[label], "names", None)
    if any(isinstance(value, list | dict) for value in given):
        raise UserError(f"{where}: column {label} holds lists; one class an image is expected")
    given = [None if value != value else value for value in given]  # NaN stands for a missing one
    if names is None:
        return given, _values(given)
    return [names[v] if v is not None and 0 <= v < len(names) else None for v in given], list(names)


def _values(column: list[Any]) -> list[Any]:
    """The values of a label column, sorted: numbers as numbers, texts as texts."""
    found = {value for value in column if value is not None}
    return sorted(found, key=lambda value: (isinstance(value, str), value))


def _texts(values: list[Any]) -> list[str]:
    return [str(value) for value in values]


def _columns(table: Any, columns: Columns) -> Columns:
    """The columns that are asked for, or those that the types of a table tell."""
    kinds = {name: type(feature).__name__ for name, feature in table.features.items()}
    image = columns.image or next((n for n, kind in kinds.items() if kind == "Image"), "")
    label = columns.label or next((n for n, kind in kinds.items() if kind == "ClassLabel"), "")
    return Columns(image, label)


def _undecoded(table: Any, image: str) -> Any:
    """The table with the column `image` alone decoded to bytes instead of pictures."""
    feature = table.features[image]
    if type(feature).__name__ == "Image":
        return table.cast_column(image, type(feature)(decode=False))
    return table
