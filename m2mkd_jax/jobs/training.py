"""A job that trains: from its phase to finished weights, resuming what was interrupted."""

from __future__ import annotations

import contextlib
import fcntl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from m2mkd_jax.checkpoint.files import read_record, write_record
from m2mkd_jax.checkpoint.store import RunCheckpoints, save_weights
from m2mkd_jax.data.pipeline import first_images, train_batches
from m2mkd_jax.data.preview import caption, draw_grid
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs.evaluation import evaluator
from m2mkd_jax.jobs.log import Log
from m2mkd_jax.jobs.plan import Job, write_inputs
from m2mkd_jax.jobs.setup import (
    Run,
    Setup,
    count_updates,
    frozen_program,
    image_source,
    set_up,
)
from m2mkd_jax.parallel import mesh as meshes
from m2mkd_jax.parallel.process import barrier, from_main, is_main, say
from m2mkd_jax.phases.initial_weights import load_stages
from m2mkd_jax.phases.phase import Phase
from m2mkd_jax.train.loop import Loop, Preempted
from m2mkd_jax.train.step import evaluated_params, prepare, with_fixed


def draw_images(
    path: Path, train: Any, data: ConfigDict, recipe: ConfigDict, micro: int, seed: int
) -> None:
    """Draws 16 images as the first step sees them, erased and mixed (among the 16), with labels."""
    batch = first_images(train, data, batch_size=micro, seed=seed)
    keys = tuple(jax.random.split(jax.random.key(seed)))
    images, targets = jax.jit(lambda keys, batch: prepare(keys, batch, recipe, data))(keys, batch)
    pixels = 255 * (np.asarray(images) * np.array(data.std) + np.array(data.mean))
    shares = (np.asarray(targets) - recipe.smoothing / data.classes) / (1 - recipe.smoothing)
    captions = [caption(share, train.class_names) for share in shares]
    draw_grid(pixels.round().clip(0, 255).astype(np.uint8), captions).save(path)


@contextlib.contextmanager
def _locked(run: Run, job: str) -> Iterator[Path]:
    """The job's directory, while no other process trains in it. Raises UserError: one does."""
    directory = run.directory(job)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        if is_main():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"{job}: another process is running it in {run.workdir}; wait for it, or use "
                    "another --workdir"
                ) from None
        yield directory


def run_training(run: Run, job: Job) -> dict:
    """Runs a training job to its end and returns its result (also in JOB/done.json).

    Raises:
        UserError: input that is wrong, another process at the same job, a diverging loss.
        Preempted: a signal arrived; the state was saved.
    """
    with _locked(run, job.name) as directory:
        began, phase = time.monotonic(), job.phase
        if is_main():
            write_inputs(run.workdir, job)
        stages, origin = load_stages(run.config, run.workdir, phase, run.shardings)
        updates = count_updates(phase)
        reference = _reference(run, phase, stages)
        setup = set_up(run.config, phase, stages, mesh=run.mesh, updates_per_epoch=updates)
        del stages
        _describe_inputs(setup, directory)
        state, metrics, steps = _train(run, setup, updates, directory, reference)
        metrics = {**metrics, **reference}
        _save(setup, directory, state, steps, metrics)
        result = {
            "name": job.name,
            "status": "done",
            "steps": steps,
            "seconds": round(time.monotonic() - began, 2),
            "metrics": metrics,
            "origin": origin,
        }
        if is_main():
            write_record(directory / "done.json", result)
        barrier(f"{job.name} done")
        say(
            f"[{job.name}] done in {result['seconds']:.1f} s, accuracy "
            f"{metrics['eval_accuracy']:.4f}"
        )
        return result


def _reference(run: Run, phase: Phase, stages: dict) -> dict[str, float]:
    """The accuracy that a hybrid is measured by: its teacher's hybrid, or the meta model's."""
    if phase.teacher and len(phase.trainable) < len(phase.student):
        program, frozen = frozen_program(run.config, phase, phase.teacher, stages)
        metrics = evaluator(run, program, phase.data)({}, frozen)
        return {"teacher_accuracy": metrics["eval_accuracy"]}
    done = run.directory("pt") / "done.json"
    found = {}
    if is_main() and "pt" in phase.needs and done.is_file():
        found = {"meta_accuracy": read_record(done)["metrics"]["eval_accuracy"]}
    return from_main(found)


def _describe_inputs(setup: Setup, directory: Path) -> None:
    """Leaves the list of trained parameters and a picture of the first images."""
    if not is_main():
        return
    shapes = jax.eval_shape(setup.joined.split, setup.params)
    overview = parameter_overview.get_parameter_overview(shapes, include_stats=False)
    (directory / "parameters.txt").write_text(overview + "\n")
    phase, picture = setup.phase, directory / "images.png"
    if not picture.is_file():
        recipe = phase.recipe
        micro, train = recipe.batch // recipe.accumulate, image_source(phase.data, "train")
        draw_images(picture, train, phase.data, recipe, micro, phase.seed)


def _stop_rule(phase: Phase, reference: dict[str, float]) -> Callable[[dict], bool] | None:
    """metrics -> whether the hybrid is near enough to its reference; None: never stop early."""
    target = reference.get("teacher_accuracy", reference.get("meta_accuracy"))
    if not phase.recipe.stop_within or target is None:
        return None
    return lambda metrics: metrics["eval_accuracy"] >= target - phase.recipe.stop_within


def _train(
    run: Run, setup: Setup, updates: int, directory: Path, reference: dict[str, float]
) -> tuple[dict, dict, int]:
    """The loop, from the newest checkpoint on: final state, last evaluation, steps."""
    config, phase = run.config, setup.phase
    recipe, data, frozen = phase.recipe, phase.data, setup.frozen
    total = round(recipe.epochs * updates) * recipe.accumulate
    checkpoints = RunCheckpoints(directory / "checkpoints")
    start, restored = 0, checkpoints.restore_latest(setup.abstract_state)
    if restored:
        start, state = restored
        say(f"[{phase.job}] resumed at step {start}/{total}")
    else:
        state = setup.initial_state()
    log = Log(directory / "metrics.jsonl", phase.job, total, start)
    metrics_of = evaluator(run, setup.program, data)
    every = config.evaluation.every  # at least a batch, however small a part of an epoch
    batches = train_batches(
        image_source(data, "train"),
        data,
        batch_size=recipe.batch // recipe.accumulate,
        total_steps=max(total, start + 1),
        start_step=start,
        seed=phase.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    loop = Loop(
        name=phase.job,
        step=setup.make_step(),
        frozen=frozen,
        total_steps=total,
        log_every=config.log_every,
        evaluate_every=every and max(round(every * updates), 1) * recipe.accumulate,
        evaluate=lambda s: metrics_of(evaluated_params(s), with_fixed(frozen, s["fixed"])),
        log=log,
        save=checkpoints.save,
        save_seconds=60.0 * config.checkpoint_minutes,
        stop=_stop_rule(phase, reference),
        learning_rate=setup.rate,
        accumulate=recipe.accumulate,
    )
    try:
        placed = (meshes.put_batch(run.mesh, batch) for batch in batches)
        finished = loop.run(state, placed, start)
    except Preempted:
        checkpoints.close()
        raise
    finally:
        batches.close()
        log.close()
    # Not after an error, which may have come to this process alone: it would wait for the others.
    checkpoints.close()
    return finished


def _save(setup: Setup, directory: Path, state: dict, steps: int, metrics: dict) -> None:
    """The finished weights, with what they are."""
    phase, params = setup.phase, setup.joined.split(evaluated_params(state))
    trees = {}
    for name in phase.trainable:
        trees[name] = {"params": params[name]}
        if state["fixed"].get(name):
            trees[name]["fixed"] = state["fixed"][name]
    description = {**phase.describe, "job": phase.job, "step": steps, "metrics": metrics}
    data = phase.data
    description["normalisation"] = {"mean": list(data.mean), "std": list(data.std)}
    save_weights(directory / "weights", trees, description)
