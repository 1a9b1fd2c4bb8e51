"""A tensor of a file that was opened but not read: name its shape and type first, read it later.

Reading a checkpoint tensor by tensor, and letting go of each, keeps memory at the size of what is
made of it, however large the file is.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from m2mkd_jax.errors import UserError

# Wider types would lose digits in our float32 parameters; narrower ones do not.
DTYPES = ("float32", "float16", "bfloat16")
_DONTNEED = 4  # MADV_DONTNEED of Linux


@dataclass(frozen=True, eq=False, repr=False)
class Tensor:
    """A tensor in a file.

    Attributes:
        name: as messages should call it.
        shape, dtype: dtype is a numpy (or ml_dtypes) name.
        place: tensors with equal places are the same bytes.
        read: gives the array; a view of the file where `mapped`.
        mapped: whether its memory is that of the file, and can be dropped once read.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    place: tuple
    read: Callable[[], np.ndarray]
    mapped: bool

    def __repr__(self) -> str:
        return f"a tensor of {self.dtype} {list(self.shape)}"

    def array(self) -> np.ndarray:
        """The numbers, in the file's own type.

        Raises:
            UserError: the type is none of DTYPES, or a number is NaN or infinite.
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
        """Drops the memory behind what `array` gave, which must not be used any more."""
        if self.mapped:
            drop_pages(array)

    def __getitem__(self, part: int) -> Tensor:
        """One slice along the first axis, which stays: (E, ...) -> (1, ...)."""
        shape = (1, *self.shape[1:])
        read = lambda: self.read()[part : part + 1]  # noqa: E731
        name = f"{self.name}[{part}]"
        return Tensor(name, shape, self.dtype, (*self.place, part), read, self.mapped)


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors hold the same numbers; reads them only where they lie apart."""
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
    """Gives back the memory of whole pages of a contiguous array mapped from a file.

    They are read again when needed. Only Linux has this; elsewhere the file stays in memory.
    """
    if not sys.platform.startswith("linux") or not array.flags.c_contiguous:
        return
    start = array.__array_interface__["data"][0]
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (start + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - first
    if size > 0:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(size), _DONTNEED)
