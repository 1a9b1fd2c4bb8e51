"""Accuracy on test images: after training, and of finished networks as a job of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator

import jax
from ml_collections import ConfigDict

from m2mkd_jax.checkpoint.files import write_record
from m2mkd_jax.config.defaults import renditions_data
from m2mkd_jax.data.class_lists import PARENTS
from m2mkd_jax.data.pipeline import eval_batches
from m2mkd_jax.evaluate.accuracy import evaluate, make_counter
from m2mkd_jax.evaluate.label_spaces import positions, restricted
from m2mkd_jax.jobs.plan import Job, write_inputs
from m2mkd_jax.jobs.setup import Run, frozen_program, image_source
from m2mkd_jax.models import chain
from m2mkd_jax.parallel import mesh as meshes
from m2mkd_jax.parallel import partition
from m2mkd_jax.parallel.process import barrier, interrupted, is_main, reached, say
from m2mkd_jax.phases.initial_weights import load_stage
from m2mkd_jax.phases.joint import JointProgram
from m2mkd_jax.phases.phase import Phase, WeightsFrom
from m2mkd_jax.phases.program import Program
from m2mkd_jax.train.loop import EvaluationStopped


def evaluator(
    run: Run, program: Program | JointProgram, data: ConfigDict
) -> Callable[[dict, dict], dict]:
    """(trainable, frozen) -> metrics over the whole test split, every undamaged image once.

    Those of a joint program are by job. On renditions only the logits of their classes compete.
    """
    config, mesh, test = run.config, run.mesh, image_source(data, "test")
    logits = meshes.with_mesh(mesh, program.logits)
    if data.name in PARENTS:
        logits = restricted(logits, positions(data.name))
    count = make_counter(logits, data.mean, data.std, meshes.replicated(mesh))
    batch = evaluation_batch(config, len(test), mesh)

    def measure(trainable: dict, frozen: dict) -> dict:
        batches = eval_batches(
            test,
            data,
            batch_size=batch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        placed = (meshes.put_batch(mesh, b) for b in until_interrupted(batches))
        return evaluate(count, trainable, frozen, placed, jax.random.key(config.seed), len(test))

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
        The job's result (also in its done.json): `networks` has the metrics of each.
    """
    began = time.monotonic()
    if is_main():
        directory = run.directory(job.name)
        directory.mkdir(parents=True, exist_ok=True)
        write_inputs(run.workdir, job)
    metrics = {phase.job: _measure(run, phase) for phase in job.phases}
    first = metrics.get("e2e", next(iter(metrics.values()), {}))
    result = {
        "name": job.name,
        "status": "done",
        "steps": 0,
        "seconds": round(time.monotonic() - began, 2),
        "metrics": {k: v for k, v in first.items() if k == "eval_accuracy"},
        "networks": metrics,
    }
    if is_main():
        write_record(run.directory(job.name) / "done.json", result)
    barrier(f"{job.name} done")
    return result


def _measure(run: Run, phase: Phase) -> dict:
    """Metrics of the network that a phase trained, on its test split and on renditions of it."""
    config = run.config
    stages = {
        name: load_stage(
            config,
            run.workdir,
            WeightsFrom("job", phase.job, name),
            chain.abstract(phase.stages[name].build),
        )
        for name in phase.student
    }
    stages = partition.put(stages, run.shardings(stages))
    program, frozen = frozen_program(config, phase, phase.student, stages)
    del stages
    metrics = evaluator(run, program, phase.data)({}, frozen)
    for name in config.evaluation.renditions if phase.data == config.data else ():
        renditions = evaluator(run, program, renditions_data(config, name))({}, frozen)
        metrics[f"{name}_accuracy"] = renditions["eval_accuracy"]
    damaged = metrics.get("eval_damaged")
    left_out = (
        f" ({damaged} of {metrics['eval_images'] + damaged} images damaged)" if damaged else ""
    )
    say(f"[eval] {phase.job}: accuracy {metrics['eval_accuracy']:.4f}{left_out}")
    return metrics
