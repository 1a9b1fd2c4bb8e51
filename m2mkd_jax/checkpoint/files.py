"""Small JSON files (description.json, done.json, summary.json), written atomically."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.errors import UserError


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes indented JSON; a reader sees the old file or the new one, never a part.

    Args:
        path: of the file; missing parent directories are made.
        obj: to write. numpy and jax scalars become numbers, arrays lists, and paths strings.

    Raises:
        TypeError: JSON cannot hold `obj`.
        OSError: the file system refuses.
    """
    path = Path(path)
    text = json.dumps(obj, indent=2, default=_plain) + "\n"  # before any file is touched
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps apart two processes that write the same file at once.
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(tmp, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may keep the rename and lose the bytes
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


def read_json(path: str | os.PathLike) -> Any:
    """Reads what `write_json` wrote.

    Raises:
        UserError: the file is missing, unreadable, or not JSON (empty, cut off).
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    # JSONDecodeError and UnicodeDecodeError; lists nested too deeply.
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, not JSON ({error}); delete it or restore it") from None


def _plain(value: Any) -> Any:
    """A value that JSON cannot hold as one that it can."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic) or hasattr(value, "__array__"):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Writes a file completely or not at all.

    Args:
        path: of the file; missing parent directories are made.
        write: writes the content to the path that it is given.

    Raises:
        UserError: the file system refuses.
    """
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
