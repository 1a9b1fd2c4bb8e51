"""Which checkpoints jobs have, and from which of them jobs of one program go on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from m2mkd_jax.checkpoint.checksums import saved_jobs
from m2mkd_jax.files.paths import as_path, file_names, in_bucket

_COMMITTED = "commit_success.txt"  # Orbax's, in a checkpoint in a bucket that is whole


def saved_steps(directory: str | os.PathLike) -> list[int]:
    """The steps of the checkpoints in a directory of `RunCheckpoints`, from the oldest on."""
    path = as_path(directory)
    if in_bucket(path):  # where a directory has its name before all is in it
        whole = [name.split("/") for name in file_names(path) if name.endswith(f"/{_COMMITTED}")]
        names = [parts[0] for parts in whole if len(parts) == 2]
    else:
        names = [entry.name for entry in path.iterdir()] if path.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal())


def latest_step(directory: str | os.PathLike) -> int:
    """Steps taken before the newest checkpoint in a directory of `RunCheckpoints`; 0: none."""
    return max(saved_steps(directory), default=0)


def common_steps(directories: Mapping[str, Path]) -> dict[str, int]:
    """The step that each of some jobs goes on from: that of its newest checkpoint, or 0.

    A process may be killed when some of the jobs of its program have saved a step and others have
    not. These jobs go on from the newest step that all of them have, since they repeat their
    training to the bit only in the same program. No job goes back by more than one checkpoint: one
    that has since gone on without the others goes on from its newest.

    Args:
        directories: of `RunCheckpoints`, by job.
    """
    steps = {job: saved_steps(directory) for job, directory in directories.items()}
    together = {
        job: saved_jobs(directories[job] / str(steps[job][-1]) / "state", "together")
        for job in steps
        if steps[job]
    }
    recent = {job: {*own[-2:], *([] if own[1:] else [0])} for job, own in steps.items()}

    def partners(job: str) -> list[str]:
        return [
            other
            for other in together.get(job, ())
            # One without a checkpoint was killed before its first, or starts over by itself.
            if job in together.get(other, ()) or (steps.get(other) == [] and len(steps[job]) == 1)
        ]

    common = {}
    for job, own in steps.items():
        shared = recent[job].intersection(*(recent[other] for other in partners(job)))
        common[job] = max(shared, default=max(own, default=0))
    return common


def program_jobs(directories: Mapping[str, Path], steps: Mapping[str, int]) -> list[str]:
    """The jobs that the programs were made for in which some jobs have trained.

    Args:
        directories: of `RunCheckpoints`, by job.
        steps: of the checkpoints from which the jobs go on; 0: from none.
    """
    states = [directories[job] / str(step) / "state" for job, step in steps.items() if step]
    return sorted({job for state in states for job in saved_jobs(state, "program")})
