"""Which jobs train together: round by round, as many as see the same batches and fit into memory.

Each job has its own directory, and may be interrupted and gone on with by itself or with others. A
single job is a round of one.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

from m2mkd_jax.checkpoint.files import read_record
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs.data_checks import image_facts
from m2mkd_jax.jobs.evaluation import evaluator
from m2mkd_jax.jobs.joint import (
    alike,
    ended_beside,
    fitting_jobs,
    is_hybrid,
    joint_setup,
    keeps_targets,
    steps_before,
    teacher_program,
)
from m2mkd_jax.jobs.kept_targets import keep_targets, kept_inputs
from m2mkd_jax.jobs.locks import Lock, acquire
from m2mkd_jax.jobs.plan import Job, is_done, standing_on, write_inputs
from m2mkd_jax.jobs.run import Run, count_updates, total_steps
from m2mkd_jax.jobs.time_left import TimeLeft
from m2mkd_jax.jobs.training import Training
from m2mkd_jax.parallel.process import from_main, is_main, say
from m2mkd_jax.phases.initial_weights import load_stages
from m2mkd_jax.phases.phase import Phase
from m2mkd_jax.phases.weight_files import init_path


def run_training(
    run: Run,
    jobs: Sequence[Job],
    time_left: TimeLeft | None = None,
    several: bool | None = None,
    check: Callable[[list[str]], None] = lambda names: None,
) -> None:
    """Runs jobs to their ends, those that see the same batches in one program.

    Of several jobs, one that another process trains is left to it.

    Args:
        run: the run.
        jobs: that are not done.
        time_left: of the command; None: it is not said.
        several: they are some of several; None: that says their number.
        check: refuses jobs by name, once no other process can begin them any more.

    Raises:
        UserError: input that is wrong, what `check` refuses, another process at the only job, a
            diverging loss.
        Preempted: a signal arrived; the states were saved.
    """
    left, several = list(jobs), len(jobs) > 1 if several is None else several
    while left:
        candidates = alike(run, left)
        left = [job for job in left if job not in candidates]
        locks: dict[str, Lock] = {}
        try:
            free = [job for job in candidates if _lock(run, job, locks, several)]
            if free:
                check([job.name for job in free])
                left = _train_round(run, free, locks, time_left) + left
        finally:
            for lock in locks.values():
                lock.close()


def _lock(run: Run, job: Job, locks: dict[str, Lock], several: bool) -> bool:
    """Whether this process may train a job: no other one trains it, or has since.

    Args:
        run: the run.
        job: the job.
        locks: by job; closing one lets others train the job.
        several: leave a job that another process trains to it.

    Raises:
        UserError: another process trains the only job.
    """
    lock = acquire(run.directory(job.name)) if is_main() else None
    if from_main(lock is None):
        if several:
            say(f"[{job.name}] another process is running it; left to that process")
            return False
        raise UserError(
            f"{job.name}: another process is running it in {run.workdir}; wait for it, or use "
            "another --workdir"
        )
    if lock is not None:
        locks[job.name] = lock
    if from_main(is_done(run.workdir, job.name)):
        say(f"[{job.name}] done elsewhere")
        return False
    return True


def _train_round(
    run: Run, jobs: list[Job], locks: dict[str, Lock], time_left: TimeLeft | None
) -> list[Job]:
    """Trains as many of some jobs as fit into memory in one program; returns the others.

    Args:
        run: the run.
        jobs: that can train in one program.
        locks: of the jobs; they are closed as jobs end or are put off.
        time_left: as for `run_training`.
    """

    def release(name: str) -> None:
        if is_main():
            locks.pop(name).close()

    began, updates, step = time.monotonic(), count_updates(jobs[0].phase), None
    steps, chosen = steps_before(run, jobs), jobs
    beside = ended_beside(run, jobs, steps)
    if len(jobs) > 1:
        chosen, step = fitting_jobs(run, jobs, updates, beside)
    for job in jobs[len(chosen) :]:
        release(job.name)
    phases = {job.name: job.phase for job in chosen}
    for job in chosen if is_main() else ():
        write_inputs(
            run.workdir,
            job,
            weights=standing_on(run.config, run.workdir, job),
            images=image_facts(job.phase),
        )
    stages, origins = _load(run, phases)
    references = _references(run, phases, stages)
    setup = joint_setup(
        run.config, phases, stages, mesh=run.mesh, updates_per_epoch=updates, beside=beside
    )
    kept = None
    if keeps_targets(chosen[0].phase):
        dtype = setup.program.dtype.name
        inputs = {job.name: kept_inputs(job, stages, dtype) for job in chosen}
        total = max(total_steps(phase, updates) for phase in phases.values())
        kept, setup = keep_targets(run, setup, inputs, total), setup.on_kept()
    program = (*phases, *(phase.job for phase in beside))
    training = Training(run, setup, program, updates, step, began, kept, time_left)
    del stages, setup  # as jobs end, what they alone need is let go
    put_off = training.begin(steps, origins, references)
    for name in put_off:
        release(name)
    training.run(release)
    return [job for job in chosen if job.name in put_off] + jobs[len(chosen) :]


def _load(run: Run, phases: dict[str, Phase]) -> tuple[dict[str, dict], dict[str, dict]]:
    """The stages of all phases, each once, and where those of each phase come from."""
    stages: dict[str, dict] = {}
    known: dict[str, str] = {}
    origins = {}
    for job, phase in phases.items():
        missing = {name: spec for name, spec in phase.stages.items() if name not in stages}
        rest = dataclasses.replace(phase, stages=missing)
        found, origin = load_stages(run.config, run.workdir, rest, run.shardings)
        stages |= found
        shared = {name: known[name] for name in phase.stages if name in known}
        origins[job] = shared | origin
        known |= origin
    return stages, origins


def _references(
    run: Run, phases: dict[str, Phase], stages: dict[str, dict]
) -> dict[str, dict[str, float]]:
    """The accuracies by which jobs are measured: of the teachers' hybrids, or the meta model.

    Of a meta model that config.init gives none is known.
    """
    hybrids = {job: phase for job, phase in phases.items() if is_hybrid(phase)}
    references: dict[str, dict[str, float]] = {}
    if hybrids:
        program, frozen = teacher_program(run.config, hybrids, stages)
        data = next(iter(hybrids.values())).data
        metrics = evaluator(run, program, data, "validation")({}, frozen)
        for job in hybrids:
            references[job] = {"teacher_accuracy": metrics[job]["eval_accuracy"]}
    done = run.directory("pt") / "done.json"  # of this run's meta model, maybe not the one used
    own = not init_path(run.config, "pt")[1] and done.is_file()
    for job, phase in phases.items():
        if job not in hybrids:
            found = {}
            if is_main() and "pt" in phase.needs and own:
                found = {"meta_accuracy": read_record(done)["metrics"]["eval_accuracy"]}
            references[job] = from_main(found)
    return references
