"""What frozen networks give for fixed views of the training images, kept on disk.

A view is a file per array of equal rows, one an image, in the images' order. Rows are read at
random, each once an epoch, and hardly compress: in a plain file under a memory map a row is one
read of its own bytes, where a chunk of zarr holds several rows, and a record of array_record is
parsed and copied. The operating system keeps in memory what fits there.

A view that is being written lies under another name, with the number of its rows that are safe on
disk; it gets its own name at the end.

Axes: N images, B images of a batch.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

# Seconds between two points from which an interrupted view is gone on with.
_SAFE_SECONDS = 10.0


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
        return self.images * sum(row.bytes for row in self.arrays.values())

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
        dropped = self.directory.is_dir() and any(self.directory.iterdir())
        shutil.rmtree(self.directory, ignore_errors=True)
        self.directory.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(wanted))
        return dropped

    def is_whole(self, view: int) -> bool:
        """Whether a view is on disk with every row of every array."""
        directory = self.directory / str(view)
        return directory.is_dir() and all(
            file.is_file() and file.stat().st_size == self.images * row.bytes
            for file, row in ((directory / name, row) for name, row in self.arrays.items())
        )

    def safe_rows(self, view: int) -> int:
        """How many rows of an interrupted view are safe on disk."""
        try:
            return int((self._unfinished(view) / "rows").read_text())
        except (OSError, ValueError):
            return 0

    def rows(self, view: int, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows of some images, {name: (B, ...)}, for `indices` (B,)."""
        found = {}
        for name, row in self.arrays.items():
            shape = (self.images, *row.shape)
            path = self.directory / str(view) / name
            found[name] = np.array(np.memmap(path, row.type, "r", shape=shape)[indices])
        return found

    def _sorted(self) -> list[tuple[str, Row]]:
        return sorted(self.arrays.items())

    def _unfinished(self, view: int) -> Path:
        return self.directory / f"{view}.unfinished"


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
        shutil.rmtree(kept.directory / str(view), ignore_errors=True)  # not whole
        self._files = {}
        for name, row in kept.arrays.items():
            file = (self._directory / name).open("ab")
            file.truncate(start * row.bytes)
            self._files[name] = file
        self._safe = time.monotonic()

    def append(self, rows: Mapping[str, np.ndarray]) -> None:
        """Writes the next rows, {name: (B, ...)}; those past the last image are left out."""
        count = min(len(next(iter(rows.values()))), self._kept.images - self._done)
        for name, file in self._files.items():
            row = self._kept.arrays[name]
            array = np.ascontiguousarray(rows[name][:count])
            assert array.shape[1:] == row.shape and array.dtype == row.type
            file.write(array.reshape(-1).view(np.uint8).data)
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
        for file in self._files.values():
            file.close()

    def _sync(self) -> None:
        for file in self._files.values():
            file.flush()
            os.fsync(file.fileno())
        path = self._directory / "rows"
        path.with_suffix(".new").write_text(str(self._done))
        os.replace(path.with_suffix(".new"), path)
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
