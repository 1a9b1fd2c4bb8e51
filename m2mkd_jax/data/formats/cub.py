"""The CUB-200-2011 archive: images/ and tables with lines of "number value".

    root[/CUB_200_2011]/images.txt, image_class_labels.txt, train_test_split.txt, classes.txt

Axes: N images.
"""

import os
from pathlib import Path

import numpy as np

from m2mkd_jax.data.encoded_source import EncodedImageSource
from m2mkd_jax.data.formats.folder import FolderFiles
from m2mkd_jax.data.formats.text import read_text
from m2mkd_jax.errors import UserError

TABLES = ("images.txt", "image_class_labels.txt", "train_test_split.txt", "classes.txt")


def find(root: str | Path) -> Path | None:
    """The folder of the tables, or None."""
    for folder in (Path(root), Path(root) / "CUB_200_2011"):
        if all((folder / name).is_file() for name in TABLES):
            return folder
    return None


def open_split(root: str | Path, split: str) -> EncodedImageSource:
    """Opens a split, in the order of the tables.

    Args:
        root: the folder that holds the archive.
        split: 'train' or 'test'.

    Raises:
        UserError: no archive, or tables that contradict each other.
    """
    folder = find(root)
    if folder is None:
        raise UserError(f"{root} does not hold CUB-200-2011: {', '.join(TABLES)} are expected")
    paths, labels, training, classes = (_table(folder / name) for name in TABLES)
    if not paths.keys() == labels.keys() == training.keys():
        raise UserError(f"the tables of {folder} name different images: unpack the archive again")
    if not set(training.values()) <= {"0", "1"}:
        raise UserError(f"{folder / TABLES[2]} has values but 0 and 1: unpack the archive again")
    wanted = "1" if split == "train" else "0"
    chosen = [number for number in paths if training[number] == wanted]
    order = {number: label for label, number in enumerate(classes)}
    try:
        numbers = np.array([order[labels[number]] for number in chosen], np.int32)
    except KeyError as error:
        raise UserError(
            f"{folder / TABLES[1]} names class {error}, {TABLES[3]} does not: unpack it again"
        ) from error
    files = [os.fsencode(os.path.join("images", paths[number])) for number in chosen]
    return EncodedImageSource(FolderFiles(folder, np.array(files)), numbers, classes.values())


def _table(path: Path) -> dict[str, str]:
    """{first word: second word} of every line."""
    lines = [line.split() for line in read_text(path).splitlines() if line.strip()]
    short = next((number for number, words in enumerate(lines, 1) if len(words) != 2), None)
    if short:
        raise UserError(f"{path} line {short}: two words expected: unpack the archive again")
    values: dict[str, str] = {}
    for number, (first, second) in enumerate(lines, 1):
        if values.setdefault(first, second) != second:
            raise UserError(
                f"{path} line {number}: {first} is there twice: unpack the archive again"
            )
    return values
