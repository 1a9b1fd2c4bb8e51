"""Small JSON files (description.json, done.json, summary.json): all or nothing on disk."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.errors import UserError


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes `obj` as indented JSON; a reader sees the old file or the new one, never half.

    numpy and jax scalars become numbers, small arrays become lists, paths become strings.
    Missing parent directories are made.  Raises TypeError for anything else JSON cannot hold.
    """
    path = Path(path)
    text = json.dumps(obj, indent=2, default=_plain) + "\n"  # before any file is touched
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps two jobs that write the same file out of each other's half-written one.
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

    Raises UserError where the file is missing, unreadable, or not JSON (empty, cut off).
    """
    path = Path(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    # JSONDecodeError and UnicodeDecodeError; lists within lists without end
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged, not JSON ({error}); delete it or restore it") from None


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, np.generic) or hasattr(value, "__array__"):
        return np.asarray(value).tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def replace_file(path: Path, write: Any) -> None:
    """Calls `write(tmp)` and puts what it wrote at `path`; on any failure nothing is left.

    Raises:
        UserError: the file system refuses.
    """
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(tmp)
        os.replace(tmp, path)
    except (OSError, RuntimeError) as error:  # torch's own when the disk is full
        reason = str(error).splitlines()[0]
        if "enforce fail" in reason:
            reason = "not all of it was taken; is the disk full?"
        reason = getattr(error, "strerror", None) or reason
        raise UserError(f"{path} cannot be written: {reason}") from None
    finally:
        with contextlib.suppress(OSError):
            tmp.unlink(missing_ok=True)
