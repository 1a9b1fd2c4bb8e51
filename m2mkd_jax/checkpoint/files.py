"""Small JSON files (description.json, done.json, summary.json), written atomically.

They are strict JSON: a number that is not finite is written as null. Files that a run reads back
are records (`write_record`, `read_record`), which carry a checksum of their content.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.errors import UserError
from m2mkd_jax.files import strict_json
from m2mkd_jax.files.paths import as_path, in_bucket, write_bytes

CHECKSUM = "sha256"  # the key of a record's checksum


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes indented JSON; a reader sees the old file or the new one, never a part.

    Args:
        path: of the file; missing parent directories are made.
        obj: to write. numpy and jax scalars become numbers, arrays lists, paths strings, and
            numbers that are not finite null.

    Raises:
        TypeError: JSON cannot hold `obj`.
        OSError: the file system refuses.
    """
    # Before any file is touched.
    text = json.dumps(plain(obj), indent=2, allow_nan=False) + "\n"
    write_bytes(as_path(path), text.encode())


def read_json(path: str | os.PathLike) -> Any:
    """Reads what `write_json` wrote.

    Raises:
        UserError: the file is missing, unreadable, or not strict JSON (empty, cut off).
    """
    path = as_path(path)
    try:
        return strict_json.parse(path.read_bytes().decode())
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None
    # JSONDecodeError and UnicodeDecodeError; lists nested too deeply.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, not JSON ({error}); delete it or restore it") from None


def write_record(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Writes a JSON object with a checksum of its content; errors as of `write_json`."""
    write_json(path, sealed(record))


def read_record(path: str | os.PathLike) -> dict[str, Any]:
    """Reads what `write_record` wrote, without the checksum.

    A record without one is taken as it is: no single damage removes it and leaves JSON with other
    content.

    Raises:
        UserError: as of `read_json`; it is no JSON object, or its content was changed.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it is not a JSON object; delete it or restore it")
    if not unseal(content):
        raise UserError(
            f"{path} is damaged or was edited: its checksum is another; restore it, or remove the "
            f'entry "{CHECKSUM}" if the edit is meant'
        )
    return content


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object as strict JSON gives it back, with a checksum. Raises TypeError as `plain`."""
    content = plain(record)
    return content | {CHECKSUM: _digest(content)}


def unseal(content: dict[str, Any]) -> bool:
    """Takes the checksum off; whether it was right, or there was none."""
    return CHECKSUM not in content or content.pop(CHECKSUM) == _digest(content)


def _digest(content: Any) -> str:
    text = json.dumps(content, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def plain(value: Any) -> Any:
    """A value as strict JSON gives it back. Raises TypeError where JSON cannot hold it."""
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic) or hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist())
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file completely or not at all.

    Args:
        path: of the file; missing parent directories are made.
        write: writes the content to the path that it is given.

    Raises:
        UserError: the file system refuses.
    """
    if in_bucket(path):
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder) / path.name)
            write_bytes(path, (Path(folder) / path.name).read_bytes())
        return
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(tmp)
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        reason = str(error).splitlines()[0]
        if "enforce fail" in reason:
            reason = "it could not be written completely; is the disk full?"
        reason = getattr(error, "strerror", None) or reason
        raise UserError(f"{path} cannot be written: {reason}") from None
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
