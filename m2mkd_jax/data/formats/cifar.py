"""The CIFAR-100 archives: the binary one, or the Python one, whose pickles are never executed.

    root[/cifar-100-binary]/train.bin, test.bin, fine_label_names.txt
    root[/cifar-100-python]/train, test, meta

Axes: N images, P values per image (3 planes of 32 x 32 pixels: red, green, blue).
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.data.array_source import ArrayImageSource
from m2mkd_jax.data.formats.pickles import read_pickle
from m2mkd_jax.data.formats.text import read_text
from m2mkd_jax.errors import UserError, printable

BINARY = ("train.bin", "test.bin", "fine_label_names.txt")
PYTHON = ("train", "test", "meta")
CLASSES = 100
IMAGES = {"train": 50_000, "test": 10_000}  # as published
_PIXELS = 3 * 32 * 32
_ROW = 2 + _PIXELS  # coarse label, fine label, pixels


def find(root: str | Path) -> tuple[str, Path] | None:
    """('binary' or 'python', the folder of the files), or None if there is no archive."""
    for kind, names in (("binary", BINARY), ("python", PYTHON)):
        for folder in (Path(root), Path(root) / f"cifar-100-{kind}"):
            if all((folder / name).is_file() for name in names):
                return kind, folder
    return None


def open_split(root: str | Path, split: str) -> ArrayImageSource:
    """Reads a split, at 32 pixels; says so where it has not as many images as are published.

    Args:
        root: the folder that holds the archive.
        split: 'train' or 'test'.

    Raises:
        UserError: no archive, or broken files.
    """
    found = find(root)
    if found is None:
        raise UserError(f"{root} does not hold CIFAR-100: {' '.join(BINARY)} are expected")
    kind, folder = found
    pixels, labels = (_binary if kind == "binary" else _python)(folder / PYTHON[split == "test"])
    if len(labels) and not 0 <= labels.min() <= labels.max() < CLASSES:
        raise UserError(f"{folder} has the label {labels.max()} of 100 classes: download it again")
    if len(labels) != IMAGES[split]:
        print(
            f"warning: the {split} images in {printable(str(folder))} are {len(labels):,}, and "
            f"CIFAR-100 has {IMAGES[split]:,}: unless that is meant, download it again",
            file=sys.stderr,
        )
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return ArrayImageSource(np.ascontiguousarray(images), labels, _names(kind, folder))


def _binary(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (N, P) and fine labels (N,) of a binary file."""
    path = path.with_suffix(".bin")
    rows = np.fromfile(path, np.uint8)
    if len(rows) % _ROW:
        raise UserError(f"{path} has {len(rows)} bytes, no multiple of {_ROW}: download it again")
    rows = rows.reshape(-1, _ROW)
    return rows[:, 2:], rows[:, 1]


def _python(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels uint8 (N, P) and fine labels (N,) of a pickle."""
    pixels, labels = (np.asarray(value) for value in _fields(path, "data", "fine_labels"))
    integers = pixels.dtype == np.uint8 and labels.dtype.kind in "iu"
    if not integers or labels.ndim != 1 or pixels.shape != (len(labels), _PIXELS):
        raise UserError(
            f"{path} has labels of shape {labels.shape} and pixels of shape {pixels.shape}:"
            " download it again"
        )
    return pixels, labels


def _fields(path: Path, *keys: str) -> list[Any]:
    """The values of some keys of a pickled dict."""
    content = read_pickle(path)
    content = content if isinstance(content, dict) else {}
    content = {_text(key): value for key, value in content.items()}
    if not content.keys() >= set(keys):
        raise UserError(f"{path} is not CIFAR-100's: it has no {' and '.join(keys)}")
    return [content[key] for key in keys]


def _text(value: Any) -> Any:
    """Decodes bytes (Python 2's strings); anything else is returned unchanged."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _names(kind: str, folder: Path) -> Sequence[str]:
    """The names of the fine classes."""
    if kind == "binary":
        names = read_text(folder / BINARY[2]).split()
    else:
        names = [_text(name) for name in _fields(folder / PYTHON[2], "fine_label_names")[0]]
    if len(names) != CLASSES:
        raise UserError(f"{folder} names {len(names)} classes of 100: download it again")
    return names
