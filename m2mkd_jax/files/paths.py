"""Paths of runs: directories of a file system, and prefixes of objects in a bucket (gs://).

A local path is a `pathlib.Path`, one in a bucket an `etils.epath.Path`, which reads and writes
through gcsfs (the extra `buckets`). What both can do is done through the path itself. The functions
here do what differs: an object appears whole or not at all, but there are no directories, so that
nothing can be renamed at once, and nothing appended.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from m2mkd_jax.arguments import at_home
from m2mkd_jax.errors import UserError

SCHEME = "gs://"
EXTRA = "pip install 'm2mkd_jax[buckets]'"
# Objects as the JSON interface has them: no gRPC connections, no TensorFlow.
_ENVIRONMENT = {"GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false", "EPATH_USE_TF": "false"}
_CLIENTS = ("gcsfs", "aiohttp", "google", "requests")  # whose errors are of a storage service


def in_bucket(path: str | os.PathLike) -> bool:
    """Whether a path lies in a bucket."""
    return os.fspath(path).startswith(SCHEME)


def as_path(given: str | os.PathLike) -> Path:
    """A path of either kind; ~ is the home directory.

    Raises:
        UserError: another scheme than gs://, no bucket, or the packages for buckets are missing.
    """
    text = os.fspath(given)
    if "://" not in text:
        return at_home(text)
    scheme, _, rest = text.partition("://")
    if f"{scheme}://" != SCHEME:
        raise UserError(
            f"{text}: {scheme}:// cannot hold a run or its data (Orbax writes to gs:// and to "
            "directories); mount it, and give the directory"
        )
    if not rest.partition("/")[0]:
        raise UserError(f"{text} names no bucket; give gs://BUCKET/DIRECTORY")
    prepare()
    epath: Any = importlib.import_module("etils.epath")
    return cast(Path, epath.Path(text))


def absolute(path: str | os.PathLike) -> Path:
    """A local path from the root on; one in a bucket as it is."""
    found = as_path(path)
    return found if in_bucket(found) else found.absolute()


@functools.cache
def prepare() -> None:
    """Sets the clients of buckets up. Raises UserError where gcsfs is not installed."""
    if importlib.util.find_spec("gcsfs") is None:
        raise UserError(f"{SCHEME} needs the package gcsfs: {EXTRA}")
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    config: Any = importlib.import_module("fsspec.config")
    # Another process may have changed what was listed a moment ago.
    config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    fsspec: Any = importlib.import_module("fsspec")
    core: Any = importlib.import_module("gcsfs.core")
    for name in ("gcs", "gs"):  # whatever class was chosen where gcsfs had been imported before
        fsspec.register_implementation(name, core.GCSFileSystem, clobber=True)
    for name in ("gcsfs", "google.auth"):  # they log stacks of what they raise
        logging.getLogger(name).setLevel(logging.CRITICAL)


def file_system(path: str | os.PathLike) -> Any:
    """The fsspec file system of a path in a bucket, which is the path's own too."""
    assert in_bucket(path)
    prepare()
    fsspec: Any = importlib.import_module("fsspec")
    return fsspec.filesystem("gcs", finalize_on_close=True)


def check_bucket(path: Path) -> None:
    """Asks for the bucket of a path, before work, by both clients; nothing for a local path.

    Raises:
        UserError: it does not exist, refuses, or does not answer.
    """
    if in_bucket(path):
        _check_bucket(os.fspath(path).removeprefix(SCHEME).partition("/")[0])


@functools.cache
def _check_bucket(bucket: str) -> None:
    """Does what `check_bucket` does, once for a bucket that answers."""
    path = SCHEME + bucket
    try:
        file_system(path).info(bucket)
        tensorstore: Any = importlib.import_module("tensorstore")  # which Orbax writes by
        store = tensorstore.KvStore.open({"driver": "gcs", "bucket": bucket}).result()
        store.read("m2mkd_jax").result()
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such bucket; make it first") from None
    except Exception as error:
        reason = storage_failure(error) or " ".join(str(error).split())[:300]
        raise UserError(
            f"{path}: the bucket cannot be used ({reason}); see docs/buckets.md for credentials"
        ) from None


def storage_failure(error: BaseException | None) -> str:
    """What a bucket answered, in one line, where an error or what caused it came from there."""
    while error is not None:
        text = " ".join(str(error).split())[:300] or type(error).__name__
        tensorstore = isinstance(error, ValueError) and "/storage/v1/" in text
        answer = isinstance(error, OSError) and error.errno is None
        refused = answer and text.startswith(("Forbidden", "b/", "http"))
        if type(error).__module__.partition(".")[0] in _CLIENTS or tensorstore or refused:
            return text
        error = error.__cause__ or error.__context__
    return ""


def make_directory(path: Path) -> None:
    """Makes a directory and its parents; in a bucket there are none to make."""
    if not in_bucket(path):
        path.mkdir(parents=True, exist_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file or an object; a reader sees the old one or the new one, never a part.

    Args:
        path: of the file; missing parent directories are made.
        content: of the file.

    Raises:
        OSError: the file system refuses.
    """
    if in_bucket(path):
        file_system(path).pipe_file(os.fspath(path), content)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # The process id keeps apart two processes that write the same file at once.
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with naming(path), open(tmp, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # or a power cut may keep the rename and lose the bytes
        os.replace(tmp, path)
    finally:
        tmp.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
    """An error of the system in a file that is open names no file: it then names this one."""
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            error.filename = error.filename or os.fspath(path)
        raise


def read_text(path: Path) -> str:
    """The text of a file, with marks in place of bytes that are not UTF-8."""
    return path.read_bytes().decode(errors="replace")


def read_part(path: str | os.PathLike, start: int, size: int) -> bytes:
    """Some bytes of a file; in a bucket one request."""
    if in_bucket(path):
        name = os.fspath(path)
        return file_system(name).cat_file(name, start=int(start), end=int(start + size))
    # Opened on each read: a thousand open files would exceed the limit.
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(size)


def file_names(directory: Path) -> list[str]:
    """The files below a directory, by their relative paths, sorted."""
    if not in_bucket(directory):
        return sorted(
            path.relative_to(directory).as_posix()
            for path in directory.rglob("*")
            if path.is_file()
        )
    prefix = os.fspath(directory).removeprefix(SCHEME).rstrip("/") + "/"
    return sorted(
        name.removeprefix(prefix)
        for name in file_system(directory).find(prefix)
        if name.startswith(prefix) and name != prefix
    )


def remove_tree(directory: Path, if_possible: bool = False) -> None:
    """Deletes a directory with all that lies below it, if it is there; of a link the link alone.

    Args:
        directory: or a file, or a prefix in a bucket.
        if_possible: leave what the file system does not let go.

    Raises:
        OSError: the file system refuses; names what is left.
    """
    if not in_bucket(directory):
        with contextlib.suppress(OSError if if_possible else FileNotFoundError):
            if directory.is_symlink() or directory.is_file():
                directory.unlink()
                return
            shutil.rmtree(directory, ignore_errors=True)  # goes on after what it cannot delete
            if directory.is_dir():
                shutil.rmtree(directory)  # says what that was
        return
    with contextlib.suppress(FileNotFoundError):
        file_system(directory).rm(os.fspath(directory), recursive=True)


def move_tree(directory: Path, target: Path) -> None:
    """Gives a directory another name; in a bucket object by object, not at once."""
    if not in_bucket(directory):
        directory.rename(target)
        return
    files = file_system(directory)
    for name in file_names(directory):
        files.cp_file(os.fspath(directory / name), os.fspath(target / name))
    remove_tree(directory)


def upload_tree(local: Path, target: Path) -> None:
    """Copies the files below a local directory to a bucket, in place of those of equal names."""
    for name in file_names(local):
        write_bytes(target / name, (local / name).read_bytes())


def local_directory(directory: Path) -> Path:
    """A directory itself, or for one in a bucket the one on this machine that stands for it.

    It holds what cannot lie in a bucket: memory maps, and event files under way. It is
    $M2MKD_SCRATCH/BUCKET/..., by default below ~/.cache/m2mkd_jax/scratch.
    """
    if not in_bucket(directory):
        return directory
    root = at_home(os.environ.get("M2MKD_SCRATCH") or "~/.cache/m2mkd_jax/scratch")
    return root / os.fspath(directory).removeprefix(SCHEME)
