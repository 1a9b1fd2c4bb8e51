"""A job's log: metrics.jsonl, trackers, and a line on the screen."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from m2mkd_jax.checkpoint.files import plain
from m2mkd_jax.files.lines import Lines
from m2mkd_jax.files.paths import read_text
from m2mkd_jax.jobs.trackers import Tracker
from m2mkd_jax.parallel.process import is_main

BAR = "{desc} |{bar:10}| {n_fmt}/{total_fmt}{postfix}"
SHOWN = (
    *("loss", "accuracy", "teacher_agreement", "eval_accuracy", "eval_loss"),
    *("eval_box_AP", "eval_box_AP50", "eval_mask_AP", "eval_mask_AP50"),
)


class Log:
    """metrics.jsonl of one job; on a terminal a live line, elsewhere a line now and then.

    Args:
        path: of metrics.jsonl.
        job: its name.
        total: steps of the job.
        start: steps before the first one; what the file has of later ones is dropped.
        place: which of how many jobs it is, for people; "": not said.
        every: seconds between two lines where there is no terminal; evaluations always have one.
        trackers: that get every entry.
    """

    def __init__(
        self,
        path: Path,
        job: str,
        total: int,
        start: int,
        *,
        place: str = "",
        every: float = 0.0,
        trackers: Sequence[Tracker] = (),
    ):
        self.job, self.total, self.place, self.every = job, total, place, every
        self.evaluated = 0  # steps before the last evaluation in the file
        self.file: Lines | None = None
        self.bar, self.trackers = None, trackers
        self._said = -every
        if not is_main():
            return
        kept = _entries_until(path, start) if start else []
        for entry in kept:
            self.evaluated = entry["step"] if is_evaluation(entry) else self.evaluated
        self.file = Lines(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        for tracker in trackers:
            tracker.begin(kept)
        if sys.stdout.isatty():
            title = f"{place}, {job}" if place else job
            self.bar = tqdm(
                total=total,
                initial=start,
                desc=title,
                file=sys.stdout,
                dynamic_ncols=True,
                leave=False,  # a line says that the job is done
                bar_format=BAR,
            )

    def __call__(self, entry: dict[str, Any]) -> None:
        """Adds one entry, with plain numbers; the step's number is `step`."""
        if self.file is None:
            return
        entry = plain(entry)
        self.file.add(json.dumps(entry, allow_nan=False))
        for tracker in self.trackers:
            tracker.log(entry)
        if self.bar is not None:
            self.bar.n = entry["step"]
            self.bar.set_postfix_str(shown(entry))
            return
        now = time.monotonic()
        last = entry["step"] >= self.total or is_evaluation(entry)
        if last or now - self._said >= self.every:
            self._said = now
            where = f"  ({self.place})" if self.place else ""
            print(f"[{self.job}] {entry['step']}/{self.total}  {shown(entry)}{where}", flush=True)

    def upload(self) -> None:
        """Brings what is in a bucket up to date, before a state is saved there."""
        if self.file is not None:
            self.file.upload()
            for tracker in self.trackers:
                tracker.upload()

    def close(self) -> None:
        """Closes file, line and trackers."""
        if self.file is not None:
            self.file.close()
            self.file = None
            for tracker in self.trackers:
                tracker.close()
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def _entries_until(path: Path, start: int) -> list[dict[str, Any]]:
    """What a file has of the first steps: a restart repeats those after its checkpoint."""
    return [entry for entry in read_entries(path) if entry["step"] <= start]


def read_entries(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a log, without a line that a kill cut off, and others that are none."""
    text = read_text(path) if path.is_file() else ""
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and type(entry.get("step")) is int:
            yield entry


def is_evaluation(entry: dict[str, Any]) -> bool:
    """Whether an entry is of an evaluation, not of training steps."""
    return any(name.startswith("eval_") for name in entry)


def shown(entry: dict[str, Any]) -> str:
    """An entry as people read it."""
    parts = [f"{name} {entry[name]:.4f}" for name in SHOWN if entry.get(name) is not None]
    if "seconds_left" in entry:
        whole = entry.get("run_seconds_left")
        run = "" if whole is None else f", run {clock(whole)}"
        parts.append(f"left {clock(entry['seconds_left'])}{run}")
    if "images_per_second" in entry:
        parts.append(f"{entry['images_per_second']:.0f} images/s")
    if "matrix_share" in entry:
        parts.append(f"{100 * entry['matrix_share']:.0f}% of the matrix rate")
    if "memory" in entry:
        parts.append(f"{entry['memory'] / 2**30:.2f} GiB")
    if entry.get("data_wait", 0.0) >= 0.01:
        parts.append(f"{100 * entry['data_wait']:.0f}% waiting for data")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    whole = round(seconds)
    hours, rest = divmod(whole, 3600)
    text = f"{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
    return f"{hours}:{text}" if hours else text
