"""Where a loss or gradient that is not finite begins, and what helps.

The step is made once more, stage by stage.

Axes: B batch, H height, W width.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.checkpoint.trees import not_finite
from m2mkd_jax.config.defaults import MODULE_PHASES
from m2mkd_jax.data.pipeline import batch_indices, train_batches
from m2mkd_jax.jobs.plan import Kind, Plan, inputs_path
from m2mkd_jax.jobs.run import Run, image_source
from m2mkd_jax.jobs.setup import Setup
from m2mkd_jax.phases.detection import DetectionPhase
from m2mkd_jax.phases.phase import Phase
from m2mkd_jax.train.batch import prepared
from m2mkd_jax.train.step import step_keys

SHOWN = 8  # images of a batch


def where_it_began(setup: Setup, state: dict, step: int) -> str:
    """In words, to follow "at step N": the images, and the first stage, or gradient, at fault.

    The step is repeated with its own batch and random numbers, and with the weights after it, which
    it has not changed.

    Args:
        setup: of the job, in a run of a single process.
        state: the job's.
        step: its number, from 1.
    """
    phase = setup.phase
    data, recipe = phase.data, phase.recipe
    source, micro = image_source(data, "train"), recipe.batch // recipe.accumulate
    indices = batch_indices(source, data, micro, phase.seed)
    images = [int(i) for i in indices[step - 1][:SHOWN]]
    where = f" (images {', '.join(map(str, images))}{', ...' if micro > SHOWN else ''}"
    if isinstance(phase, DetectionPhase):
        return f"{where})"
    batches = train_batches(
        source,
        data,
        batch_size=micro,
        total_steps=step,
        start_step=step - 1,
        seed=phase.seed,
        views=phase.views,
    )
    try:
        batch = next(batches)
    finally:
        batches.close()
    key, prepare_keys = step_keys(jax.random.key(phase.seed), step - 1)
    ready = prepared(prepare_keys, batch, recipe, data) | {"step": jnp.asarray(step - 1)}
    found = _first_stage(setup, state, ready["image"], key) or _first_gradient(
        setup, state, ready, key
    )
    return f"{where}; {found})" if found else f"{where})"


def what_helps(run: Run, phase: Phase) -> str:
    """In words, what to change where a job diverges, and how it is started again.

    A module's own values touch no other module; where there are none, all jobs that have begun by
    the same recipe start again, since they would be refused with a changed one.

    Args:
        run: the run.
        phase: of the job.
    """
    key, (name, _, index) = f"config.{phase.recipe_key}", phase.job.partition("/")
    if name in MODULE_PHASES:
        return (
            f"lower its lr or set its clip in {key}.modules, such as {{'{index}': {{'clip': 1.0}}}}"
            f", and start the job again with --redo={phase.job}"
        )
    plan = Plan(run.config)
    begun = [n for n in plan.names if inputs_path(run.workdir, n).is_file() or n == phase.job]
    jobs = [plan.job(n) for n in begun if plan.job(n).kind is not Kind.EVALUATION]
    same = ",".join(job.name for job in jobs if job.phase.recipe_key == phase.recipe_key)
    return f"lower {key}.lr or set {key}.clip and start again with --redo={same}"


def _single(setup: Setup, state: dict) -> tuple[dict, dict]:
    """The trained parameters and the frozen stages, by single stage."""
    joined = setup.joined
    frozen = joined.single_stages(setup.frozen)
    fixed: dict[str, Any] = {part: {} for name in state["params"] for part in joined.groups[name]}
    fixed |= {joined.groups[name][0]: own for name, own in state["fixed"].items() if own}
    for name, own in fixed.items():
        frozen[name] = {**frozen.get(name, {}), "fixed": own}
    return joined.split(state["params"]), frozen


def _first_stage(setup: Setup, state: dict, images: jax.Array, key: jax.Array) -> str:
    """The first stage of the student's chain whose output is not finite; "" if all are."""
    program = setup.joined.single
    params, frozen = _single(setup, state)
    x = program.run(program.student[: program.shared], params, frozen, images.astype(program.dtype))
    names, rates = program.student[program.shared :], program.rates[program.shared :]
    for end in range(1, len(names) + 1):
        y = program.run(names[:end], params, frozen, x, rates[:end] or None, key, train=True)
        if not jnp.isfinite(y).all():
            return f"the output of {names[end - 1]} is the first that is not"
    return ""


def _first_gradient(setup: Setup, state: dict, batch: dict[str, Any], key: jax.Array) -> str:
    """The array nearest to the loss whose gradient is not finite; "" if all are.

    Nor is it known on kept targets: a step on them has no teacher.
    """
    program = setup.joined.single
    params, frozen = _single(setup, state)
    if set(program.teacher) - set(frozen):
        return ""
    grads = jax.grad(lambda params: program.loss(params, frozen, batch, key)[0])(params)
    for name in reversed(program.student):
        if name in grads and (path := not_finite(jax.tree.map(np.asarray, grads[name]))):
            return f"the gradient of {name}/{path} is not"
    return ""
