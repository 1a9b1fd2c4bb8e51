"""Reads the IDX files that MNIST and its relatives come in, plain or gzipped.

    root/train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-..., t10k-labels-...   [.gz]

Axes: N items, H height, W width.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from m2mkd_jax.data.arrays import ArraySource
from m2mkd_jax.errors import UserError

_UINT8 = 0x08
_STEMS = {"train": "train", "test": "t10k"}
CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)


def check_present(root):
    """Raises UserError where one of the four files is not there."""
    for stem in _STEMS.values():
        for name in _names(stem):
            if find_idx(root, name) is None:
                raise UserError(f"{root} has no {name} or {name}.gz")


def open_split(root, split):
    """A split, 28 pixels, three equal channels, with Fashion-MNIST's class names: ArraySource.

    Raises: UserError for files that are missing, broken or do not belong together.
    """
    check_present(root)
    images_path, labels_path = (find_idx(root, name) for name in _names(_STEMS[split]))
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or labels.shape != images.shape[:1] or labels.max(initial=0) > 9:
        raise UserError(
            f"{images_path} with shape {images.shape} and {labels_path} with {labels.shape} do not"
            " belong together: download both again"
        )
    return ArraySource(np.repeat(images[..., None], 3, -1), labels, CLASSES)


def _names(stem):
    return f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"


def find_idx(root, stem):
    """The path of `stem` or `stem.gz` in folder `root`; None where neither is there."""
    for name in (stem, stem + ".gz"):
        path = Path(root) / name
        if path.is_file():
            return path
    return None


def read_idx(path):
    """Reads an IDX file of unsigned bytes: uint8 (N, ...), as many axes as the file says.

    The format: two zero bytes, a type code, the number of axes, then each axis as a big-endian
    32-bit number, then the values.
    Raises: UserError for a file that is not IDX, of another type, cut short or too long.
    """
    opener = gzip.open if Path(path).suffix == ".gz" else open
    try:
        with opener(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path} ({error}): download it again") from error
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] != _UINT8:
        raise UserError(f"{path} is not an IDX file of unsigned bytes: download it again")
    body = 4 + 4 * content[3]
    shape = tuple(int(axis) for axis in np.frombuffer(content[4:body], ">u4"))
    if len(content) != body + math.prod(shape):
        raise UserError(
            f"{path} has {len(content)} bytes where its header says {body + math.prod(shape)}:"
            " download it again"
        )
    return np.frombuffer(content, np.uint8, offset=body).reshape(shape)
