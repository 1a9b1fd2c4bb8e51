"""What may change between two runs in one directory: the config, and epochs that are raised."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from pathlib import Path

from m2mkd_jax.checkpoint.files import read_record
from m2mkd_jax.checkpoint.steps import latest_step
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs.locks import is_held
from m2mkd_jax.jobs.plan import (
    EPISODES,
    NEUTRAL,
    Kind,
    Plan,
    inputs_path,
    is_done,
    is_harmless,
    read_inputs,
    standing_on,
)
from m2mkd_jax.parallel.process import from_main, is_main
from m2mkd_jax.phases.weight_digests import NETWORK, changed
from m2mkd_jax.phases.weight_files import init_path, job_directory


def raised_epochs(plan: Plan, workdir: Path, name: str) -> tuple[float, float] | None:
    """The epochs of a job in a directory and in the config, where raised epochs alone differ."""
    path, job = inputs_path(workdir, name), plan.job(name)
    if job.kind is not Kind.TRAINING or not path.is_file():
        return None
    (before, _), key = read_inputs(workdir, name), f"{job.phase.recipe_key}.epochs"
    if before.get("needs") != job.inputs["needs"]:
        return None
    old, new = before.get("config", {}), job.inputs["config"]
    if {**old, key: None} != {**new, key: None} or not old.get(key, math.inf) < new[key]:
        return None
    return old[key], new[key]


def jobs_to_extend(plan: Plan, workdir: Path, names: Iterable[str]) -> list[str]:
    """Those of some jobs that are yet to go on with raised epochs.

    A job whose `inputs.json` is that of the config has gone on already: the same command, given
    again, goes on with it.

    Args:
        plan: of the config that is given.
        workdir: the run's directory.
        names: jobs that are to train for more epochs.

    Raises:
        UserError: the epochs of a job are not raised, other values are changed too, or it has no
            checkpoint; one line that names the job.
    """
    found = []
    for name in names:
        job, directory = plan.job(name), job_directory(workdir, name)
        if job.kind is not Kind.TRAINING:
            raise UserError(f"--extend={name}: only a job that trains a network can be extended")
        path = inputs_path(workdir, name)
        if path.is_file() and read_inputs(workdir, name)[0] == job.inputs:
            continue
        if raised_epochs(plan, workdir, name) is None:
            raise UserError(
                f"--extend={name}: raise config.{job.phase.recipe_key}.epochs above that in "
                f"{path}, and change nothing else that {name} depends on"
            )
        if not latest_step(directory / "checkpoints"):
            raise UserError(
                f"--extend={name}: {directory} has no checkpoint to go on from; --redo={name} "
                "starts it again"
            )
        found.append(name)
    return found


def check_not_running(workdir: Path, names: Iterable[str]) -> None:
    """Refuses to start jobs again, or to go on with them otherwise, under a process that runs them.

    Args:
        workdir: the run's directory.
        names: the jobs.

    Raises:
        UserError: names the first job that another process runs.
    """
    for name in names:
        if from_main(is_main() and is_held(job_directory(workdir, name))):
            raise UserError(
                f"{name}: another process is running it in {workdir}; stop that one first, or wait "
                "for it"
            )


def check_same_config(
    plan: Plan,
    workdir: Path,
    names: Iterable[str],
    stale: Collection[str] = (),
    extended: Collection[str] = (),
) -> None:
    """Refuses a config that another result of these jobs, or of those they need, came from.

    Args:
        plan: of the config that is given.
        workdir: the run's directory.
        names: jobs that are to be kept, gone on with, or built on.
        stale: jobs that start again.
        extended: jobs that train for more epochs (`jobs_to_extend`).

    Raises:
        UserError: names the first job, and the key of the config that has changed.
    """
    for name in plan.closure(names):
        path, job = inputs_path(workdir, name), plan.job(name)
        # What is measured anew loses nothing.
        if name in (*stale, *extended) or job.kind is Kind.EVALUATION:
            continue
        hint = f"--redo={name} does it and what stands on it again; or use another --workdir"
        if not path.is_file():
            if is_done(workdir, name) or _has_begun(path.parent):
                raise UserError(
                    f"{path} is missing, so that what {name} came from is unknown; {hint}"
                )
            continue
        before, _ = read_inputs(workdir, name)
        if epochs := raised_epochs(plan, workdir, name):
            hint = f"--extend={name} goes on with it to {epochs[1]:g} epochs; {hint}"
        for key in sorted({*before["config"], *job.inputs["config"]}):
            left_out = NEUTRAL.get(key.rpartition(".")[2])
            neutral = left_out if is_harmless(key, left_out) else None
            old, new = (inputs["config"].get(key, neutral) for inputs in (before, job.inputs))
            if old != new:
                raise UserError(
                    f"{workdir}: {name} was made with config.{key} = {old!r}, not {new!r}; {hint}"
                )
        for needed in sorted({*before["needs"], *job.inputs["needs"]}):
            if before["needs"].get(needed) != job.inputs["needs"].get(needed):
                raise UserError(f"{workdir}: {name} stands on another {needed}; {hint}")
    check_same_weights(plan, workdir, names, {*stale, *extended})


def _has_begun(directory: Path) -> bool:
    """Whether an unfinished job has left what it would go on from."""
    return bool(latest_step(directory / "checkpoints")) or (directory / EPISODES).is_file()


def check_finished(workdir: Path, name: str) -> None:
    """Refuses to stand on a job of this run without a result, or on weights of another result.

    Raises:
        UserError: one line that names the job.
    """
    if not is_done(workdir, name):  # weights alone are of a job that goes on
        raise UserError(f"{workdir}: job {name} is not done; run it first")
    directory = job_directory(workdir, name)
    made = read_record(directory / "weights" / "description.json").get("description", {})
    metrics = read_record(directory / "done.json")["metrics"]
    if made.get("job", name) != name or made.get("metrics", metrics) != metrics:
        raise UserError(
            f"{directory / 'weights'} are not those that {name} ended with, as its done.json has "
            f"it; restore them, or --redo={name} does it and what stands on it again"
        )


def check_same_weights(
    plan: Plan, workdir: Path, names: Iterable[str], again: Collection[str] = ()
) -> None:
    """Refuses jobs that stand on other weights than those that are there now.

    Args:
        plan: of the config that is given.
        workdir: the run's directory.
        names: jobs that are to be kept, gone on with, or built on.
        again: those of them, and of what they need, that change now.

    Raises:
        UserError: names the first job, and what it stands on.
    """
    for name in plan.closure(names):
        job = plan.job(name)
        known = inputs_path(workdir, name).is_file() and job.kind is not Kind.EVALUATION
        if name in again or not known:
            continue
        before, now = read_inputs(workdir, name)[1], standing_on(plan.config, workdir, job)
        for needed in changed(before["weights"], now):
            field = needed if needed == NETWORK else f"init.{init_path(plan.config, needed)[0]}"
            given = needed == NETWORK or init_path(plan.config, needed)[1]
            raise UserError(
                f"{workdir}: {name} stands on other weights of {needed} than "
                f"{f'config.{field}' if given else job_directory(workdir, needed)} has now; "
                f"restore them, or --redo={name} does it and what stands on it again"
            )
