"""A tensor in an opened file: its shape and type are known, its values are read on demand.

Reading a checkpoint tensor by tensor, and dropping each from memory, keeps memory at the size of
the converted weights, whatever the size of the file.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from m2mkd_jax.errors import UserError

# Wider types would lose digits in our float32 parameters; narrower ones do not.
DTYPES = ("float32", "float16", "bfloat16")
_DONTNEED = 4  # MADV_DONTNEED of Linux


@dataclass(frozen=True, eq=False, repr=False)
class Tensor:
    """A tensor in a file.

    Attributes:
        name: as messages call it.
        shape: as in the file.
        dtype: name of a numpy (or ml_dtypes) type.
        place: tensors with equal places are the same bytes.
        read: gives the array; a view of the file if `mapped`.
        mapped: whether the array's memory is that of the file, and can be dropped after use.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    place: tuple[Any, ...]
    read: Callable[[], np.ndarray]
    mapped: bool

    def __repr__(self) -> str:
        return f"a tensor of {self.dtype} {list(self.shape)}"

    def array(self) -> np.ndarray:
        """The values, in the file's own type.

        Raises:
            UserError: the type is none of DTYPES, or a value is NaN or infinite.
        """
        if self.dtype not in DTYPES:
            raise UserError(
                f'tensor "{self.name}" is {self.dtype}; weights are one of {", ".join(DTYPES)}'
            )
        array = self.read()
        if not np.isfinite(array).all():
            raise UserError(f'tensor "{self.name}" has NaN or infinite numbers')
        return array

    def release(self, array: np.ndarray) -> None:
        """Drops the memory behind an array that `array` returned; it must not be used after."""
        if self.mapped:
            drop_pages(array)

    def part(self, index: int) -> Tensor:
        """One slice along the first axis, which stays: (E, ...) -> (1, ...)."""

        def read() -> np.ndarray:
            return self.read()[index : index + 1]

        shape, name = (1, *self.shape[1:]), f"{self.name}[{index}]"
        return Tensor(name, shape, self.dtype, (*self.place, index), read, self.mapped)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold equal values; reads them only if they are different bytes."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    if a.place == b.place:
        return True
    arrays = a.read(), b.read()
    equal = bool((arrays[0] == arrays[1]).all())
    for tensor, array in zip((a, b), arrays, strict=True):
        tensor.release(array)
    return equal


def drop_pages(array: np.ndarray) -> None:
    """Frees the memory of whole pages of a contiguous array mapped from a file.

    The system reads them again when needed. Only Linux has this; elsewhere the file stays in
    memory.
    """
    if not sys.platform.startswith("linux") or not array.flags.c_contiguous:
        return
    start = array.__array_interface__["data"][0]
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _DONTNEED)
