"""What a command asks for by --only, --redo and --extend, and what it refuses of them."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from m2mkd_jax.errors import UserError, require
from m2mkd_jax.jobs.changes import check_not_running, jobs_to_extend
from m2mkd_jax.jobs.data_checks import measured_images, missing_data
from m2mkd_jax.jobs.plan import (
    Kind,
    Plan,
    inputs_path,
    is_done,
    jobs_to_run,
    read_inputs,
    stale_after,
)
from m2mkd_jax.parallel.process import from_main, say


@dataclass(frozen=True)
class Choice:
    """The jobs that a command is about.

    Attributes:
        chosen: those that --only names, in their order; by default all.
        stale: those that start again.
        extended: those that go on with raised epochs.
        todo: those of `chosen` that are to run.
    """

    chosen: list[str]
    stale: list[str]
    extended: list[str]
    todo: list[str]

    @property
    def again(self) -> list[str]:
        """Those that start again or go on, whose results are dropped before."""
        return [*self.stale, *self.extended]


def choose(plan: Plan, workdir: Path, only: str, redo: str, extend: str) -> Choice:
    """The jobs that a command is about.

    Args:
        plan: of the run.
        workdir: its directory.
        only, redo, extend: names of jobs, "a,b"; "": all, none, none.

    Raises:
        UserError: one line that names the flag and the job.
    """
    chosen = plan.select(only)
    stale = from_main(stale_after(workdir, plan.select(redo, "--redo"))) if redo else []
    # Those of phases that the config no longer has cannot be named, and are not made again.
    left_out = ", ".join(name for name in stale if name in plan.names and name not in chosen)
    require(
        not left_out,
        f"--redo={redo} drops {left_out} too, which --only={only} leaves out; name all there",
    )
    measured = [n for n in chosen if n not in stale and plan.job(n).kind is Kind.EVALUATION]
    for name in measured:
        if from_main(_has_other_images(plan, workdir, name)):
            say(f"[{name}] the images are not those that were measured; they are measured again")
            stale.append(name)
    asked = plan.select(extend, "--extend") if extend else []
    extended = from_main(jobs_to_extend(plan, workdir, asked))
    check_not_running(workdir, [*stale, *extended])
    for name in extended:
        require(name in chosen, f"--extend={name}: --only={only} leaves it out; name it there too")
    todo = from_main(jobs_to_run(plan, workdir, only, [*stale, *extended]))
    return Choice(chosen, stale, extended, todo)


def _has_other_images(plan: Plan, workdir: Path, name: str) -> bool:
    """Whether a finished job has measured others than the images that are there now.

    Images that are gone are not others: what is done is done.
    """
    path = inputs_path(workdir, name)
    if not (is_done(workdir, name) and path.is_file()) or missing_data(plan, [name]):
        return False
    before = read_inputs(workdir, name)[1]["images"]
    with contextlib.suppress(UserError):
        now = measured_images(plan.job(name).phases) if before else {}
        return any(now.get(key, known) != known for key, known in before.items())
    return False
