"""Reads the sharded checkpoints of vmoe (arXiv 2106.05974): PREFIX.index and PREFIX.data-*-of-*.

Both kinds of file are msgpack, as Flax writes it, with types of its own (numbers of extensions
below). The index is {"shard_count", "index"}: the tree of parameters with, in place of each array,
its shape, the slices that it was cut into, and the file that holds each. A data file is one dict:
the array's number, in the order of the sorted tree, -> a list of (flat parts, slice).

Files are anybody's: nothing in them is run, and what does not fit together is refused.
Axes: of the arrays, see google_npz.py.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np

from m2mkd_jax.errors import UserError

SUFFIX = ".index"
_NDARRAY, _SHAPE, _SLICE, _SLICES, _INFO = 1, 4, 5, 6, 8
_CHUNKS = "__msgpack_array_chunk_a87ca2__"  # a key of the dict in a data file
_MOST_FILES = 100_000  # their numbers have five digits
_DTYPES = ("float32", "float16", "bfloat16")

Slices = tuple[tuple[int, int], ...]  # start and stop along each axis


@dataclasses.dataclass(frozen=True)
class _Array:
    """An array of the index: its shape, its slices, and the number of the file of each."""

    shape: tuple[int, ...]
    slices: tuple[Slices, ...]
    files: tuple[int, ...]


class Shards:
    """The arrays of a sharded checkpoint, by their paths in its tree.

    Attributes:
        shapes: of all arrays.

    Raises:
        UserError: the index cannot be read, or files that it names are missing.
    """

    def __init__(self, index: Path):
        self._index = index
        content = _unpacked(index)
        if not isinstance(content, dict) or not {"index", "shard_count"} <= content.keys():
            raise UserError(f"{index} is no index of a checkpoint of vmoe")
        try:
            self._arrays = dict(_leaves(content["index"], ""))
        except ValueError as error:
            raise UserError(f"{index} is no index of a checkpoint of vmoe: {error}") from None
        self._numbers = {name: number for number, name in enumerate(self._arrays)}
        if not self._arrays:
            raise UserError(f"{index} names no arrays")
        count, prefix = content["shard_count"], index.name.removesuffix(SUFFIX)
        used = sorted({file for array in self._arrays.values() for file in array.files})
        if type(count) is not int or not set(used) <= set(range(min(count, _MOST_FILES))):
            raise UserError(
                f"{index} says that it has {count!r:.40} data files, and uses {used[:3]}: "
                "fetch it again"
            )
        paths = {i: index.with_name(f"{prefix}.data-{i:05d}-of-{count:05d}") for i in used}
        missing = [path for path in paths.values() if not path.is_file()]
        if missing:
            raise UserError(
                f"{index}: {len(missing)} of its {len(paths)} data files are missing, the first: "
                f"{missing[0]}"
            )
        self._paths = paths
        # Every file has parts of many arrays: it is unpacked once.
        self._contents: dict[int, Any] = {}
        self.shapes = {name: array.shape for name, array in self._arrays.items()}

    def read(self, name: str) -> np.ndarray:
        """An array, put together from the files that hold its parts.

        Raises:
            UserError: a file is damaged, or does not hold what the index says.
        """
        array = self._arrays[name]
        whole = np.empty(array.shape, np.float32)
        left = dict(zip(array.slices, array.files, strict=True))
        for file in sorted(set(array.files)):
            if file not in self._contents:
                self._contents[file] = _unpacked(self._paths[file])
            content = self._contents[file]
            for part, where in _parts(content, self._paths[file], self._numbers[name]):
                if left.pop(where, None) != file or part.size != whole[_numpy(where)].size:
                    raise self._other(file)
                whole[_numpy(where)] = part.reshape(whole[_numpy(where)].shape)
        if left:
            raise self._other(next(iter(left.values())))
        return whole

    def _other(self, file: int) -> UserError:
        return UserError(
            f"{self._paths[file]} does not hold the arrays that {self._index} names: of a training "
            "state, save the parameters alone; else fetch the files again"
        )


def _leaves(tree: Any, path: str) -> Iterator[tuple[str, _Array]]:
    """The arrays of an index with their paths, in the order in which jax flattens a dict.

    Raises:
        ValueError: a part of a path is no text.
    """
    if isinstance(tree, dict):
        if others := [name for name in tree if not isinstance(name, str)]:
            raise ValueError(f"a part of a name is {others[0]!r:.40}")
        for name in sorted(tree):
            yield from _leaves(tree[name], f"{path}/{name}" if path else str(name))
    elif isinstance(tree, _Array):
        yield path, tree


def _parts(content: Any, path: Path, number: int) -> Iterator[tuple[np.ndarray, Slices]]:
    """The parts of an array in the content of a data file, flat, and where they belong."""
    found = content.get(str(number), []) if isinstance(content, dict) else None
    if found is None or _CHUNKS not in content:
        raise UserError(f"{path} is no data file of a checkpoint of vmoe")
    try:
        for flat, where in found:
            yield np.concatenate([np.asarray(part, np.float32).reshape(-1) for part in flat]), where
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from None


def _numpy(where: Slices) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in where)


def _unpacked(path: Path) -> Any:
    """What a file holds.

    Raises:
        UserError: it cannot be read, or has types that are not known here.
    """
    try:
        return msgpack.unpackb(path.read_bytes(), ext_hook=_typed, raw=False, strict_map_key=False)
    except Exception as error:  # whatever msgpack and numpy raise of a damaged file
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} cannot be read: {reason}") from None


def _typed(code: int, data: bytes) -> Any:
    """A value of one of the types of its own."""
    value = msgpack.unpackb(data, raw=True)
    if code == _NDARRAY:
        shape, dtype, content = value
        if (name := dtype.decode()) not in _DTYPES:
            raise ValueError(f"an array of {name}; {', '.join(_DTYPES)} are read")
        if name == "bfloat16":  # the upper half of a float32
            wide = np.frombuffer(content, "<u2").astype(np.uint32) << 16
            return wide.view(np.float32).reshape(shape)
        return np.frombuffer(content, np.dtype(name).newbyteorder("<")).reshape(shape)
    if code == _SLICE:
        start, stop, step = value
        if step not in (None, 1):
            raise ValueError(f"a slice of step {step}")
        return int(start), int(stop)
    if code == _SLICES:
        return tuple(_typed(_SLICE, part) for part in value)
    if code == _SHAPE:
        return tuple(map(int, value[0]))
    if code == _INFO:
        shape, slices, files = value
        parts = tuple(_typed(_SLICES, part) for part in slices)
        found = _Array(_typed(_SHAPE, shape), parts, tuple(map(int, files)))
        _check_whole(found)
        return found
    raise ValueError(f"a value of the unknown type {code}")


def _check_whole(array: _Array) -> None:
    """Raises ValueError where the slices are not those of the whole array."""
    for where in array.slices:
        inside = all(0 <= a < b <= n for (a, b), n in zip(where, array.shape, strict=True))
        if not inside:
            raise ValueError(f"a slice {where} of an array {array.shape}")
    sizes = sum(math.prod(stop - start for start, stop in where) for where in array.slices)
    if sizes != math.prod(array.shape) or len(set(array.slices)) != len(array.slices):
        raise ValueError(f"slices that do not make up an array {array.shape}")
    if len(array.files) != len(array.slices):
        raise ValueError("as many files as slices are expected")
