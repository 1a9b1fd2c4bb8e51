"""Jobs that train in one program: which can, how many fit into memory, and their joint step.

The step of a single job is that of a group of one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from m2mkd_jax.checkpoint.steps import common_steps, program_jobs
from m2mkd_jax.jobs.fitting import FittingStep, device_memory, in_two_programs
from m2mkd_jax.jobs.plan import Job
from m2mkd_jax.jobs.run import Run
from m2mkd_jax.jobs.setup import Setup, abstract_stages, frozen_program, set_up
from m2mkd_jax.parallel import mesh as meshes
from m2mkd_jax.parallel.process import from_main, is_main, say
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.phases.detection import DetectionProgram, SingleProgram
from m2mkd_jax.phases.joint import JointProgram
from m2mkd_jax.phases.phase import Phase
from m2mkd_jax.phases.program import Program
from m2mkd_jax.train.step import Step, make_joint_step

# What of a recipe decides the batches, which jobs of one program share.
SHARED_FIELDS = (
    "batch",
    "accumulate",
    "mixup",
    "cutmix",
    "switch_prob",
    "mix_prob",
    "smoothing",
)


def is_hybrid(phase: Phase) -> bool:
    """Whether a phase trains a part of a chain against the logits of the teacher's chain."""
    return bool(phase.teacher) and len(phase.trainable) < len(phase.student)


def keeps_targets(phase: Phase) -> bool:
    """Whether what a phase's frozen stages give is computed once for every view."""
    return bool(phase.views and phase.distillation and phase.distillation.keep_targets)


def can_join(config: ConfigDict, phase: Phase) -> bool:
    """Whether a phase may train in one program with others: modules of one kind, m2mkd or mt.

    Not so where random numbers depend on how many stages a chain has, and so on which other modules
    there are: with the published evaluation's noise, in m2mkd without distillation, and in mt with
    drop-path, which acts in the meta model too.
    """
    if not config.distillation.joint or config.evaluation.sampled:
        return False
    if phase.teacher:
        return is_hybrid(phase) and config.distillation.kind != "none"
    part = len(phase.trainable) < len(phase.student)
    return part and not phase.head and not phase.recipe.drop_path


def alike(run: Run, jobs: Sequence[Job]) -> list[Job]:
    """The first of some jobs, and those of the others that can train in one program with it.

    They see the same batches from the same step on.
    """
    first, *others = jobs
    if not can_join(run.config, first.phase):
        return [first]
    steps = steps_before(run, jobs)

    def batches(job: Job) -> tuple[Any, ...]:
        """What decides the batches that a job sees next."""
        phase = job.phase
        shared = tuple(phase.recipe[name] for name in SHARED_FIELDS)
        return phase.data.to_json(), phase.seed, steps[job.name], shared

    wanted = batches(first)
    return [first] + [
        job for job in others if can_join(run.config, job.phase) and batches(job) == wanted
    ]


def steps_before(run: Run, jobs: Sequence[Job]) -> dict[str, int]:
    """The steps that jobs have done, of the checkpoints from which they go on together."""
    return from_main(common_steps(_checkpoints(run, jobs)) if is_main() else {})


def ended_beside(run: Run, jobs: Sequence[Job], steps: Mapping[str, int]) -> list[Phase]:
    """The phases of the jobs that have ended in the programs of some jobs.

    Args:
        run: the run.
        jobs: that go on.
        steps: theirs, by `steps_before`.
    """
    found = program_jobs(_checkpoints(run, jobs), steps) if is_main() else []
    going_on = {job.name for job in jobs}
    return [build_phase(run.config, name) for name in from_main(found) if name not in going_on]


def _checkpoints(run: Run, jobs: Sequence[Job]) -> dict[str, Path]:
    return {job.name: run.directory(job.name) / "checkpoints" for job in jobs}


def stages_apart(phases: Iterable[Phase]) -> set[str]:
    """The stages that not all of some phases run: in a joint program they are joined to none."""
    first, *others = ({*phase.student, *phase.teacher} for phase in phases)
    return first.union(*others) - first.intersection(*others)


@dataclass(frozen=True)
class JointSetup:
    """What the training step of one or several jobs is made of.

    Attributes:
        setups: of the single jobs, by name; their frozen stages of equal names are the same arrays.
        kept: what a batch has of what frozen stages give (`given_shapes`), with its shapes for the
            whole batch; None: images, and all frozen stages run.
    """

    setups: Mapping[str, Setup]
    kept: Mapping[str, jax.ShapeDtypeStruct] | None = None

    @property
    def loss(self) -> Callable:
        """Of a batch, with parameters and metrics by job; a detector trains alone."""
        if isinstance(self._first.program, DetectionProgram):
            ((job, setup),) = self.setups.items()
            return SingleProgram(job, setup.program).loss
        return self.program.loss

    @property
    def program(self) -> JointProgram:
        """The losses and logits of all jobs, none of them a detector's."""
        return JointProgram({job: setup.program for job, setup in self.setups.items()})

    @property
    def frozen(self) -> dict[str, dict]:
        """The frozen stages of all jobs."""
        return {n: stage for setup in self.setups.values() for n, stage in setup.frozen.items()}

    @property
    def abstract_states(self) -> dict[str, dict]:
        """Shapes and types of the states' arrays, and where they lie, by job."""
        return {job: setup.abstract_state for job, setup in self.setups.items()}

    @property
    def abstract_frozen(self) -> dict[str, dict]:
        """Shapes and types of the frozen arrays, and where they lie."""
        return {n: s for setup in self.setups.values() for n, s in setup.abstract_frozen.items()}

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of a batch from the host, and where it lies."""
        setup, batch = self._first, self._first.abstract_batch
        if self.kept is None:
            return batch
        where = None if setup.mesh is None else meshes.batch_sharding(setup.mesh)
        kept = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)
            for name, leaf in self.kept.items()
        }
        return {"label": batch["label"], **kept}

    @property
    def given_shapes(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What the frozen stages give for a batch, as batches have it that are kept.

        "tokens/JOB" and "logits/JOB"; "image" in place of tokens for a student that takes images.
        """
        setup, batch = self._first, self.abstract_batch
        images = jax.ShapeDtypeStruct(batch["image"].shape, jnp.float32)
        given = setup.on_mesh(self.program.given)
        shapes = {}
        for job, outputs in jax.eval_shape(given, self.abstract_frozen, images).items():
            shapes[f"logits/{job}"] = outputs["logits"]
            if self.setups[job].program.shared:
                shapes[f"tokens/{job}"] = outputs["tokens"]
            else:
                shapes["image"] = batch["image"]
        return shapes

    def on_kept(self) -> JointSetup:
        """The same jobs on batches of what is kept; the teachers' own stages are let go."""
        setups = {}
        for job, setup in self.setups.items():
            student = setup.program.student
            frozen = {name: stage for name, stage in setup.frozen.items() if name in student}
            setups[job] = dataclasses.replace(setup, frozen=frozen)
        return JointSetup(setups, self.given_shapes)

    @property
    def _first(self) -> Setup:
        return next(iter(self.setups.values()))

    def only(self, jobs: Collection[str]) -> JointSetup:
        """The setup of some of the jobs."""
        setups = {job: setup for job, setup in self.setups.items() if job in jobs}
        if self.kept is None:
            return JointSetup(setups)
        names = {f"{name}/{job}" for name in ("tokens", "logits") for job in setups}
        if any(not setup.program.shared for setup in setups.values()):
            names.add("image")
        return JointSetup(setups, {name: self.kept[name] for name in self.kept if name in names})

    def make_step(self) -> FittingStep:
        """(states, frozen, batch) -> (states, metrics) by job, compiled at its first call."""
        setup = self._first
        where = None
        if setup.mesh is not None:
            places = {job: own.placement for job, own in self.setups.items()}
            where = (places, meshes.replicated(setup.mesh))

        def make(loss: Callable) -> Step:
            return make_joint_step(
                setup.on_mesh(loss),
                {job: (own.optimizer, own.phase.recipe) for job, own in self.setups.items()},
                setup.phase.data,
                setup.phase.seed,
                out_shardings=where,
                apart=in_two_programs([own.params for own in self.setups.values()]),
            )

        return FittingStep(", ".join(self.setups), make, self.loss)


def joint_setup(
    config: ConfigDict,
    phases: Mapping[str, Phase],
    stages: dict[str, dict],
    *,
    mesh: Mesh | None,
    updates_per_epoch: int,
    beside: Iterable[Phase] = (),
) -> JointSetup:
    """Everything a joint training step is made of.

    Args:
        config: of the run.
        phases: by job.
        stages: {name: {"params", "fixed"}} of all of them, arrays or shapes.
        mesh: the devices; None: the first one alone.
        updates_per_epoch: optimizer updates in an epoch.
        beside: of jobs that have ended in the program of these: its stages stay as they were
            joined, since otherwise rounding differs.
    """
    apart = stages_apart([*phases.values(), *beside])
    setups: dict[str, Setup] = {}
    shared: dict[str, dict] = {}
    for job, phase in phases.items():
        setups[job] = set_up(
            config,
            phase,
            {name: stages[name] for name in phase.stages},
            mesh=mesh,
            updates_per_epoch=updates_per_epoch,
            apart=apart,
            shared=shared,
        )
        shared |= setups[job].frozen
    return JointSetup(setups)


def teacher_program(
    config: ConfigDict, phases: Mapping[str, Phase], stages: dict[str, dict]
) -> tuple[JointProgram, dict]:
    """The teachers' chains of some phases, by job, and what they take for frozen."""
    apart = stages_apart(phases.values())
    programs: dict[str, Program] = {}
    frozen: dict[str, dict] = {}
    for job, phase in phases.items():
        programs[job], own = frozen_program(config, phase, phase.teacher, stages, apart, frozen)
        frozen |= own
    return JointProgram(programs), frozen


def fitting_jobs(
    run: Run, jobs: list[Job], updates: int, beside: Sequence[Phase] = ()
) -> tuple[list[Job], FittingStep]:
    """As many of the first of some jobs as fit into memory, and their step, compiled.

    Args:
        run: the run.
        jobs: that can train in one program.
        updates: optimizer updates in an epoch.
        beside: as for `joint_setup`.
    """
    stages: dict[str, dict] = {}
    for job in jobs:
        stages |= abstract_stages(job.phase)

    def step_of(count: int) -> tuple[FittingStep, bool]:
        phases = {job.name: job.phase for job in jobs[:count]}
        setup = joint_setup(
            run.config, phases, stages, mesh=run.mesh, updates_per_epoch=updates, beside=beside
        )
        if keeps_targets(jobs[0].phase):
            setup = setup.on_kept()
        step = setup.make_step()
        shapes = (setup.abstract_states, setup.abstract_frozen, setup.abstract_batch)
        return step, step.fits(*shapes)

    whole, fits = step_of(len(jobs))
    if fits:
        return jobs, whole
    fitting, few, many = None, 1, len(jobs) - 1
    while few < many:  # the largest number that fits lies between them
        count = (few + many + 1) // 2
        step, fits = step_of(count)
        fitting, few, many = (step, count, many) if fits else (fitting, few, count - 1)
    say(
        f"[{jobs[0].name}] {few} of {len(jobs)} modules train at once, the others after them: all "
        f"need {whole.needed / 2**30:.1f} GiB of {device_memory() / 2**30:.1f} GiB"
    )
    return jobs[:few], fitting or step_of(few)[0]
