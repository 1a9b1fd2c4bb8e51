"""IDX files, plain or gzipped: MNIST and Fashion-MNIST.

    root/train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-..., t10k-labels-...   [.gz]

Axes: N items, H height, W width.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from m2mkd_jax.data.array_source import ArrayImageSource
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


def check_present(root: str | Path) -> None:
    """Raises UserError if one of the four files is missing."""
    for stem in _STEMS.values():
        for name in _names(stem):
            _require_idx(root, name)


def open_split(root: str | Path, split: str) -> ArrayImageSource:
    """Reads a split of Fashion-MNIST: 28 pixels, three equal channels.

    Args:
        root: the folder of the four files.
        split: 'train' or 'test'.

    Raises:
        UserError: files that are missing, broken or do not belong together.
    """
    images_path, labels_path = (_require_idx(root, name) for name in _names(_STEMS[split]))
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or labels.shape != images.shape[:1] or labels.max(initial=0) > 9:
        raise UserError(
            f"{images_path} with shape {images.shape} and {labels_path} with {labels.shape} do not"
            " belong together: download both again"
        )
    return ArrayImageSource(np.repeat(images[..., None], 3, -1), labels, CLASSES)


def _names(stem: str) -> tuple[str, str]:
    """The files of images and of labels."""
    return f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"


def find_idx(root: str | Path, stem: str) -> Path | None:
    """The path of `stem` or `stem.gz` in a folder; None if it has neither."""
    for name in (stem, stem + ".gz"):
        path = Path(root) / name
        if path.is_file():
            return path
    return None


def _require_idx(root: str | Path, stem: str) -> Path:
    path = find_idx(root, stem)
    if path is None:
        raise UserError(f"{root} has no {stem} or {stem}.gz")
    return path


def read_idx(path: str | Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes.

    The format: two zero bytes, a type code, the number of axes, the length of each axis as a
    big-endian 32-bit number, then the values.

    Returns:
        uint8 (N, ...), of the shape in the file's header.

    Raises:
        UserError: not an IDX file, of another type, or of the wrong length.
    """
    try:
        with gzip.open(path, "rb") if Path(path).suffix == ".gz" else open(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path} ({error}): download it again") from error
    body = 4 + 4 * content[3] if len(content) > 3 else 4
    if len(content) < body or content[:2] != b"\0\0" or content[2] != _UINT8:
        raise UserError(f"{path} is not an IDX file of unsigned bytes: download it again")
    shape = tuple(int(axis) for axis in np.frombuffer(content[4:body], ">u4"))
    if len(content) != body + math.prod(shape):
        raise UserError(
            f"{path} has {len(content)} bytes where its header says {body + math.prod(shape)}:"
            " download it again"
        )
    try:
        return np.frombuffer(content, np.uint8, offset=body).reshape(shape)
    except ValueError as error:  # no items, and more axes or longer ones than an array can have
        raise UserError(f"{path} says the shape {shape}: download it again") from error
