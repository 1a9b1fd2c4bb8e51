"""Reads and writes .safetensors: eight bytes of length, a JSON header, raw little-endian bytes.

The format has no tensor of two names. As the safetensors package does, a tensor is written once,
and its other names are entries of the metadata: {other name: the name it is stored by}.

Implemented here, so that it needs no package, reads without copying, and writes tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from m2mkd_jax.checkpoint.files import replace_file
from m2mkd_jax.conversion.lazy_tensor import Tensor
from m2mkd_jax.errors import UserError
from m2mkd_jax.files.strict_json import unique_names

SUFFIX = ".safetensors"
_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": np.dtype(ml_dtypes.bfloat16).name,
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_CODES = {name: code for code, name in _DTYPES.items()}
_LARGEST_HEADER = 100_000_000  # the format's own limit


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Opens a file.

    Returns:
        Its tensors by name, whose values are read on demand, and its metadata.

    Raises:
        UserError: there is no such file, or it is not exactly of the format.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is empty"
        raise UserError(f"{path} cannot be read: {reason}") from None
    try:
        return _parse(data)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not a safetensors file: {reason[:200]}") from None


def _parse(data: np.ndarray) -> tuple[dict[str, Tensor], dict[str, str]]:
    """See `read_safetensors`; `data`: the bytes of the file. ValueError and others if wrong."""
    (size,) = struct.unpack("<Q", data[:8].tobytes())
    if not 2 <= size <= min(_LARGEST_HEADER, len(data) - 8):
        raise ValueError("its header is longer than the file")
    header = json.loads(data[8 : 8 + size].tobytes(), object_pairs_hook=unique_names)
    metadata = header.pop("__metadata__", {})
    if not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("its metadata are not strings")
    body = data[8 + size :]
    tensors: dict[str, Tensor] = {}
    ranges: list[tuple[int, int]] = []
    for name, entry in header.items():
        dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
            raise ValueError(f'"{name}" has a wrong shape or place')
        if end - begin != math.prod(shape) * np.dtype(dtype).itemsize:
            raise ValueError(f'"{name}" has {end - begin} bytes, not those of its shape')
        ranges.append((begin, end))
        read = _reader(body[begin:end], dtype, shape)
        tensors[name] = Tensor(name, shape, dtype, (begin, end), read, True)
    expected = 0
    for begin, end in sorted(ranges):
        if begin != expected:
            raise ValueError("its tensors leave a gap or overlap")
        expected = end
    if expected != len(body):
        raise ValueError("its tensors do not fill the file")
    for name, stored in list(metadata.items()):
        if stored in tensors and name not in tensors:
            tensors[name] = dataclasses.replace(tensors[stored], name=name)
            del metadata[name]
    return tensors, metadata


def _reader(part: np.ndarray, dtype: str, shape: tuple[int, ...]) -> Callable[[], np.ndarray]:
    return lambda: part.view(dtype).reshape(shape)


def write_safetensors(
    path: Path, arrays: Iterable[tuple[str, np.ndarray]], metadata: Mapping[str, str]
) -> None:
    """Writes a file; it appears complete or not at all.

    Args:
        path: of the file.
        arrays: (name, array) of each tensor; arrays that are one object are stored once, by the
            first of their names.
        metadata: strings by name.

    Raises:
        UserError: the file cannot be written.
    """
    by_name = dict(arrays)
    first = {id(array): name for name, array in reversed(by_name.items())}
    aliases = {n: first[id(a)] for n, a in by_name.items() if first[id(a)] != n}
    stored = [(name, array) for name, array in by_name.items() if name not in aliases]
    header: dict[str, Any] = {"__metadata__": {**metadata, **aliases}}
    position = 0
    for name, array in stored:
        end = position + array.nbytes
        header[name] = {
            "dtype": _CODES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors start at a multiple of 8

    def write(tmp: Path) -> None:
        with open(tmp, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for _, array in stored:
                file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    replace_file(path, write)
