"""What frozen networks give for fixed views of the training images, kept on disk.

A view is a file per array of equal rows, one an image, in the images' order. Rows are read at
random, each once an epoch, and hardly compress: in a plain file under a memory map a row is one
read of its own bytes, where a chunk of zarr holds several rows, and a record of array_record is
parsed and copied. The operating system keeps in memory what fits there.

Beside each array lie the checksums of its rows, which are compared whenever a row is read: a system
restores a changed byte without a word.

A view that is being written lies under another name, with the number of its rows that are safe on
disk; it gets its own name at the end.

Axes: N images, B images of a batch.
"""

from __future__ import annotations

import json
import os
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from m2mkd_jax.errors import UserError
from m2mkd_jax.files.paths import naming, remove_tree, write_bytes

# Seconds between two points from which an interrupted view is gone on with.
_SAFE_SECONDS = 10.0
_SUM = np.dtype("uint32")  # of a row's checksum


@dataclass(frozen=True)
class Row:
    """What an array holds for one image.

    Attributes:
        shape: of the row.
        dtype: name of its type, such as bfloat16.
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def type(self) -> np.dtype:
        """The numpy type."""
        return np.dtype(getattr(ml_dtypes, self.dtype, self.dtype))

    @property
    def bytes(self) -> int:
        """Bytes of a row."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.type.itemsize


@dataclass(frozen=True)
class KeptViews:
    """The views of one job. Picklable: it is sent to Grain's workers.

    Attributes:
        directory: where they lie.
        images: N.
        arrays: by name.
    """

    directory: Path
    images: int
    arrays: Mapping[str, Row]

    @property
    def bytes(self) -> int:
        """Bytes of a view."""
        return self.images * sum(row.bytes + _SUM.itemsize for row in self.arrays.values())

    def begin(self, inputs: Mapping[str, Any]) -> bool:
        """Drops views that came from other inputs.

        Args:
            inputs: what the views depend on, as JSON gives it back.

        Returns:
            Whether there were such views.
        """
        path = self.directory / "inputs.json"
        wanted = {**inputs, "arrays": {n: [*row.shape, row.dtype] for n, row in self._sorted()}}
        try:
            if json.loads(path.read_text()) == wanted:
                return False
        except (OSError, ValueError):  # none, or cut off
            pass
        self.directory.mkdir(parents=True, exist_ok=True)
        old = sorted(self.directory.iterdir())  # the directory may be a link to another disk
        for entry in old:
            remove_tree(entry)
        write_bytes(path, json.dumps(wanted).encode())
        return bool(old)

    def is_whole(self, view: int) -> bool:
        """Whether a view is on disk with every row of every array."""
        directory = self.directory / str(view)
        return directory.is_dir() and all(
            file.is_file() and file.stat().st_size == self.images * size
            for file, size in ((directory / name, size) for name, size in self._sizes().items())
        )

    def safe_rows(self, view: int) -> int:
        """How many rows of an interrupted view are safe on disk."""
        directory = self._unfinished(view)
        try:
            said = int((directory / "rows").read_text())
            have = [(directory / name).stat().st_size // n for name, n in self._sizes().items()]
        except (OSError, ValueError):
            return 0
        return max(min(said, *have), 0)

    def rows(self, view: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of some images, {name: (B, ...)}, for `indices` (B,).

        Raises:
            UserError: one of them is not what was written.
        """
        found = {}
        for name, row in self.arrays.items():
            path = self.directory / str(view) / name
            try:
                found[name], sums = (
                    np.array(np.memmap(file, type, "r", shape=(self.images, *shape))[indices])
                    for file, type, shape in ((path, row.type, row.shape), (_sums(path), _SUM, ()))
                )
            except (OSError, ValueError) as error:  # ValueError: the file is shorter
                raise self._damaged(path, str(error)) from None
            changed = indices[self.sums(view, indices, found[name]) != sums]
            if len(changed):
                raise self._damaged(path, f"what it holds of image {changed[0]} was changed")
        return found

    def sums(self, view: int, indices: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Checksums of rows (B, ...), which also tell of what view and image (B,) they are."""
        first = view * self.images  # of the numbers of this view's images
        flat = np.ascontiguousarray(rows).reshape(len(rows), -1).view(np.uint8)
        numbers = (first + int(i) & 0xFFFFFFFF for i in indices)
        return np.array([zlib.crc32(r.data, n) for r, n in zip(flat, numbers, strict=True)], _SUM)

    def _damaged(self, path: Path, why: str) -> UserError:
        return UserError(
            f"{path} is damaged: {why}; delete {self.directory} and run the same command again: "
            "what is kept there is computed again"
        )

    def _sizes(self) -> dict[str, int]:
        """Bytes that a view's files have for an image, by the files' names."""
        sizes = {name: row.bytes for name, row in self.arrays.items()}
        return sizes | {_sums(Path(name)).name: _SUM.itemsize for name in sizes}

    def _sorted(self) -> list[tuple[str, Row]]:
        return sorted(self.arrays.items())

    def _unfinished(self, view: int) -> Path:
        return self.directory / f"{view}.unfinished"


def _sums(path: Path) -> Path:
    """The file of the checksums of an array's rows."""
    return path.with_name(f"{path.name}.crc32")


class ViewWriter:
    """Writes the rows of a view in their order.

    Args:
        kept: the views of a job.
        view: its number.
        start: rows that are on disk already; later ones are written again.
    """

    def __init__(self, kept: KeptViews, view: int, start: int):
        self._kept, self._view, self._done = kept, view, start
        self._directory = kept._unfinished(view)
        self._directory.mkdir(parents=True, exist_ok=True)
        remove_tree(kept.directory / str(view))  # not whole
        self._files = {}
        for name, size in kept._sizes().items():
            file = (self._directory / name).open("ab")
            file.truncate(start * size)
            self._files[name] = file
        self._safe = time.monotonic()

    def append(self, rows: Mapping[str, np.ndarray]) -> None:
        """Writes the next rows, {name: (B, ...)}; those past the last image are left out."""
        count = min(len(next(iter(rows.values()))), self._kept.images - self._done)
        indices = np.arange(self._done, self._done + count)
        for name, row in self._kept.arrays.items():
            array = np.ascontiguousarray(rows[name][:count])
            assert array.shape[1:] == row.shape and array.dtype == row.type
            sums = self._kept.sums(self._view, indices, array)
            with naming(self._directory / name):
                self._files[name].write(array.reshape(-1).view(np.uint8).data)
                self._files[_sums(Path(name)).name].write(sums.data)
        self._done += count
        if time.monotonic() - self._safe > _SAFE_SECONDS:
            self._sync()

    def finish(self) -> None:
        """Gives the view its own name, once every row is on disk."""
        assert self._done == self._kept.images
        self._sync()
        self.close()
        (self._directory / "rows").unlink()
        os.replace(self._directory, self._kept.directory / str(self._view))

    def close(self) -> None:
        """Closes the files; what is safe on disk stays."""
        for name, file in self._files.items():
            with naming(self._directory / name):
                file.close()

    def _sync(self) -> None:
        for name, file in self._files.items():
            with naming(self._directory / name):
                file.flush()
                os.fsync(file.fileno())
        write_bytes(self._directory / "rows", str(self._done).encode())
        self._safe = time.monotonic()


@dataclass(frozen=True)
class KeptBatches:
    """Batches of what is kept for several jobs.

    Attributes:
        jobs: the views of each job, by name.
    """

    jobs: Mapping[str, KeptViews]

    def rows(self, view: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        """ "image" and "label" once, and NAME/JOB for all others, (B, ...) for `indices` (B,)."""
        batch = {}
        for job, kept in self.jobs.items():
            for name, rows in kept.rows(view, indices).items():
                batch[name if name in ("image", "label") else f"{name}/{job}"] = rows
        return batch
