"""How long a run still takes, from the jobs that have ended and what those to come compute."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from m2mkd_jax.checkpoint.files import read_record
from m2mkd_jax.config.defaults import MODULE_PHASES
from m2mkd_jax.data.channels import image_shape
from m2mkd_jax.detection.training import STAGE
from m2mkd_jax.errors import UserError
from m2mkd_jax.evaluate.flops import equations_of, flops_of
from m2mkd_jax.jobs.joint import can_join
from m2mkd_jax.jobs.log import read_entries
from m2mkd_jax.jobs.plan import Job, Kind, Plan, is_done
from m2mkd_jax.jobs.run import count_updates, total_steps
from m2mkd_jax.models import chain
from m2mkd_jax.phases.detection import DetectionPhase
from m2mkd_jax.phases.phase import Phase
from m2mkd_jax.phases.weight_files import job_directory

FORWARD, BACKWARD, TRAINED = 1, 2, 3  # passes through a stage: frozen, crossed by gradients, both
REPEATED = 0.4  # of the time to start a program, where an earlier job has compiled it


@dataclass(frozen=True)
class Cost:
    """What a job computes, about.

    Attributes:
        work: FLOPs of all its steps; 0: unknown, or it has none.
        size: equations of its program.
        program: what is compiled; equal for jobs that run the same.
        steps: how many.
    """

    work: float
    size: int
    program: Hashable
    steps: int = 0


class Finished(NamedTuple):
    """What a job took.

    Attributes:
        seconds: of all of it.
        stepping: of these, those of its steps.
        steps: how many it made, fewer than planned where it stopped early; None: not known.
    """

    seconds: float
    stepping: float
    steps: int | None

    def work(self, planned: Cost) -> float:
        """FLOPs of the steps that it made."""
        if self.steps is None or not planned.steps:
            return planned.work
        return planned.work * self.steps / planned.steps


@dataclass
class TimeLeft:
    """The jobs of a command with the cost of each, for what is left of its time.

    Attributes:
        names: of all jobs of the command, in order.
        cost_of: what a job computes; asked once for each.
        workdir: of the run.
        joins: whether a job trains in one program with the other modules of its phase.
    """

    names: list[str]
    cost_of: Callable[[str], Cost]
    workdir: Path
    joins: Callable[[str], bool] = lambda name: False
    _finished: dict[str, Finished] = field(default_factory=dict, init=False)
    _looked_for: frozenset[str] = field(default=frozenset(), init=False)

    @classmethod
    def of(cls, plan: Plan, names: Iterable[str], workdir: Path) -> TimeLeft:
        """For some jobs of a plan."""

        def joins(name: str) -> bool:
            module = name.partition("/")[0] in MODULE_PHASES
            return module and can_join(plan.config, plan.job(name).phase)

        return cls(list(names), lambda name: _cost(plan.job(name)), workdir, joins)

    @functools.cached_property
    def costs(self) -> dict[str, Cost]:
        """What each job computes, about."""
        return {name: self.cost_of(name) for name in self.names}

    def place(self, name: str) -> str:
        """Which of how many jobs it is."""
        at = self.names.index(name) + 1 if name in self.names else 0
        return f"job {at} of {len(self.names)}"

    def seconds(
        self, under_way: Mapping[str, tuple[int, int]] | None = None, per_step: float = 0.0
    ) -> float | None:
        """Time until all jobs are done, as the finished ones went; None: none is finished.

        Steps take time by their FLOPs. What else a job takes, for tracing, compiling, evaluating
        and saving, goes by the size of its program.

        Args:
            under_way: the jobs in training, which have compiled: steps done, and all steps.
            per_step: seconds of a step of theirs.
        """
        under_way = under_way or {}
        # Jobs end between those under way: at a log entry like the last one no file is asked for.
        look, self._looked_for = under_way.keys() != self._looked_for, frozenset(under_way)
        groups: dict[str, list[str]] = {}  # of the jobs of one program, which end as one
        for name in self.names:
            group = name.partition("/")[0] if self.joins(name) else name
            groups.setdefault(group, []).append(name)
        stepping = starting = work = started = work_left = to_start = 0.0
        compiled: set[Hashable] = set()
        for names in groups.values():
            cost = [self.costs[name] for name in names]
            size = _compiled_size(cost, compiled)
            compiled |= {c.program for c in cost}
            took = [self._took(name, look or not under_way) for name in names]
            known = [own for own in took if own is not None]
            if len(known) == len(names) and all(c.work for c in cost):
                # They show the same seconds.
                stepping += max(own.stepping for own in known)
                starting += max(own.seconds - own.stepping for own in known)
                work += sum(own.work(c) for own, c in zip(known, cost, strict=True))
                started += size
            elif not under_way.keys() & set(names):
                open_ = [c for c, own in zip(cost, took, strict=True) if own is None]
                work_left += sum(c.work for c in open_)
                to_start += size * len(open_) / len(cost)
            else:  # the first program is compiled
                own = [self.costs[name] for name in under_way]
                to_start += _compiled_size(own, compiled - {c.program for c in own}) - sum(
                    c.size for c in own
                )
        if not work:
            return None
        left = self._steps_left(under_way) * per_step
        return left + work_left * stepping / work + to_start * starting / max(started, 1)

    def _steps_left(self, under_way: Mapping[str, tuple[int, int]]) -> float:
        """Steps left of some jobs in one program; those that fewer jobs make count for less."""
        work = {name: self.costs[name].work for name in under_way}
        a_step = sum(work[name] / total for name, (_, total) in under_way.items())
        if not a_step:
            return max((total - done for done, total in under_way.values()), default=0)
        return sum(work[n] * (1 - done / total) for n, (done, total) in under_way.items()) / a_step

    def _took(self, name: str, look: bool) -> Finished | None:
        """What a finished job took; `look` whether it has ended since."""
        # An estimate can do without what cannot be read just now, or is damaged.
        with contextlib.suppress(UserError, OSError):
            if look and name not in self._finished and is_done(self.workdir, name):
                directory = job_directory(self.workdir, name)
                result = read_record(directory / "done.json")
                seconds = float(result.get("seconds", 0.0))
                stepping = min(_stepping(directory / "metrics.jsonl"), seconds)
                self._finished[name] = Finished(seconds, stepping or seconds, result.get("steps"))
        return self._finished.get(name)


def _compiled_size(jobs: Sequence[Cost], compiled: Collection[Hashable]) -> float:
    """Equations to compile for jobs in one program: as jobs end, one of those that are left.

    Args:
        jobs: the jobs.
        compiled: the programs of earlier jobs.
    """
    sizes = {
        n: job.size * (REPEATED if job.program in compiled else 1) for n, job in enumerate(jobs)
    }
    ends = {job.steps for job in jobs}
    return sum(sizes[n] for end in ends for n, job in enumerate(jobs) if job.steps >= end)


def _stepping(log: Path) -> float:
    """Seconds of the steps of a job, from its log; 0 where it has none."""
    seconds, before = 0.0, 0
    try:
        for entry in read_entries(log):
            if "seconds_per_step" in entry:
                seconds += (entry["step"] - before) * entry["seconds_per_step"]
                before = entry["step"]
    except (OSError, UserError, TypeError):  # an estimate can do without
        return 0.0
    return seconds


def _cost(job: Job) -> Cost:
    """What a job computes; no work where it does not train, or its data cannot be read."""
    if job.kind is not Kind.TRAINING:
        programs = tuple(_program(phase) for phase in job.phases)
        return Cost(0.0, sum(_forward_size(phase) for phase in job.phases), programs)
    phase = job.phase
    work, size = _per_image(phase)
    try:
        steps = total_steps(phase, count_updates(phase))
    except UserError:
        steps = 0
    images = steps * (phase.recipe.batch // phase.recipe.accumulate)
    return Cost(images * work, size, _program(phase), steps)


def _program(phase: Phase) -> Hashable:
    """What is compiled for a phase, about: its stages, which of them are trained, the batch."""
    student = tuple((phase.stages[n].build, n in phase.trainable) for n in phase.student)
    teacher = tuple(phase.stages[n].build for n in phase.teacher)
    return student, teacher, phase.recipe.batch, phase.recipe.accumulate


def work_per_image(phase: Phase) -> float:
    """FLOPs per image of a training step, about: stage by stage, without tracing the step."""
    return _per_image(phase)[0]


def _per_image(phase: Phase) -> tuple[float, int]:
    """FLOPs per image of a training step, and equations of its program, both about."""
    if isinstance(phase, DetectionPhase):
        jaxpr = _detection(phase)
        return TRAINED * flops_of(jaxpr), TRAINED * equations_of(jaxpr)
    work, size = 0.0, 0
    first = min(phase.student.index(name) for name in phase.trainable)
    shape: tuple[int, ...] = (1, *image_shape(phase.data))
    for place, name in enumerate(phase.student):
        flops, equations, shape = _stage_cost(phase.stages[name].build, shape)
        passes = FORWARD if place < first else BACKWARD
        passes = TRAINED if name in phase.trainable else passes
        work, size = work + passes * flops, size + passes * equations
    shape = (1, *image_shape(phase.data))
    for name in phase.teacher:
        flops, equations, shape = _stage_cost(phase.stages[name].build, shape)
        if name not in phase.student[:first]:
            work, size = work + flops, size + equations
    return work, size


def _forward_size(phase: Phase) -> int:
    """Equations of a network's forward pass."""
    if isinstance(phase, DetectionPhase):
        return equations_of(_detection(phase))
    shape: tuple[int, ...] = (1, *image_shape(phase.data))
    size = 0
    for name in phase.student:
        _, equations, shape = _stage_cost(phase.stages[name].build, shape)
        size += equations
    return size


def detection_flops(phase: DetectionPhase) -> int:
    """FLOPs of a detector for one image, forward."""
    return flops_of(_detection(phase))


def _detection(phase: DetectionPhase) -> Any:
    """A detector's jaxpr for one image."""
    side = phase.data.image_size
    program = phase.program(None, jnp.dtype(jnp.float32), False)
    batch = {
        "image": jax.ShapeDtypeStruct((1, side, side, 3), jnp.uint8),
        "size": jax.ShapeDtypeStruct((1, 2), jnp.float32),
    }
    params = chain.abstract(phase.stages[STAGE].build).params
    return jax.make_jaxpr(program.detect)(params, batch).jaxpr


@functools.cache  # most stages are the same in most jobs
def _stage_cost(build: Any, shape: tuple[int, ...]) -> tuple[int, int, tuple[int, ...]]:
    """FLOPs and equations of a stage in training, and its output's shape for this input's."""
    stage, x = chain.abstract(build), jax.ShapeDtypeStruct(shape, jnp.float32)

    def run(params: dict, fixed: dict, x: jax.Array) -> jax.Array:
        merged = chain.merge(stage.graph, params, fixed)
        return merged(x, key=jax.random.key(0), train=True)

    traced, out = jax.make_jaxpr(run, return_shape=True)(stage.params, stage.fixed, x)
    return flops_of(traced.jaxpr), equations_of(traced.jaxpr), out.shape
