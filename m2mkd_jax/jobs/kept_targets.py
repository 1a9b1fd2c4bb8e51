"""Targets that are computed once: what frozen stages give for the views of all training images.

With config.distillation.views the images of m2mkd repeat, and with them the tokens that the meta
model gives a student and the teacher's logits. They are computed before the first step, kept in the
job's directory, and deleted when the job ends.

Axes: B images of a batch.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from m2mkd_jax.checkpoint.trees import checksum
from m2mkd_jax.data.kept import KeptBatches, KeptViews, Row, ViewWriter
from m2mkd_jax.data.pipeline import view_batches
from m2mkd_jax.errors import UserError
from m2mkd_jax.files.paths import local_directory
from m2mkd_jax.jobs.joint import JointSetup, joint_setup, keeps_targets
from m2mkd_jax.jobs.plan import Job
from m2mkd_jax.jobs.run import Run, image_source
from m2mkd_jax.jobs.setup import abstract_stages
from m2mkd_jax.parallel import backend
from m2mkd_jax.parallel import mesh as meshes
from m2mkd_jax.parallel.process import say
from m2mkd_jax.train.batch import normalise

FOLDER = "views"  # in a job's directory


def kept_inputs(job: Job, stages: Mapping[str, dict], dtype: str) -> dict[str, Any]:
    """What the kept targets of a job depend on.

    Args:
        job: of m2mkd.
        stages: {name: {"params", "fixed"}} of its phase.
        dtype: of activations.
    """
    phase = job.phase
    names = dict.fromkeys([*phase.student, *phase.teacher])
    return {
        "stages": {n: checksum(stages[n]) for n in names if n not in phase.trainable},
        "data": {
            key: value
            for key, value in job.inputs["config"].items()
            if key.startswith(f"{phase.data_key}.")
        },
        "seed": phase.seed,
        "dtype": dtype,
    }


def keep_targets(
    run: Run, setup: JointSetup, inputs: Mapping[str, dict], steps: int
) -> KeptBatches:
    """The kept targets of some jobs; computes those that are not on disk.

    Args:
        run: the run.
        setup: of the jobs, with all frozen stages.
        inputs: of `kept_inputs`, by job.
        steps: of the longest job, for what is said.

    Raises:
        UserError: the disk has not enough room.
        OSError: the file system refuses.
    """
    phase = next(iter(setup.setups.values())).phase
    jobs = kept_views(run, setup, len(image_source(phase.data, "train")))
    for job, kept in jobs.items():
        if kept.begin(inputs[job]):
            say(f"[{job}] kept targets are of another teacher, seed or data: computed again")
    missing = {
        view: [job for job, kept in jobs.items() if not kept.is_whole(view)]
        for view in range(phase.views)
    }
    missing = {view: names for view, names in missing.items() if names}
    if missing:
        needed = sum(jobs[job].bytes for names in missing.values() for job in names)
        check_room(run, needed)
        _compute(run, setup, jobs, missing, needed, steps)
    return KeptBatches(jobs)


def kept_views(run: Run, setup: JointSetup, images: int) -> dict[str, KeptViews]:
    """Where the kept targets of each job lie, and their sizes, for so many training images."""
    rows: dict[str, dict[str, Row]] = {job: {"label": Row((), "int32")} for job in setup.setups}
    shapes = setup.given_shapes
    for job, arrays in rows.items():
        for name in ("tokens", "logits"):
            if f"{name}/{job}" in shapes:
                arrays[name] = _row(shapes[f"{name}/{job}"])
        if "tokens" not in arrays:
            arrays["image"] = _row(shapes["image"])
    return {
        job: KeptViews(local_directory(run.directory(job) / FOLDER), images, arrays)
        for job, arrays in rows.items()
    }


def check_disk(run: Run, jobs: Sequence[Job]) -> None:
    """Refuses jobs whose kept targets do not fit on the disk. Raises UserError."""
    phases = {job.name: job.phase for job in jobs if keeps_targets(job.phase)}
    if not phases:
        return
    stages: dict[str, dict] = {}
    for phase in phases.values():
        stages |= abstract_stages(phase)
    setup = joint_setup(run.config, phases, stages, mesh=None, updates_per_epoch=1)
    first = next(iter(phases.values()))
    kept = kept_views(run, setup, len(image_source(first.data, "train")))
    missing = [
        views.bytes
        for views in kept.values()
        for view in range(first.views)
        if not views.is_whole(view)
    ]
    check_room(run, sum(missing))


def check_room(run: Run, needed: int) -> int:
    """The bytes that are free where a run lies. Raises UserError: fewer than are needed."""
    directory = place = local_directory(run.workdir)
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise UserError(
            f"config.distillation.views: the targets of all views take {needed / 2**30:.2f} GiB, "
            f"and {directory} has {free / 2**30:.2f} GiB left; lower views or data.train_images, "
            "or set config.distillation.keep_targets=False"
        )
    return free


def _row(batch: jax.ShapeDtypeStruct) -> Row:
    """What an array holds for one image, from its shape for a batch."""
    return Row(tuple(batch.shape[1:]), np.dtype(batch.dtype).name)


def _compute(
    run: Run,
    setup: JointSetup,
    jobs: Mapping[str, KeptViews],
    missing: Mapping[int, list[str]],
    needed: int,
    steps: int,
) -> None:
    """Writes the views that are missing, {view: jobs}, batch by batch."""
    first = next(iter(setup.setups.values()))
    phase, recipe = first.phase, first.phase.recipe
    source, batch_size = image_source(phase.data, "train"), recipe.batch // recipe.accumulate
    told = False
    for view, names in missing.items():
        targets = _targets_of(run, setup.only(names))
        start = min(jobs[job].safe_rows(view) for job in names)
        writers = {job: ViewWriter(jobs[job], view, start) for job in names}
        batches = view_batches(
            source, phase.data, view=view, batch_size=batch_size, start=start, seed=phase.seed
        )
        try:
            for batch in batches:
                if not told:
                    told = True
                    batches_left = -(-len(source) // batch_size) * len(missing)
                    _announce(run, names, needed, _seconds(targets, batch), batches_left, steps)
                rows = targets(batch)
                for job, writer in writers.items():
                    writer.append(rows[job])
            for writer in writers.values():
                writer.finish()
        finally:
            batches.close()
            for writer in writers.values():
                writer.close()


def _targets_of(run: Run, setup: JointSetup) -> Callable[[dict], dict[str, dict]]:
    """A batch from the host -> the rows of its images, by job and name."""
    first = next(iter(setup.setups.values()))
    data, program, frozen = first.phase.data, setup.program, setup.frozen

    def given(frozen: dict, images: jax.Array) -> dict:
        return program.given(frozen, normalise(images, data.mean, data.std))

    compiled = backend.jit(first.on_mesh(given))

    def targets(batch: dict) -> dict[str, dict]:
        placed = meshes.put_batch(run.mesh, {"image": batch["image"]})
        outputs = jax.device_get(compiled(frozen, placed["image"]))
        for job, rows in outputs.items():
            rows["label"] = batch["label"]
            if not program.programs[job].shared:
                rows["image"] = batch["image"]
        return outputs

    return targets


def _seconds(targets: Callable[[dict], dict], batch: dict) -> float:
    """Seconds that a batch takes, once its program is compiled."""
    targets(batch)
    began = time.perf_counter()
    targets(batch)
    return time.perf_counter() - began


def _announce(
    run: Run, names: list[str], needed: int, seconds: float, batches: int, steps: int
) -> None:
    """Says what is computed, in how much time and room, and in place of what."""
    directory = local_directory(run.workdir)
    free = shutil.disk_usage(directory).free
    say(
        f"[{', '.join(names)}] targets are kept in {directory}: {needed / 2**30:.2f} GiB of "
        f"{free / 2**30:.1f} GiB; about {seconds * batches:.0f} s to compute, in place of "
        f"{seconds * steps:.0f} s in training"
    )
