"""CIFAR-100 as published: the binary archive, or the Python one, whose pickles are not run.

    root[/cifar-100-binary]/train.bin, test.bin, fine_label_names.txt
    root[/cifar-100-python]/train, test, meta

Axes: N images; 32 pixels, planes of red, green, blue.
"""

from pathlib import Path

import numpy as np

from m2mkd_jax.data.arrays import ArraySource
from m2mkd_jax.data.formats.pickles import read_pickle
from m2mkd_jax.errors import UserError

BINARY = ("train.bin", "test.bin", "fine_label_names.txt")
PYTHON = ("train", "test", "meta")
CLASSES = 100
_PIXELS = 3 * 32 * 32
_ROW = 2 + _PIXELS  # coarse label, fine label, pixels


def find(root):
    """('binary' or 'python', the folder), or None."""
    for kind, names in (("binary", BINARY), ("python", PYTHON)):
        for folder in (Path(root), Path(root) / f"cifar-100-{kind}"):
            if all((folder / name).is_file() for name in names):
                return kind, folder
    return None


def open_split(root, split):
    """ArraySource of a split, 32 pixels. Raises: UserError for files that are broken."""
    kind, folder = find(root)
    pixels, labels = (_binary if kind == "binary" else _python)(folder / PYTHON[split == "test"])
    if len(labels) and not 0 <= labels.min() <= labels.max() < CLASSES:
        raise UserError(f"{folder} has the label {labels.max()} of 100 classes: download it again")
    images = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return ArraySource(np.ascontiguousarray(images), labels, _names(kind, folder))


def _binary(path):
    path = path.with_suffix(".bin")
    rows = np.fromfile(path, np.uint8)
    if len(rows) % _ROW:
        raise UserError(f"{path} has {len(rows)} bytes, no multiple of {_ROW}: download it again")
    rows = rows.reshape(-1, _ROW)
    return rows[:, 2:], rows[:, 1]


def _python(path):
    pixels, labels = map(np.asarray, _fields(path, "data", "fine_labels"))
    whole = pixels.dtype == np.uint8 and labels.dtype.kind in "iu"
    if not whole or labels.ndim != 1 or pixels.shape != (len(labels), _PIXELS):
        raise UserError(
            f"{path} has labels of shape {labels.shape} and pixels of shape {pixels.shape}:"
            " download it again"
        )
    return pixels, labels


def _fields(path, *keys):
    content = read_pickle(path)
    content = dict(content) if isinstance(content, dict) else {}
    content = {_text(key): value for key, value in content.items()}
    if not content.keys() >= set(keys):
        raise UserError(f"{path} is not CIFAR-100's: it has no {' and '.join(keys)}")
    return [content[key] for key in keys]


def _text(value):
    """Python 2's strings come as bytes; in files that were written again they may be text."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _names(kind, folder):
    if kind == "binary":
        names = (folder / BINARY[2]).read_text().split()
    else:
        names = [_text(name) for name in _fields(folder / PYTHON[2], "fine_label_names")[0]]
    if len(names) != CLASSES:
        raise UserError(f"{folder} names {len(names)} classes of 100: download it again")
    return names
