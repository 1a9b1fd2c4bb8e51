"""Trackers: programs that show the numbers of a run, behind one interface.

A run that was stopped repeats the steps after its newest checkpoint. A tracker is given what
metrics.jsonl keeps of the steps before, so that its curves go on without doubled points: one that
can forget starts from that, one that cannot (wandb, trackio) leaves out the entries that it has.
"""

from __future__ import annotations

import contextvars
import importlib
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from m2mkd_jax.checkpoint.files import read_json, write_json
from m2mkd_jax.config.family_sections import import_class
from m2mkd_jax.errors import UserError, did_you_mean, require
from m2mkd_jax.files.paths import in_bucket, local_directory, remove_tree, upload_tree

Entry = Mapping[str, Any]


class Tracker(Protocol):
    """Takes the log entries of one job.

    Args:
        directory: of the job.
        job: its name.
        config: of the run.
    """

    def __init__(self, directory: Path, job: str, config: ConfigDict): ...

    def begin(self, entries: Sequence[Entry]) -> None:
        """Begins, or goes on after what metrics.jsonl keeps: `entries`."""

    def log(self, entry: Entry) -> None:
        """Takes an entry: numbers and lists of numbers by name, and `step`."""

    def upload(self) -> None:
        """Brings files that belong into a bucket there; called before a state is saved."""
        return

    def close(self) -> None:
        """Writes what waits, and ends."""


class TensorBoard(Tracker):
    """Event files in DIR/jobs/JOB/tensorboard, by tensorboardX, which needs no TensorFlow."""

    def __init__(self, directory: Path, job: str, config: ConfigDict):
        self._directory, self._config, self._job = directory, config, job
        self._writer: Any = None

    def begin(self, entries: Sequence[Entry]) -> None:
        """Starts a new event file with the kept entries in place of the old ones."""
        folder = local_directory(self._directory / "tensorboard")
        remove_tree(folder)
        remove_tree(self._directory / "tensorboard")
        self._writer = _imported("tensorboardX", "tensorboard").SummaryWriter(str(folder))
        text = "\n".join(f"    {line}" for line in self._config.to_json(indent=1).splitlines())
        self._writer.add_text("config", text, 0)
        picture = self._directory / "images.png"
        if picture.is_file():
            with picture.open("rb") as file:
                pixels = np.asarray(Image.open(file).convert("RGB"))
            self._writer.add_image("first images", pixels, 0, dataformats="HWC")
        for entry in entries:
            self.log(entry)

    def log(self, entry: Entry) -> None:
        """Numbers as scalars; lists (of routers, by layer) as histograms and scalars by layer."""
        step = entry["step"]
        for name, value in scalars(entry).items():
            self._writer.add_scalar(name, value, step)
        for name, value in entry.items():
            if isinstance(value, list) and value and isinstance(value[0], list):
                for layer, own in enumerate(value):
                    self._writer.add_histogram(f"{name}/{layer}", np.asarray(own), step)

    def upload(self) -> None:
        """Copies the event file of a run in a bucket there."""
        if self._writer is not None and in_bucket(self._directory):
            self._writer.flush()
            folder = self._directory / "tensorboard"
            upload_tree(local_directory(folder), folder)

    def close(self) -> None:
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()
            self.upload()


class _Appending(Tracker):
    """A tracker that cannot forget: it leaves out the entries that it has been given before.

    A file beside it says which: all before a step, and at that step those of some names.
    """

    module = ""

    def __init__(self, directory: Path, job: str, config: ConfigDict):
        self._directory, self._job, self._config = directory, job, config
        self._path = directory / f"{self.module}.json"
        self._sent, self._sent_names = -1, frozenset[str]()
        self._run: Any = None

    def begin(self, entries: Sequence[Entry]) -> None:
        """Opens the run, and sends what it has not."""
        kept: dict[str, Any] = read_json(self._path) if self._path.is_file() else {}
        self._sent, self._sent_names = kept.get("step", -1), frozenset(kept.get("names", ()))
        self._run = self._open(str(kept.get("id", "")))
        for entry in entries:
            self.log(entry)

    def log(self, entry: Entry) -> None:
        """Sends an entry, unless it was sent before."""
        step, names = entry["step"], frozenset(entry)
        if step < self._sent or (step == self._sent and names <= self._sent_names):
            return
        self._run.log(scalars(entry), step=step)
        # Training and evaluation have an entry each at the same step.
        self._sent_names = names | (self._sent_names if step == self._sent else frozenset())
        self._sent = step
        found = {"step": step, "names": sorted(self._sent_names), "id": self._known}
        write_json(self._path, found)

    def close(self) -> None:
        """Ends the run."""
        if self._run is not None:
            self._run.finish()

    def _open(self, known: str) -> Any:
        """A run, that of the id `known` where there is one."""
        raise NotImplementedError

    @property
    def _known(self) -> str:
        """The id by which a later start finds the run."""
        return str(getattr(self._run, "id", ""))

    @property
    def _names(self) -> dict[str, Any]:
        """Project, name and config, as both packages call them."""
        project = self._config.name or "m2mkd"
        return {"project": project, "name": self._job, "config": self._config.to_dict()}


class Wandb(_Appending):
    """Weights & Biases; WANDB_MODE=offline keeps everything in the job's directory."""

    module = "wandb"

    def _open(self, known: str) -> Any:
        wandb = _imported("wandb", "wandb")
        return wandb.init(
            dir=str(local_directory(self._directory)),
            id=known or None,
            resume="allow",
            reinit="create_new",
            **self._names,
        )


class Trackio(_Appending):
    """trackio, which keeps everything on this machine unless it is told otherwise.

    It knows runs by their names, and has one place for all directories: a name is the job's with an
    id behind it.
    """

    module = "trackio"

    def _open(self, known: str) -> Any:
        self._id = known or uuid.uuid4().hex[:8]
        options = {**self._names, "name": f"{self._job}-{self._id}"}
        init = _imported("trackio", "trackio").init
        # In a context of its own: init ends the run that it finds in its context, and jobs that
        # train in one program have their runs at the same time.
        return contextvars.Context().run(init, resume="allow", **options)

    @property
    def _known(self) -> str:
        return self._id


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "trackio": Trackio,
}
_NEEDS = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}


def scalars(entry: Entry) -> dict[str, float]:
    """The numbers of an entry by name; of lists one each, NAME/0, NAME/1, without the step."""
    found: dict[str, float] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, bool | int | float):
            found[name] = float(value)
        elif isinstance(value, list):
            for number, own in enumerate(value):
                add(f"{name}/{number}", own)

    for name, value in entry.items():
        if name != "step":
            add(name, value)
    return found


def _imported(module: str, extra: str) -> Any:
    """An optional package. Raises UserError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            f"config.trackers: {extra} needs the package {module}: pip install 'm2mkd_jax[{extra}]'"
        ) from None


def tracker_class(name: str) -> type[Tracker]:
    """The class that an entry of config.trackers names.

    Raises:
        UserError: there is none, it is no tracker, or its package is not installed.
    """
    if name in TRACKERS:
        _imported(_NEEDS[name], name)
        return TRACKERS[name]
    if ":" not in name:
        raise UserError(
            f'config.trackers: "{name}" is unknown; {did_you_mean(name, TRACKERS)} (one of your '
            'own is given as "package.module:Class")'
        )
    found = import_class(name, "trackers")
    require(
        isinstance(found, type) and Tracker in found.__mro__,
        f"config.trackers: {name} is not derived from m2mkd_jax.jobs.trackers.Tracker",
    )
    return found


def make_trackers(config: ConfigDict, directory: Path, job: str) -> list[Tracker]:
    """The trackers of a job. Raises UserError as `tracker_class`."""
    return [tracker_class(name)(directory, job, config) for name in config.trackers]
