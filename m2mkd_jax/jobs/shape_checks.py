"""Refuses stages that do not fit together, by the shapes of what flows through them.

Nothing is computed. A family or a teacher of one's own is checked here; what the families of this
package are made of is checked by key before (`StudentFamily.check`).

Axes: B batch, S image side, K classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from m2mkd_jax.checkpoint.trees import match_tree
from m2mkd_jax.data.channels import image_shape
from m2mkd_jax.errors import UserError, require
from m2mkd_jax.jobs.plan import Job, Kind, Plan
from m2mkd_jax.models import chain
from m2mkd_jax.phases.build import TEACHER_STAGES
from m2mkd_jax.phases.detection import DetectionPhase
from m2mkd_jax.phases.families import students, teacher
from m2mkd_jax.phases.phase import Phase

DATA = "the data"  # in place of a stage before the first


def check_shapes(plan: Plan) -> None:
    """Walks through every chain of stages that the jobs of a plan run.

    Args:
        plan: the jobs.

    Raises:
        UserError: one line that names the job and the stage that does not fit.
    """
    for name in plan.names:
        job = plan.job(name)
        if job.kind is not Kind.EVALUATION:
            check_job(plan.config, job)
    _check_matched_tokens(plan)


def _check_matched_tokens(plan: Plan) -> None:
    """Raises UserError where tokens are to be matched and no student gives those of its teacher."""
    weight = plan.config.distillation.token_weight
    phases = [plan.job(name).phase for name in plan.names if name.startswith("m2mkd/")]
    require(
        not weight or not phases or any(map(_gives_tokens_of_teacher, phases)),
        f"config.distillation.token_weight is {weight}, and no student gives tokens of the shape "
        "that the module gives that teaches it; set it to 0",
    )


def _gives_tokens_of_teacher(phase: Phase) -> bool:
    """Whether the stage that a phase trains gives tokens of the shape that its teacher's gives."""
    (student,) = phase.trainable
    module = phase.teacher[phase.student.index(student)]
    x = jax.ShapeDtypeStruct((_images(phase), *image_shape(phase.data)), jnp.float32)
    for name in phase.student[: phase.student.index(student)]:
        x = output(phase.stages[name].build, x.shape, x.dtype)
    ours, theirs = (output(phase.stages[n].build, x.shape, x.dtype) for n in (student, module))
    return student != phase.student[-1] and ours.shape == theirs.shape


def check_job(config: ConfigDict, job: Job) -> None:
    """Walks through both chains of a job that trains, and assembles its network.

    Raises:
        UserError: one line that names the job and the stage that does not fit.
    """
    phase = job.phase
    if isinstance(phase, DetectionPhase):  # built by its spec, whose fields are checked
        return
    classes = config.few_shot.ways if job.kind is Kind.FEW_SHOT else phase.data.classes
    rates = phase.rates or (None,) * len(phase.student)
    require(
        len(rates) == len(phase.student),
        f"config.family: {job.name} has {len(phase.student)} stages and drop-path rates for "
        f"{len(rates)}",
    )
    _check_chain(config, phase, phase.student, rates, classes)
    _check_chain(config, phase, phase.teacher, (None,) * len(phase.teacher), classes)
    if phase.assembled:
        _check_assembly(config, phase)
    if any(spec.weights.kind == "upcycled" for spec in phase.stages.values()):
        _check_upcycling(config, phase)


def _check_chain(
    config: ConfigDict,
    phase: Phase,
    names: Sequence[str],
    rates: Sequence[Sequence[float] | None],
    classes: int,
) -> None:
    """Raises UserError where a stage does not take what the one before gives, or not (B, K)."""
    x = jax.ShapeDtypeStruct((_images(phase), *image_shape(phase.data)), jnp.float32)
    before = DATA
    for name, ramp in zip(names, rates, strict=True):
        # Where a student and a module of the teacher do not fit, it is the student that is wrong.
        keys = (_key(config, before), _key(config, name))
        key = "family" if "family" in keys else keys[1]
        where = f"config.{key}: {phase.job}: {name}"
        build = phase.stages[name].build
        try:
            _abstract(build)
        except Exception as error:  # whatever a module of one's own raises
            raise UserError(f"{where} cannot be built: {_reason(error)}") from None
        try:
            y = output(build, x.shape, x.dtype, len(ramp or ()) if any(ramp or ()) else 0)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except Exception as error:  # whatever jax says of shapes that do not fit
            raise UserError(
                f"{where} does not take what {before} gives, {x.shape}: {_reason(error)}"
            ) from None
        require(isinstance(y, jax.ShapeDtypeStruct), f"{where} gives {type(y).__name__}, no array")
        x, before = y, name
    if names:
        require(
            x.shape == (_images(phase), classes),
            f"config.{_key(config, before)}: {phase.job}: {before}, the last, gives {x.shape}, not "
            f"the logits {(_images(phase), classes)}",
        )


def _key(config: ConfigDict, name: str) -> str:
    """The key of the config that decides what a stage is."""
    if name == DATA:
        return "data"
    if not name.startswith(TEACHER_STAGES):
        return "family"
    return "teacher.family" if config.teacher.family else "teacher"


def _images(phase: Phase) -> int:
    return phase.recipe.batch // phase.recipe.accumulate


def _reason(error: Exception) -> str:
    """The first line of what was raised."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def _abstract(build: Callable) -> chain.SplitStage:
    return chain.abstract(build)


@functools.lru_cache(maxsize=1024)  # most stages are the same in most jobs
def output(build: Callable, shape: tuple[int, ...], dtype: jnp.dtype, blocks: int = 0) -> Any:
    """Shape and type of what a stage makes of an input of this shape and type.

    Args:
        build: makes the stage.
        shape, dtype: of the input.
        blocks: how many drop-path rates it gets in training; 0: none, in evaluation.
    """
    stage, x = chain.abstract(build), jax.ShapeDtypeStruct(shape, dtype)
    rates = (0.1,) * blocks or None

    def run(params: dict, fixed: dict, x: jax.Array) -> jax.Array:
        key = jax.random.key(0) if blocks else None
        return chain.merge(stage.graph, params, fixed)(x, rates=rates, key=key, train=bool(blocks))

    return jax.eval_shape(run, stage.params, stage.fixed, x)


def _parameters(phase: Phase, kind: str) -> dict[str, dict]:
    """Shapes of the parameters of the stages whose weights come so."""
    return {
        name: chain.abstract(spec.build).params
        for name, spec in phase.stages.items()
        if spec.weights.kind == kind
    }


def _compare(given: Mapping[str, dict], network: Mapping[str, dict], where: str) -> None:
    try:
        match_tree(dict(given), dict(network), where)
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{where}: {_reason(error)}") from None


def _check_assembly(config: ConfigDict, phase: Phase) -> None:
    """Raises UserError where students do not give the network's parameters."""
    family, network = students(config), _parameters(phase, "assembled")
    taught = [chain.abstract(family.student(i).stage.build).params for i in range(family.modules)]
    where = f"config.family: {phase.job}: what the students are assembled to"

    def assemble(network: dict, taught: list) -> dict:
        return family.assemble(network, taught)[0]

    try:
        given = jax.eval_shape(assemble, network, taught)
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where} cannot be said: {_reason(error)}") from None
    _compare(given, network, where)


def _check_upcycling(config: ConfigDict, phase: Phase) -> None:
    """Raises UserError where the teacher does not give the network's parameters."""
    family, whole, network = students(config), teacher(config), _parameters(phase, "upcycled")
    (weights,) = {s.weights for s in phase.stages.values() if s.weights.kind == "upcycled"}
    dense = [chain.abstract(whole.module(i, weights).build) for i in range(whole.modules)]
    where = f"config.family: {phase.job}: what the teacher is turned into"

    def upcycle(network: dict, arrays: list) -> dict:
        merged = [
            chain.merge(stage.graph, *parts) for stage, parts in zip(dense, arrays, strict=True)
        ]
        return family.upcycle(network, merged)

    try:
        given = jax.eval_shape(upcycle, network, [(stage.params, stage.fixed) for stage in dense])
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{where} cannot be said: {_reason(error)}") from None
    _compare(given, network, where)
