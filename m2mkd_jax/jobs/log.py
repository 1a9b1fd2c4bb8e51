"""A job's log: metrics.jsonl, and lines on the screen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from m2mkd_jax.checkpoint.files import plain
from m2mkd_jax.parallel.process import is_main


class Log:
    """metrics.jsonl of one job, and a line on the screen per entry."""

    def __init__(self, path: Path, job: str, total: int, start: int):
        self.job, self.total = job, total
        self.evaluated = 0  # steps before the last evaluation in the file
        self.file = None
        if not is_main():
            return
        kept = []
        if start and path.is_file():
            # A restart repeats the steps after its checkpoint: drop their log lines.
            for line in path.read_text(errors="replace").splitlines():
                try:
                    entry = json.loads(line)
                    step = entry["step"]
                except (ValueError, TypeError, KeyError):  # the line that a kill cut off
                    continue
                if step <= start:
                    kept.append(line + "\n")
                    self.evaluated = step if "eval_loss" in entry else self.evaluated
        path.write_text("".join(kept))
        self.file = path.open("a", buffering=1)

    def __call__(self, entry: dict[str, Any]) -> None:
        """Adds one entry, with plain numbers; the step's number is `step`."""
        if self.file is None:
            return
        self.file.write(json.dumps(plain(entry), allow_nan=False) + "\n")
        shown = ("loss", "accuracy", "teacher_agreement", "eval_accuracy", "eval_loss")
        numbers = "  ".join(f"{k} {entry[k]:.4f}" for k in shown if k in entry)
        print(f"[{self.job}] {entry['step']}/{self.total}  {numbers}", flush=True)

    def close(self) -> None:
        """Closes the file."""
        if self.file is not None:
            self.file.close()
