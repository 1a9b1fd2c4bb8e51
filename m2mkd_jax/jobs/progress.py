"""How fast a job goes, and how long it and the whole run still take."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from scipy.optimize import nnls

from m2mkd_jax.checkpoint.files import read_record
from m2mkd_jax.config.defaults import MODULE_PHASES
from m2mkd_jax.data.channels import image_shape
from m2mkd_jax.detection.training import STAGE
from m2mkd_jax.errors import UserError
from m2mkd_jax.evaluate.flops import flops_of
from m2mkd_jax.jobs.joint import can_join
from m2mkd_jax.jobs.plan import Job, Kind, Plan, is_done
from m2mkd_jax.jobs.run import count_updates
from m2mkd_jax.models import chain
from m2mkd_jax.parallel.matrix_rate import matrix_rate
from m2mkd_jax.phases.detection import DetectionPhase
from m2mkd_jax.phases.phase import Phase
from m2mkd_jax.phases.weight_files import job_directory

# Numbers of the log that differ between two runs of one config.
CLOCK = (
    "seconds_per_step",
    "data_wait",
    "images_per_second",
    "matrix_share",
    "memory",
    "seconds_left",
    "run_seconds_left",
)
FORWARD, BACKWARD, TRAINED = 1, 2, 3  # passes of a stage's work: frozen, crossed by gradients, both


def memory_in_use() -> int:
    """Peak bytes on the first device; on a CPU bytes of this process."""
    device = jax.local_devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats:
        return int(stats.get("peak_bytes_in_use", 0))
    return int(psutil.Process().memory_info().rss)


def pace(entry: Mapping[str, Any], images: int, total: int, flops: int, dtype: Any) -> dict:
    """Further numbers of a log entry.

    Args:
        entry: with step and seconds_per_step.
        images: of a step, over all devices.
        total: steps of the job.
        flops: of a step of the program that the job trains in, on all devices; 0: unknown.
        dtype: of activations.

    Returns:
        images_per_second, memory (see `memory_in_use`), seconds_left of the job, and where FLOPs
        are known matrix_share, the share of the devices' matrix rate.
    """
    seconds = max(float(entry["seconds_per_step"]), 1e-9)
    found = {
        "images_per_second": images / seconds,
        "memory": memory_in_use(),
        "seconds_left": (total - int(entry["step"])) * seconds,
    }
    if flops:
        found["matrix_share"] = flops / seconds / (matrix_rate(dtype) * jax.device_count())
    return found


def job_steps(phase: Phase) -> int:
    """Steps of a job. Raises UserError where its data cannot be read."""
    return round(phase.recipe.epochs * count_updates(phase)) * phase.recipe.accumulate


def work_per_image(phase: Phase) -> float:
    """FLOPs per image of a training step, about: stage by stage, without tracing the step."""
    work, image = 0.0, image_shape(phase.data)
    if isinstance(phase, DetectionPhase):
        return TRAINED * detection_flops(phase)
    first = min(phase.student.index(name) for name in phase.trainable)
    shape: tuple[int, ...] = (1, *image)
    for place, name in enumerate(phase.student):
        flops, shape = _stage_work(phase.stages[name].build, shape)
        passes = FORWARD if place < first else BACKWARD
        work += flops * (TRAINED if name in phase.trainable else passes)
    shape = (1, *image)
    for name in phase.teacher:
        flops, shape = _stage_work(phase.stages[name].build, shape)
        work += flops if name not in phase.student[:first] else 0
    return work


def detection_flops(phase: DetectionPhase) -> int:
    """FLOPs of a detector for one image, forward."""
    side = phase.data.image_size
    program = phase.program(None, jnp.dtype(jnp.float32), False)
    batch = {
        "image": jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8),
        "size": jax.ShapeDtypeStruct((1, 2), jnp.float32),
    }
    params = chain.abstract(phase.stages[STAGE].build).params
    return flops_of(jax.make_jaxpr(program.detect)(params, batch).jaxpr)


@functools.cache  # most stages are the same in most jobs
def _stage_work(build: Any, shape: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
    """FLOPs of a stage's forward pass for an input of this shape, and its output's shape."""
    stage, x = chain.abstract(build), jax.ShapeDtypeStruct(shape, jnp.float32)

    def run(params: dict, fixed: dict, x: jax.Array) -> jax.Array:
        return chain.merge(stage.graph, params, fixed)(x)

    traced, out = jax.make_jaxpr(run, return_shape=True)(stage.params, stage.fixed, x)
    return flops_of(traced.jaxpr), out.shape


@dataclass
class Schedule:
    """The jobs of a run with the work of each, for what is left of its time.

    Attributes:
        names: of all jobs of the command, in order.
        work_of: FLOPs of a job, about, by its name; asked once for each, when a job has finished.
        workdir: of the run.
        joins: whether a job trains in one program with the other modules of its phase.
    """

    names: list[str]
    work_of: Callable[[str], float]
    workdir: Path
    joins: Callable[[str], bool] = lambda name: False
    _finished: dict[str, float] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, plan: Plan, names: Iterable[str], workdir: Path) -> Schedule:
        """The schedule of some jobs of a plan."""

        def joins(name: str) -> bool:
            module = name.partition("/")[0] in MODULE_PHASES
            return module and can_join(plan.config, plan.job(name).phase)

        return cls(list(names), lambda name: _work(plan.job(name)), workdir, joins)

    @functools.cached_property
    def work(self) -> dict[str, float]:
        """FLOPs by job, about."""
        return {name: self.work_of(name) for name in self.names}

    def _seconds(self, name: str) -> float | None:
        """`job_seconds`; the result of a finished job is read once, not at every log entry."""
        if name not in self._finished:
            seconds = job_seconds(self.workdir, name)
            if seconds is None:
                return None
            self._finished[name] = seconds
        return self._finished[name]

    def place(self, name: str) -> str:
        """Which of how many jobs it is."""
        at = self.names.index(name) + 1 if name in self.names else 0
        return f"job {at} of {len(self.names)}"

    def seconds_left(self, shares: Mapping[str, float]) -> float | None:
        """Time until all jobs are done, as the finished ones went; None: none is finished.

        A job takes some seconds whatever its size (compilation, checkpoints, evaluation), and some
        for its work: both are fitted to the finished jobs.

        Args:
            shares: of the jobs under way, how much of each is done.
        """
        # Modules that train in one program show the same seconds: together they are one, and what
        # that took is known when all have ended.
        groups: dict[str, list[str]] = {}
        spent: dict[str, float] = {}
        under_way: set[str] = set()
        for name in self.names:
            seconds = self._seconds(name)
            group = name.partition("/")[0] if self.joins(name) else name
            if seconds is not None:
                groups.setdefault(group, []).append(name)
                spent[group] = max(seconds, spent.get(group, 0.0))
            elif name in shares:
                under_way.add(group)
        finished = {name for own in groups.values() for name in own}
        groups = {group: own for group, own in groups.items() if group not in under_way}
        if not groups or not any(self.work[name] for own in groups.values() for name in own):
            return None
        left = {name: 1 - shares.get(name, 0.0) for name in self.names if name not in finished}
        each, per_work = _fitted(
            [(len(own), sum(self.work[n] for n in own), spent[g]) for g, own in groups.items()]
        )
        return sum(share * (each + per_work * self.work[name]) for name, share in left.items())


def _fitted(rows: list[tuple[int, float, float]]) -> tuple[float, float]:
    """Seconds of a job whatever its work, and per FLOP, both from 0, by least squares.

    Args:
        rows: jobs, their work, their seconds.
    """
    counts, work, seconds = np.array(rows, np.float64).T
    if len(rows) == 1:  # that cannot tell the two apart
        return 0.0, float(seconds[0] / work[0])
    scale = work.max()
    (each, per_work), _ = nnls(np.stack([counts, work / scale], 1), seconds)
    return float(each), float(per_work / scale)


def job_seconds(workdir: Path, name: str) -> float | None:
    """Wall time of a finished job; None for others."""
    if not is_done(workdir, name):
        return None
    return float(read_record(job_directory(workdir, name) / "done.json").get("seconds", 0.0))


def _work(job: Job) -> float:
    """FLOPs of a job, about; 0 of one that does not train, or whose data cannot be read."""
    if job.kind is not Kind.TRAINING:
        return 0.0
    phase = job.phase
    try:
        images = job_steps(phase) * (phase.recipe.batch // phase.recipe.accumulate)
    except UserError:
        return 0.0
    return images * work_per_image(phase)
