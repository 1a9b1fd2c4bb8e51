"""Text files that grow by lines, such as metrics.jsonl.

An object cannot be appended to: in a bucket the lines are held in memory and the object is written
anew when `upload` is called, or after a while. Who saves a state calls `upload` first, so that the
lines before the state are never lost; those after it are repeated when the run goes on from there.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import IO

from m2mkd_jax.files.paths import in_bucket, naming, write_bytes

UPLOAD_SECONDS = 30.0  # between two uploads, at least, but for those that are asked for


class Lines:
    """A text file, begun with some lines.

    Args:
        path: of the file; what it held before is replaced.
        text: of its first lines.
    """

    def __init__(self, path: Path, text: str = ""):
        self._path = path
        self._file: IO[str] | None = None
        self._held = [text]
        self._uploaded = time.monotonic()
        write_bytes(path, text.encode())  # a full disk leaves what was there
        if not in_bucket(path):
            self._file = path.open("a", buffering=1)

    def add(self, line: str) -> None:
        """Adds a line, given without its end."""
        if self._file is not None:
            with naming(self._path):
                self._file.write(line + "\n")
            return
        self._held.append(line + "\n")
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self.upload()

    def upload(self) -> None:
        """Writes the object, where the file is one and has grown."""
        if self._file is not None or len(self._held) < 2:
            return
        self._held = ["".join(self._held)]
        write_bytes(self._path, self._held[0].encode())
        self._uploaded = time.monotonic()

    def close(self) -> None:
        """Ends the file; nothing may be added after it."""
        if self._file is not None:
            with naming(self._path):
                self._file.close()
        else:
            self.upload()
