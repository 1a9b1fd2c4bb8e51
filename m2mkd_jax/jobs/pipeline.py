"""The jobs in order: finished ones skipped, an interrupted one resumed, a summary at the end."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m2mkd_jax.checkpoint.files import write_json
from m2mkd_jax.checkpoint.steps import latest_step
from m2mkd_jax.config.defaults import MODULE_PHASES
from m2mkd_jax.data.workers import end_in_worker
from m2mkd_jax.errors import UserError, require
from m2mkd_jax.files.paths import (
    as_path,
    check_bucket,
    local_directory,
    remove_tree,
)
from m2mkd_jax.jobs import checks
from m2mkd_jax.jobs.agreement import check_same_data, check_same_directory, check_same_start
from m2mkd_jax.jobs.changes import check_same_config, raised_epochs
from m2mkd_jax.jobs.choice import Choice, choose
from m2mkd_jax.jobs.evaluation import run_evaluation
from m2mkd_jax.jobs.few_shot import run_few_shot
from m2mkd_jax.jobs.plan import (
    Job,
    Kind,
    Plan,
    is_current,
    is_done,
)
from m2mkd_jax.jobs.rounds import run_training
from m2mkd_jax.jobs.run import Run
from m2mkd_jax.jobs.summary import CONFIG, summarise
from m2mkd_jax.jobs.time_left import TimeLeft
from m2mkd_jax.parallel import watchdog
from m2mkd_jax.parallel.compilation_cache import enable_compilation_cache
from m2mkd_jax.parallel.mesh import make_mesh, spanning_groups, warm_up_collectives
from m2mkd_jax.parallel.process import barrier, from_main, is_main, say
from m2mkd_jax.phases.weight_files import job_directory
from m2mkd_jax.train.stops import EvaluationStopped, Preempted

STOPPED = "stopped by a signal; finished jobs and checkpoints are kept"
RUNNERS: dict[Kind, Callable[[Run, Job], dict]] = {
    Kind.FEW_SHOT: run_few_shot,
    Kind.EVALUATION: run_evaluation,
}


def run(
    config: ConfigDict, workdir: str | Path, only: str = "", redo: str = "", extend: str = ""
) -> dict[str, Any]:
    """Runs every job that is not done and returns the summary (also in workdir/summary.json).

    Args:
        config: from a config file.
        workdir: directory of the run.
        only: the jobs to run, "a,b"; by default all.
        redo: jobs to start again, with all that stand on them.
        extend: jobs to go on with, finished or not, because their epochs were raised.

    Raises:
        UserError: before any work where the input is wrong.
        Preempted: a signal arrived; the same command goes on from there.
    """
    end_in_worker()
    _check_arguments(config, workdir, only=only, redo=redo, extend=extend)
    workdir = as_path(workdir)
    check_bucket(workdir)
    check_same_start(config, {"--only": only, "--redo": redo, "--extend": extend})
    watchdog.start(config.watchdog_seconds)
    mesh = make_mesh(data=config.mesh.data, expert=config.mesh.expert)
    plan = checks.validate(config, mesh.size)
    warm_up_collectives(mesh)
    choice = choose(plan, workdir, only, redo, extend)
    chosen, todo = choice.chosen, choice.todo
    checks.validate_jobs(plan, workdir, mesh, todo, choice.stale, choice.extended)
    check_same_data(plan, todo)
    if spanning_groups(mesh) > 1:
        say(
            f"mesh: a group of {config.mesh.expert} devices lies in {spanning_groups(mesh)} "
            "processes; its tokens cross the network between them"
        )
    check_same_directory(workdir)
    _prepare(plan, workdir, choice.stale, choice.extended)
    enable_compilation_cache()
    this = Run(config, workdir, mesh)
    time_left = TimeLeft.of(plan, _counted(plan, chosen, workdir, todo), workdir)
    try:
        _run_jobs(this, plan, choice, time_left)
    except BaseException as error:
        with contextlib.suppress(OSError, UserError):  # what ended the run is what is told
            summarise(plan, workdir)
        if isinstance(error, EvaluationStopped):  # outside of training
            raise Preempted(STOPPED) from None
        raise
    return summarise(plan, workdir)


def _run_jobs(this: Run, plan: Plan, choice: Choice, time_left: TimeLeft) -> None:
    """Does the jobs that are to be done, phase by phase."""
    workdir, todo = this.workdir, choice.todo

    def check(names: list[str]) -> None:
        """Others may have begun or made them since, or what they stand on, and otherwise."""
        check_same_config(plan, workdir, names, (), choice.extended)

    for names in _phases(choice.chosen):
        check([n for n in names if n in todo])
        jobs = [plan.job(name) for name in names if _is_open(plan, workdir, name, todo)]
        if jobs and jobs[0].kind is Kind.TRAINING:
            several = _has_siblings(jobs[0], todo)
            run_training(this, jobs, time_left, several=several, check=check)
            continue
        for job in jobs:
            RUNNERS[job.kind](this, job)


def _check_arguments(config: Any, workdir: Any, **jobs: Any) -> None:
    """Refuses arguments of `run` of another type. Raises UserError."""
    kind = type(config).__name__
    require(isinstance(config, ConfigDict), f"run: config is a {kind}, no ConfigDict")
    is_path = isinstance(workdir, str | os.PathLike)
    require(is_path, f"run: workdir is {workdir!r}; give the path of a directory")
    for name, value in jobs.items():
        message = f'run: {name} is {value!r}; give names with commas between them: "pt,mt/0"'
        require(isinstance(value, str), message)


def _phases(names: list[str]) -> list[list[str]]:
    """Jobs in their order, those of one phase's modules together."""
    module = lambda name: name.partition("/")[0] in MODULE_PHASES and name.partition("/")[0]
    return [list(group) for _, group in itertools.groupby(names, lambda n: module(n) or n)]


def _has_siblings(job: Job, todo: list[str]) -> bool:
    """Whether others of its phase, which do not stand on it, are to be done beside a job."""
    phase = job.name.partition("/")[0]
    return sum(name.partition("/")[0] == phase for name in todo) > 1


def _counted(plan: Plan, chosen: list[str], workdir: Path, todo: list[str]) -> list[str]:
    """The jobs of a command that are done or to be done; the others are not needed any more."""
    return from_main([n for n in chosen if n in todo or is_done(workdir, n)])


def _is_open(plan: Plan, workdir: Path, name: str, todo: list[str]) -> bool:
    """Whether a job is still to be done; says so where it is not.

    Another process may have done it since this one began: with --only they share a directory.
    """
    done = from_main(is_current(plan, workdir, name))
    if name not in todo:
        say(f"[{name}] done already" if done else f"[{name}] not needed any more")
    elif done:
        say(f"[{name}] done elsewhere")
    return name in todo and not done


def _prepare(plan: Plan, workdir: Path, stale: list[str], extended: list[str]) -> None:
    """Drops jobs that are done again, and keeps the config.

    Jobs that are extended lose their results alone, and go on from their checkpoints.
    """
    if is_main():
        # What stands on others goes first: a kill in between leaves no job on a base that is gone.
        for name in reversed(stale):
            remove_tree(job_directory(workdir, name))
            remove_tree(local_directory(job_directory(workdir, name)))
        for name in extended:
            old, new = raised_epochs(plan, workdir, name) or (0.0, 0.0)
            step = latest_step(job_directory(workdir, name) / "checkpoints")
            say(
                f"[{name}] extended from {old:g} to {new:g} epochs from step {step} on, where its "
                "learning rate is the one of a schedule over all of them"
            )
            (job_directory(workdir, name) / "done.json").unlink(missing_ok=True)
        write_json(workdir / CONFIG, json.loads(plan.config.to_json()))
    if stale or extended:
        barrier("jobs that are done again are dropped")
