"""Reads the IDX files that MNIST and its relatives come in, plain or gzipped.

Axes: N items, H height, W width.
"""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

from m2mkd_jax.errors import UserError

_UINT8 = 0x08


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
