"""Accuracy: on validation images in training, on test images of finished networks."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import renditions_data
from m2mkd_jax.data.channels import image_shape
from m2mkd_jax.data.class_lists import PARENTS
from m2mkd_jax.data.pipeline import eval_batches
from m2mkd_jax.evaluate.accuracy import evaluate, make_counter
from m2mkd_jax.evaluate.corruptions import KINDS, SEVERITIES, corrupt
from m2mkd_jax.evaluate.flops import count_flops
from m2mkd_jax.evaluate.label_spaces import positions, restricted
from m2mkd_jax.files.paths import make_directory
from m2mkd_jax.jobs.data_checks import measured_images
from m2mkd_jax.jobs.detection import measure_detector, said
from m2mkd_jax.jobs.finished import run_of, write_result
from m2mkd_jax.jobs.plan import Job, standing_on, write_inputs
from m2mkd_jax.jobs.run import Run, has_test_images, image_source
from m2mkd_jax.jobs.setup import frozen_program, make_program
from m2mkd_jax.models import chain
from m2mkd_jax.parallel import backend, partition
from m2mkd_jax.parallel import mesh as meshes
from m2mkd_jax.parallel.process import barrier, interrupted, is_main, reached, say, union
from m2mkd_jax.phases.build import END_TO_END
from m2mkd_jax.phases.detection import DetectionPhase, DetectionProgram
from m2mkd_jax.phases.families import students
from m2mkd_jax.phases.initial_weights import load_stage
from m2mkd_jax.phases.joint import JointProgram
from m2mkd_jax.phases.phase import Phase, WeightsFrom
from m2mkd_jax.phases.program import Program
from m2mkd_jax.train.batch import normalise
from m2mkd_jax.train.stops import EvaluationStopped

SEEN = 200  # validation images that a network is observed on before parts of it are removed
# (uint8 images, key, number of the first) -> uint8 images.
Corruption = Callable[[jax.Array, jax.Array, int], jax.Array]


def evaluator(
    run: Run, program: Program | JointProgram, data: ConfigDict, split: str = "test"
) -> Callable[..., dict]:
    """(trainable, frozen) -> metrics over a whole split, every undamaged image once.

    What looks at the images to choose something takes the split 'validation' (data/sources.py).

    Its third argument changes the images before they are normalised; None: as they are.

    Those of a joint program are by job. On renditions only the logits of their classes compete.
    """
    config, mesh, images = run.config, run.mesh, image_source(data, split)
    logits = meshes.with_mesh(mesh, program.logits)
    if data.name in PARENTS:
        logits = restricted(logits, positions(data.name))
    count = make_counter(logits, data.mean, data.std, meshes.replicated(mesh))
    batch = evaluation_batch(config, len(images), mesh)

    def measure(trainable: dict, frozen: dict, change: Corruption | None = None) -> dict:
        batches = eval_batches(
            images,
            data,
            batch_size=batch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        placed = (meshes.put_batch(mesh, b) for b in until_interrupted(batches))
        key = jax.random.key(config.seed)
        if change is not None:
            placed = (
                {**b, "image": change(b["image"], key, i * batch)} for i, b in enumerate(placed)
            )
        metrics = evaluate(count, trainable, frozen, placed, key, len(images))
        batches.note_others(union)
        return metrics

    return measure


def until_interrupted(batches: Iterable[dict]) -> Iterator[dict]:
    """The batches of an evaluation. Raises EvaluationStopped where a signal arrives."""
    for batch in batches:
        if interrupted():
            raise EvaluationStopped
        reached()
        yield batch


def evaluation_batch(config: ConfigDict, images: int, mesh: jax.sharding.Mesh) -> int:
    """Images of an evaluation's batches, a multiple of the devices."""
    return -(-min(config.evaluation.batch, images) // mesh.size) * mesh.size


def run_evaluation(run: Run, job: Job) -> dict:
    """Measures networks from their finished weights, each on its test split.

    Returns:
        The job's result (also in its done.json): `networks` has the metrics of each, `splits` says
        which images they were measured on.
    """
    began = time.monotonic()
    if is_main():
        directory = run.directory(job.name)
        make_directory(directory)
        write_inputs(
            run.workdir,
            job,
            weights=standing_on(run.config, run.workdir, job),
            images=measured_images(job.phases),
        )
        own = run_of(directory / "inputs.json")["id"]
    metrics = {phase.job: _measure(run, phase) for phase in job.phases}
    first = metrics.get("e2e", next(iter(metrics.values()), {}))
    result = {
        "name": job.name,
        "status": "done",
        "steps": 0,
        "seconds": round(time.monotonic() - began, 2),
        "metrics": {k: v for k, v in first.items() if k == "eval_accuracy"},
        "networks": metrics,
        "splits": {p.job: "test" if has_test_images(p.data) else "validation" for p in job.phases},
    }
    if is_main():
        write_result(directory, own, result)
    barrier(f"{job.name} done")
    return result


def load_network(run: Run, phase: Phase) -> dict[str, dict]:
    """{"params", "fixed"} by stage of the chain that a phase has trained, placed on the devices."""
    stages = {}
    for name in phase.student:
        spec = phase.stages[name]
        job = phase.job if name in phase.trainable else spec.weights.job
        stages[name] = load_stage(
            run.config, run.workdir, WeightsFrom("job", job, name), chain.abstract(spec.build)
        )
    return partition.put(stages, run.shardings(stages))


def _measure(run: Run, phase: Phase) -> dict:
    """Metrics of the network that a phase trained, and of whatever config.evaluation adds."""
    config, stages = run.config, load_network(run, phase)
    if isinstance(phase, DetectionPhase):
        program = make_program(config, phase)
        assert isinstance(program, DetectionProgram)
        metrics = measure_detector(run, phase, program, stages)
        say(f"[eval] {phase.job}: {said(metrics)}")
        return metrics
    program, frozen = frozen_program(config, phase, phase.student, stages)
    reduce = config.evaluation.reductions and phase.job in END_TO_END
    stages = stages if reduce else {}
    measure = evaluator(run, program, phase.data)
    metrics = measure({}, frozen)
    for name in config.evaluation.renditions if phase.data == config.data else ():
        renditions = evaluator(run, program, renditions_data(config, name))({}, frozen)
        metrics[f"{name}_accuracy"] = renditions["eval_accuracy"]
    metrics |= _corrupted(config, functools.partial(measure, {}, frozen))
    if reduce:
        metrics["reductions"] = reductions(run, phase, stages, program, frozen)
    damaged = metrics.get("eval_damaged")
    left_out = (
        f" ({damaged} of {metrics['eval_images'] + damaged} images damaged)" if damaged else ""
    )
    where = (
        "" if has_test_images(phase.data) else ", of validation images: there are no test images"
    )
    say(f"[eval] {phase.job}: accuracy {metrics['eval_accuracy']:.4f}{left_out}{where}")
    return metrics


def _corrupted(config: ConfigDict, measure: Callable[[Corruption], dict]) -> dict:
    """Accuracies on corrupted images: by kind a list over severities, and the mean of all."""
    kinds = config.evaluation.corruptions
    kinds = tuple(KINDS) if "all" in kinds else kinds
    found: dict[str, list[float]] = {}
    for kind in kinds:
        for severity in SEVERITIES:
            change = backend.jit(
                functools.partial(corrupt, kind=kind, severity=severity), once=True
            )
            found.setdefault(kind, []).append(measure(change)["eval_accuracy"])
    if not found:
        return {}
    return {
        "corrupted_accuracy": sum(map(sum, found.values())) / (len(found) * len(SEVERITIES)),
        "corruptions": found,
    }


def reductions(
    run: Run, phase: Phase, stages: dict[str, dict], program: Program, frozen: dict
) -> list[dict]:
    """Accuracy of a network with parts removed, and the share of its FLOPs that this saves."""
    data, found = phase.data, []
    shape = (min(run.config.evaluation.batch, SEEN), *image_shape(data))
    image = jax.ShapeDtypeStruct(shape, jnp.float32)
    whole = count_flops(program.logits, {}, frozen, image)
    seen = _seen(run, phase, program, frozen)
    for smaller in students(run.config).reductions(stages, phase.seed, seen):
        reduced = dataclasses.replace(phase, stages=smaller.stages)
        own, parts = frozen_program(run.config, reduced, tuple(smaller.stages), smaller.trees)
        metrics = evaluator(run, own, data)({}, parts)
        saved = 1 - count_flops(own.logits, {}, parts, image) / whole
        entry = {"removed": smaller.title, "kept": smaller.kept, "flops_saved": saved}
        found.append(entry | {"eval_accuracy": metrics["eval_accuracy"]})
        say(
            f"[eval] {phase.job}, {smaller.kept} left of its {smaller.title}: accuracy "
            f"{metrics['eval_accuracy']:.4f}, {100 * saved:.0f}% of FLOPs saved"
        )
    return found


def _seen(run: Run, phase: Phase, program: Program, frozen: dict) -> dict[str, Any]:
    """Auxiliary outputs of a network for the first SEEN validation images, or a batch of them.

    Every process looks at all of them, and on any number of devices at no others: neither at
    damaged images nor at those that fill up a batch.
    """
    source = image_source(phase.data, "validation")
    count = min(run.config.evaluation.batch, SEEN, len(source))
    batch = next(eval_batches(source, phase.data, batch_size=count))
    pixels = batch["image"][batch["mask"] > 0]

    def observe(frozen: dict, pixels: jax.Array) -> dict[str, jax.Array]:
        images = normalise(pixels, phase.data.mean, phase.data.std)
        return program.run_with_aux(program.student, {}, frozen, images.astype(program.dtype))[1]

    seen = backend.jit(observe, out_shardings=meshes.replicated(run.mesh))
    return jax.device_get(seen(frozen, pixels))
