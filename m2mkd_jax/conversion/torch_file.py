"""Reads and writes the files of torch.save, without executing anything that is in them."""

from __future__ import annotations

import argparse
import importlib
import re
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.checkpoint.files import replace_file
from m2mkd_jax.conversion.lazy_tensor import Tensor
from m2mkd_jax.conversion.zip_check import DamagedZip, check_zip
from m2mkd_jax.errors import UserError

SUFFIXES = (".pth", ".pt")


class Skipped:
    """Stands for a value of a type that is not read; whatever the file calls, this does nothing."""

    def __init__(self, *arguments: Any, **options: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        pass


_LOADED = "only tensors and plain values are loaded"
_MAX_FOREIGN = 100  # names in a file


class _Foreign:
    """Loads a file's names of other packages as nothing: yacs's, omegaconf's, the program's own.

    What the file makes of such a name is an empty dict to the reader, which fills it, and `Skipped`
    in the content.

    Attributes:
        names: that stand for nothing.
        made: every dict; kept, so that no other object has its id.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.made: list[OrderedDict] = []

    def stand_ins(self) -> list[Any]:
        """What is called in place of the names, for torch."""
        made = self.made

        class Empty:
            def __new__(cls, *arguments: Any, **options: Any) -> Any:
                made.append(OrderedDict())
                return made[-1]

        return [(Empty, name) for name in self.names]

    def add(self, error: Exception) -> bool:
        """Whether a file was refused for a new name of another package, which is noted.

        Names of Python's own modules, of torch and NumPy are no others': those that are harmless
        are known above.
        """
        found = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
        if not found or found[1] in self.names or len(self.names) == _MAX_FOREIGN:
            return False
        package, _, inside = found[1].partition(".")
        if not inside or package in (*sys.stdlib_module_names, "torch", "numpy"):
            return False
        self.names.append(found[1])
        return True


def _plain_dict(*arguments: Any) -> dict[Any, Any]:
    return {}


_CORES = ("numpy.core.multiarray", "numpy._core.multiarray", "numpy")
_SKIPPED = (
    *(f"{core}.{name}" for core in _CORES for name in ("scalar", "_reconstruct", "ndarray")),
    *(f"{core}.numeric._frombuffer" for core in ("numpy.core", "numpy._core")),
    "numpy.dtype",
    *(f"numpy.dtypes.{kind}{bits}DType" for kind in ("Int", "UInt") for bits in (8, 16, 32, 64)),
    *(f"numpy.dtypes.{name}DType" for name in ("Float16", "Float32", "Float64", "Bool", "Str")),
    *(f"builtins.{name}" for name in ("int", "float", "bool", "str", "list", "dict", "set")),
    *(f"pathlib.{kind}{name}" for kind in ("", "Pure") for name in ("Path", "PosixPath")),
    *(f"pathlib.{kind}WindowsPath" for kind in ("", "Pure")),
    *(f"pathlib._local.{kind}Path" for kind in ("", "Posix", "Windows")),
    *(f"builtins.{name}" for name in ("complex", "frozenset", "bytearray", "range", "slice")),
    *(f"datetime.{name}" for name in ("datetime", "timedelta", "date", "time", "timezone")),
    *("_codecs.encode", "decimal.Decimal", "fractions.Fraction", "uuid.UUID"),
    *("types.SimpleNamespace", "torch.torch_version.TorchVersion", "typing.Any"),
)
# What is called in place of the names in a file.
_STAND_INS = [
    argparse.Namespace,
    *((Skipped, name) for name in _SKIPPED),
    (_plain_dict, "collections.defaultdict"),
]


def import_torch(purpose: str) -> Any:
    """The torch module, an optional dependency.

    Args:
        purpose: what it is needed for, as the message says it.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ImportError:
        raise UserError(f"{purpose} needs torch: pip install 'm2mkd_jax[convert]'") from None


def read_torch(path: Path) -> Any:
    """The content of a file, with a `Tensor` in place of every tensor, read on demand.

    Only tensors and plain containers are unpickled (`weights_only`). Values of harmless types that
    training programs keep beside weights (numpy's, paths), and all of other packages' types, become
    `Skipped`. The bytes of a zip file
    (the format since torch 1.6) are first checked against the file's own checksums.

    Raises:
        UserError: there is no such file, torch is missing, or the file is damaged or holds anything
            else.
    """
    torch = import_torch(f"reading {path}")
    try:
        with open(path, "rb") as file:
            zipped = file.read(2) == b"PK"
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    # A hostile file can provoke any error inside zipfile and torch; all mean that it is bad.
    try:
        if zipped:
            check_zip(path)
        foreign = _Foreign()
        content = _loaded(torch, path, zipped, foreign)
        if any(content is made for made in foreign.made):
            raise ValueError(f"it is a {foreign.names[0]}; {_LOADED}")
        return _LazyTensors(torch, zipped, {id(made) for made in foreign.made})(content)
    except Exception as error:
        raise UserError(f"{path} cannot be read safely: {_reason(error)}") from None


def _loaded(torch: Any, path: Path, zipped: bool, foreign: _Foreign) -> Any:
    """What torch reads; a file names one type after the other that it does not know."""
    while True:
        names = [*_STAND_INS, *foreign.stand_ins()]
        try:
            with warnings.catch_warnings(), torch.serialization.safe_globals(names):
                warnings.simplefilter("ignore")
                return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:
            if not foreign.add(error):
                raise


def _reason(error: Exception) -> str:
    """Why a file is refused, in a line; torch's own message suggests to load it unsafely."""
    text = str(error)
    if found := re.search(r"GLOBAL (\S+)", text):
        return f"it asks for {found[1]}; {_LOADED}"[:200]
    if isinstance(error, DamagedZip):
        return f"it was damaged or changed ({text})"
    if isinstance(error, KeyError):  # of pickle, where a byte stands for nothing that it knows
        return "it is not what torch.save writes"
    if isinstance(error, zipfile.BadZipFile | EOFError):
        return "it is cut off, or damaged"
    text = text.rpartition("WeightsUnpickler error: ")[2]
    lines = [line for line in text.splitlines() if line.strip()]
    text = " ".join((lines or [""])[0].split())
    if text.startswith(("Weights only load failed", "Unsupported operand", "Invalid magic number")):
        return "it is not what torch.save writes"
    return (text or type(error).__name__)[:200]


_MAX_DEPTH = 20  # of nested containers; a checkpoint has four
# In all containers together: lists that hold one another several times have exponentially many.
_MAX_ENTRIES = 1_000_000


class _LazyTensors:
    """Replaces every torch tensor in nested containers by a `Tensor`.

    Args:
        torch: the module.
        mapped: whether the tensors' memory is mapped from the file.
        skipped: ids of containers that become `Skipped`.

    Raises (when called):
        ValueError: a tensor is not dense, or the containers are too deep or too many.
    """

    def __init__(self, torch: Any, mapped: bool, skipped: Collection[int] = ()):
        self.torch, self.mapped, self.skipped, self.entries = torch, mapped, skipped, 0

    def __call__(self, value: Any, name: str = "", depth: int = 0) -> Any:
        self.entries += 1
        if depth > _MAX_DEPTH or self.entries > _MAX_ENTRIES:
            raise ValueError("containers within containers without end")
        if id(value) in self.skipped:
            return Skipped()
        if isinstance(value, self.torch.Tensor):
            return _tensor(self.torch, value, self.mapped, name)
        if isinstance(value, Mapping):
            return {k: self(v, str(k), depth + 1) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self(v, f"{name}[{i}]", depth + 1) for i, v in enumerate(value)]
        return value


def _tensor(torch: Any, tensor: Any, mapped: bool, name: str) -> Tensor:
    """A torch tensor as a `Tensor`. Raises ValueError if it is not a plain dense one."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise ValueError(f'tensor "{name}" is not a plain dense one')
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        # Strides of 0 let a few bytes claim any amount of memory.
        raise ValueError(f'tensor "{name}" has more numbers than are stored')
    tensor = tensor.detach()
    # Only the pages of a contiguous tensor can be dropped after use.
    contiguous = tensor.is_contiguous()
    place = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.stride())

    def read() -> np.ndarray:
        whole = tensor.contiguous()
        if whole.dtype == torch.bfloat16:
            return whole.view(torch.int16).numpy().view("bfloat16")
        return whole.numpy()

    dtype = str(tensor.dtype).removeprefix("torch.")
    return Tensor(name, tuple(tensor.shape), dtype, place, read, mapped and contiguous)


def write_torch(path: Path, content: Any) -> None:
    """Writes nested dicts and lists of numpy arrays as torch.save does.

    Arrays that are one object share their storage. The file appears complete or not at all.

    Args:
        path: of the file.
        content: to write.

    Raises:
        UserError: torch is missing, or the file cannot be written.
    """
    torch = import_torch(f"writing {path}")
    tensors: dict[int, Any] = {}

    def with_tensors(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            if id(value) not in tensors:
                tensors[id(value)] = _as_torch(torch, value)
            return tensors[id(value)]
        if isinstance(value, dict):
            return {key: with_tensors(v) for key, v in value.items()}
        return [with_tensors(v) for v in value] if isinstance(value, list) else value

    replace_file(path, lambda tmp: torch.save(with_tensors(content), tmp))


def _as_torch(torch: Any, array: np.ndarray) -> Any:
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
