"""What a run's directory says of it, read as far as it is there.

A run may be under way, killed at any moment, or of an earlier version: what is missing or damaged
is left out, and said in `RunRecord.notes`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m2mkd_jax.checkpoint.files import read_json
from m2mkd_jax.checkpoint.steps import latest_step
from m2mkd_jax.config.defaults import PHASES, all_keys, base
from m2mkd_jax.config.keys import flatten
from m2mkd_jax.config.values import check_value, leaves
from m2mkd_jax.errors import UserError
from m2mkd_jax.files.paths import file_names
from m2mkd_jax.jobs.finished import read_result
from m2mkd_jax.jobs.locks import is_held
from m2mkd_jax.jobs.log import is_evaluation, read_entries
from m2mkd_jax.jobs.plan import Plan, read_inputs
from m2mkd_jax.phases.build import END_TO_END
from m2mkd_jax.phases.weight_digests import changed, digest
from m2mkd_jax.phases.weight_files import is_job_name

ARMS = {"e2e": "m2mKD", "e2e_scratch": "scratch", "e2e_kd": "kd", "e2e_upcycled": "upcycled"}


@dataclass(frozen=True)
class JobRecord:
    """One job of a run.

    Attributes:
        name: such as m2mkd/3.
        status: done, running, interrupted, pending, or not needed.
        result: of done.json; {} where it is not done.
        entries: of metrics.jsonl, in order.
        saved: steps before its newest checkpoint.
        needs: jobs that it stands on.
    """

    name: str
    status: str
    result: Mapping[str, Any] = field(default_factory=dict)
    entries: tuple[dict[str, Any], ...] = ()
    saved: int = 0
    needs: tuple[str, ...] = ()

    @property
    def phase(self) -> str:
        """The phase that it belongs to."""
        return self.name.partition("/")[0]

    @property
    def index(self) -> int:
        """Of its module, or of its seed."""
        return int(self.name.partition("/")[2] or 0)

    @property
    def metrics(self) -> dict[str, Any]:
        """Of the last evaluation; of a job under way what its log has."""
        if found := self.result.get("metrics"):
            return dict(found)
        evaluated = [entry for entry in self.entries if is_evaluation(entry)]
        return {k: v for k, v in evaluated[-1].items() if k != "step"} if evaluated else {}

    @property
    def accuracy(self) -> float | None:
        """On the test images, or those of data.validation; None: not measured yet."""
        return self.metrics.get("eval_accuracy")

    @property
    def reference(self) -> float | None:
        """The accuracy that it is measured by: of its teacher's hybrid or of the meta model."""
        return self.metrics.get("teacher_accuracy", self.metrics.get("meta_accuracy"))

    @property
    def steps(self) -> int:
        """Steps that are done, as far as the directory says."""
        logged = max((int(entry["step"]) for entry in self.entries), default=0)
        return int(self.result.get("steps", max(logged, self.saved)))

    @property
    def seconds(self) -> float:
        """Wall time; of a job under way the time of its logged steps."""
        if "seconds" in self.result:
            return float(self.result["seconds"])
        total, before = 0.0, 0
        for entry in self.entries:
            if "seconds_per_step" in entry:
                total += float(entry["seconds_per_step"]) * (int(entry["step"]) - before)
                before = int(entry["step"])
        return total

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of a number in the log."""
        found = [(e["step"], e[name]) for e in self.entries if isinstance(e.get(name), int | float)]
        return [step for step, _ in found], [value for _, value in found]


@dataclass(frozen=True)
class RunRecord:
    """A run's directory.

    Attributes:
        path: the directory.
        config: as config.json has it; {}: it cannot be read.
        jobs: by name, in the order in which they run.
        notes: what is missing or damaged, a sentence each.
    """

    path: Path
    config: Mapping[str, Any]
    jobs: Mapping[str, JobRecord]
    notes: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """The run's name and directory."""
        name = self.config.get("name", "")
        return f"{name} ({self.path})" if name else str(self.path)

    @property
    def unfinished(self) -> list[str]:
        """Jobs that are neither done nor unnecessary."""
        return [j.name for j in self.jobs.values() if j.status not in ("done", "not needed")]

    def of_phase(self, phase: str) -> list[JobRecord]:
        """The jobs of a phase, in order."""
        return [job for job in self.jobs.values() if job.phase == phase]

    def arms(self) -> dict[str, list[JobRecord]]:
        """The end-to-end jobs that have begun, by phase; several seeds each."""
        found = {phase: self.of_phase(phase) for phase in END_TO_END}
        return {phase: [j for j in jobs if j.status != "pending"] for phase, jobs in found.items()}

    @functools.cached_property
    def restored(self) -> ConfigDict:
        """The config as the program takes it; raises UserError where it cannot be understood."""
        return restore_config(self.config)


def restore_config(saved: Mapping[str, Any]) -> ConfigDict:
    """A config from config.json, maybe of an earlier version.

    Keys that do not exist, and values that a key does not take, are left at their defaults.

    Args:
        saved: what json.load gives.

    Raises:
        UserError: a family of one's own cannot be imported, or there is nothing to restore.
    """
    if not saved:
        raise UserError("there is no config.json to restore")
    family = str(saved.get("family", "nac"))
    config, known = base(family), dict(flatten(all_keys(family)))
    plain = ConfigDict(dict(saved), allow_dotted_keys=True)
    with config.unlocked():
        for name, value in leaves(plain):
            if name not in known:
                continue
            key = known[name]
            listed = isinstance(key.default, tuple) and isinstance(value, list | tuple)
            value = tuple(value) if listed else value
            try:
                check_value(name, value, key)
            except UserError:
                continue
            group: Any = config
            *parents, last = name.split(".")
            for parent in parents:
                group = group[parent]
            if isinstance(key.default, Mapping):
                value = ConfigDict(dict(value), allow_dotted_keys=False)
            group[last] = value
    return config


def read_run(path: Path) -> RunRecord:
    """Reads a run's directory.

    Raises:
        UserError: it is not one: it has neither config.json nor jobs/.
    """
    if not path.is_dir():
        raise UserError(f"{path} is not a directory; give the --workdir of a run")
    if not (path / "config.json").is_file() and not (path / "jobs").is_dir():
        raise UserError(f"{path} has neither config.json nor jobs/; give the --workdir of a run")
    notes: list[str] = []
    config = _config(path / "config.json", notes)
    summary = _readable(path / "summary.json", notes) if (path / "summary.json").is_file() else {}
    listed = _listed(summary)
    names = _job_names(path, config, listed, notes)
    jobs = {name: _read_job(path, name, listed.get(name, {}), notes) for name in names}
    if other := _measured_before(path, jobs):
        jobs["eval"] = JobRecord("eval", "pending", needs=jobs["eval"].needs)
        notes.append(
            f"The job eval has measured other weights of {', '.join(other)} than there are now, "
            "and is left out; run it again."
        )
    return RunRecord(path, config, jobs, tuple(notes))


def _measured_before(path: Path, jobs: Mapping[str, JobRecord]) -> list[str]:
    """The jobs that have been trained on or anew since the job eval has measured their networks."""
    if "eval" not in jobs or jobs["eval"].status != "done":
        return []
    try:
        known = read_inputs(path, "eval")[1]["weights"]
        own = {name: path / "jobs" / name / "weights" for name in known}
        now = {n: digest(w) for n, w in own.items() if (w / "description.json").is_file()}
    except UserError:  # noted where it is read
        return []
    under_way = [n for n in now if n in jobs and jobs[n].status != "done"]
    return sorted({*changed(known, now), *under_way})


def _readable(path: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object; {} and a note where it cannot be read."""
    try:
        content = read_json(path)
        if isinstance(content, dict):
            return content
        notes.append(f"{path} is not a JSON object.")
    except UserError as error:
        notes.append(f"{error}.")
    return {}


def _config(path: Path, notes: list[str]) -> dict[str, Any]:
    """A run's config.json; {} and a note where it cannot be read, or has no groups of keys."""
    config = _readable(path, notes)
    groups = [name for name, value in base().items() if isinstance(value, ConfigDict)]
    if odd := [name for name in groups if not isinstance(config.get(name, {}), dict)]:
        notes.append(f"{path} is not the config of a run: {odd[0]} is no group of keys.")
        return {}
    return config


def _listed(summary: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The jobs of summary.json by name; what is no job is left out."""
    jobs = summary.get("jobs")
    own = [job for job in jobs if isinstance(job, dict)] if isinstance(jobs, list) else []
    return {job["name"]: job for job in own if isinstance(job.get("name"), str)}


def _job_names(
    path: Path, config: Mapping[str, Any], listed: Mapping[str, Any], notes: list[str]
) -> list[str]:
    """All jobs, in the order in which they run: of the config, of summary.json, on disk."""
    try:
        planned = list(Plan(restore_config(config)).names)
    except UserError as error:
        notes.append(f"The jobs are those on disk, not those planned: {error}.")
        planned = []
    root = path / "jobs"
    kept = ("done.json", "metrics.jsonl", "inputs.json", "checkpoints", "weights")
    on_disk = {
        "/".join(parts[:i])
        for parts in (name.split("/") for name in file_names(root))
        for i, part in enumerate(parts)
        if part in kept
    }
    extra = {name for name in {*listed, *on_disk} if is_job_name(name)} - {*planned}
    return planned + sorted(extra, key=_order)


def _order(name: str) -> tuple[int, int]:
    phase, _, index = name.partition("/")
    return PHASES.index(phase), int(index or 0)


def _read_job(path: Path, name: str, listed: Mapping[str, Any], notes: list[str]) -> JobRecord:
    """A job's record; damaged parts of it are noted and left out."""
    directory = path / "jobs" / name
    result: dict[str, Any] = {}
    needs: tuple[str, ...] = ()
    try:
        if (directory / "done.json").is_file():
            result = read_result(directory / "done.json", name)
        if (directory / "inputs.json").is_file():
            needs = tuple(read_inputs(path, name)[0]["needs"])
    except UserError as error:
        notes.append(f"{error}.")
    entries = tuple(read_entries(directory / "metrics.jsonl"))
    saved = latest_step(directory / "checkpoints")
    status = "pending"
    if result:
        status = "done"
    elif is_held(directory):
        status = "running"
    elif entries or saved or (directory / "checkpoints").is_dir():
        status = "interrupted"
    elif listed.get("status") == "not needed":
        status = "not needed"
    return JobRecord(name, status, result, entries, saved, needs)
