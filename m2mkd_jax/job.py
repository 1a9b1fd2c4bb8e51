"""Running one job: from its record to finished weights, resuming what was interrupted."""

from __future__ import annotations

import fcntl
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from m2mkd_jax import config as configs
from m2mkd_jax.checkpoint.files import read_json, write_json
from m2mkd_jax.checkpoint.store import RunCheckpoints, save_weights
from m2mkd_jax.data.class_lists import PARENTS
from m2mkd_jax.data.grid import caption, draw_grid
from m2mkd_jax.data.indices import BatchIndices
from m2mkd_jax.data.pipeline import eval_batches, first_images, train_batches
from m2mkd_jax.data.sources import load_source
from m2mkd_jax.errors import UserError
from m2mkd_jax.evaluate.accuracy import evaluate, make_counter
from m2mkd_jax.evaluate.label_spaces import positions, restricted
from m2mkd_jax.families import family
from m2mkd_jax.losses import Program, all_distances, graph_regulariser
from m2mkd_jax.models import chain
from m2mkd_jax.objectives.graph import fit_gaussian_mixture
from m2mkd_jax.parallel import mesh as meshes
from m2mkd_jax.parallel import partition
from m2mkd_jax.parallel.process import barrier, from_main, is_main, say
from m2mkd_jax.phases import Phase, build_phase
from m2mkd_jax.train.loop import Loop, Preempted
from m2mkd_jax.train.optimizer import make_optimizer
from m2mkd_jax.train.schedule import learning_rate
from m2mkd_jax.train.step import evaluated_params, initial_state, make_step, prepare, with_fixed
from m2mkd_jax.weights import job_directory, load_stages

_SOURCES: dict[str, object] = {}


def compute_dtype(precision: str) -> jnp.dtype:
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def source(data: ConfigDict, split: str):
    """A data source, decoded once per process however many jobs read it."""
    key = f"{split} {data.to_json()}"
    if key not in _SOURCES:
        _SOURCES[key] = load_source(data, split)
    return _SOURCES[key]


class Log:
    """metrics.jsonl of one job, and a line on the screen per record."""

    def __init__(self, path: Path, job: str, total: int, start: int):
        self.job, self.total = job, total
        self.file = None
        if not is_main():
            return
        kept = []
        if start and path.is_file():
            # A restart repeats the steps after its checkpoint; their old records would be double.
            for line in path.read_text(errors="replace").splitlines():
                try:
                    step = json.loads(line)["step"]
                except (ValueError, TypeError, KeyError):  # the line that a kill cut off
                    continue
                if step <= start:
                    kept.append(line + "\n")
        path.write_text("".join(kept))
        self.file = path.open("a", buffering=1)

    def __call__(self, record: dict) -> None:
        if self.file is None:
            return
        self.file.write(json.dumps(record) + "\n")
        shown = ("loss", "accuracy", "teacher_agreement", "eval_accuracy", "eval_loss")
        numbers = "  ".join(f"{k} {record[k]:.4f}" for k in shown if k in record)
        print(f"[{self.job}] {record['step']}/{self.total}  {numbers}", flush=True)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def evaluator(
    program: Program, data: ConfigDict, config: ConfigDict, mesh
) -> Callable[[dict, dict], dict]:
    """(trainable, frozen) -> metrics over the whole test split, every image once.

    On renditions only the logits of their classes compete.
    """
    test = source(data, "test")
    logits, everywhere = meshes.on(mesh, program.logits), meshes.replicated(mesh)
    if data.name in PARENTS:
        logits = restricted(logits, positions(data.name))
    count = make_counter(logits, data.mean, data.std, everywhere)
    batch = evaluation_batch(config, len(test), mesh)

    def run(trainable: dict, frozen: dict) -> dict:
        batches = eval_batches(
            test,
            data,
            batch_size=batch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        placed = (meshes.put_batch(mesh, b) for b in batches)
        return evaluate(count, trainable, frozen, placed, jax.random.key(config.seed))

    return run


def evaluation_batch(config: ConfigDict, images: int, mesh) -> int:
    """Images of an evaluation's batches, which devices and groups of images must divide."""
    unit = mesh.size * max(family(config).group, 1)
    return -(-min(config.evaluation.batch, images) // unit) * unit


def count_updates(config: ConfigDict, phase: Phase) -> int:
    """Optimizer updates in an epoch of a phase; opens its training data.

    Raises:
        UserError: the data cannot be read, are fewer than a batch, or the epochs too short for one.
    """
    recipe, data = phase.recipe, phase.data
    key = f"config.recipes.{configs.recipe_name(phase.job.split('/')[0])}"
    micro = recipe.batch // recipe.accumulate
    images = len(source(data, "train"))
    try:
        indices = BatchIndices(images, micro, config.seed, data.repeated_augmentation)
    except UserError as error:
        raise UserError(f"{key}.batch: {error}") from None
    steps = indices.steps_per_epoch
    if steps < recipe.accumulate:
        raise UserError(
            f"{phase.job}: an epoch has fewer images than one batch of {recipe.batch}; lower "
            f"{key}.batch"
        )
    updates = steps // recipe.accumulate
    if not round(recipe.epochs * updates):
        raise UserError(
            f"{phase.job}: {recipe.epochs:g} epochs of {updates} batches are none; raise "
            f"{key}.epochs"
        )
    return updates


def draw_images(path: Path, train, data: ConfigDict, recipe: ConfigDict, micro: int, seed: int):
    """Draws 16 images as the first step sees them, erased and mixed (among the 16), with labels."""
    batch = first_images(train, data, batch_size=micro, seed=seed)
    keys = tuple(jax.random.split(jax.random.key(seed)))
    images, targets = jax.jit(lambda keys, batch: prepare(keys, batch, recipe, data))(keys, batch)
    pixels = 255 * (np.asarray(images) * np.array(data.std) + np.array(data.mean))
    shares = (np.asarray(targets) - recipe.smoothing / data.classes) / (1 - recipe.smoothing)
    captions = [caption(share, train.class_names) for share in shares]
    draw_grid(pixels.round().clip(0, 255).astype(np.uint8), captions).save(path)


def make_program(config: ConfigDict, phase: Phase, stages: dict[str, dict]) -> Program:
    """The phase's program; its graph regulariser may look at the initial network."""
    regulariser = None
    if phase.regularised:
        name, mixture = phase.regularised, None
        if config.regulariser.kind == "gaussian_mixture":
            graph = chain.abstract(phase.stages[name].build).graph
            nac = chain.merge(graph, stages[name]["params"], stages[name]["fixed"])
            mixture = fit_gaussian_mixture(
                jax.device_get(all_distances(nac)), config.regulariser.components, config.seed
            )
        value = graph_regulariser(config.regulariser.kind, config.regulariser, mixture)
        regulariser = lambda merged: value(merged[name])  # noqa: E731
    dtype = compute_dtype(config.precision)
    return phase.program(regulariser, dtype, config.evaluation.sampled)


def taken_apart(program: Program, stages: dict[str, dict]) -> tuple[dict, dict, dict]:
    """What is trained, by stage; the fixed arrays beside it; and the stages that stand still."""
    params = {name: stages[name]["params"] for name in program.trainable}
    fixed = {name: stages[name]["fixed"] for name in program.trainable}
    # Where nothing is trained there is no master copy to keep: the compute type serves.
    frozen = {
        name: {"params": chain.cast_compute(s["params"], program.dtype), "fixed": s["fixed"]}
        for name, s in stages.items()
        if name not in program.trainable
    }
    return params, fixed, frozen


def _reference(config: ConfigDict, workdir: Path, phase: Phase, program, stages, mesh) -> dict:
    """The accuracy that a hybrid is measured by: its teacher's hybrid, or the meta model's."""
    if phase.teacher and phase.job.startswith("m2mkd"):
        teacher = Program(
            program.graphs, phase.teacher, (), dtype=program.dtype,
        )  # fmt: skip
        metrics = evaluator(teacher, phase.data, config, mesh)({}, stages)
        return {"teacher_accuracy": metrics["eval_accuracy"]}
    done = job_directory(workdir, "pt") / "done.json"
    found = {}
    if is_main() and phase.job.startswith("mt/") and done.is_file():
        found = {"meta_accuracy": read_json(done)["metrics"]["eval_accuracy"]}
    return from_main(found)


def run_job(config: ConfigDict, workdir: Path, job: str, mesh) -> dict:
    """Runs a training job to its end and returns its record (also in JOB/done.json).

    Raises:
        UserError: input that is wrong, another process at the same job, a diverging loss.
        Preempted: a signal arrived; the state was saved.
    """
    directory = job_directory(workdir, job)
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / "lock").open("w") as lock:
        if is_main():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise UserError(
                    f"{job}: another process is running it in {workdir}; wait for it, or use "
                    "another --workdir"
                ) from None
        return _run_job(config, workdir, job, directory, mesh)


def _run_job(config: ConfigDict, workdir: Path, job: str, directory: Path, mesh) -> dict:
    began = time.monotonic()
    phase = build_phase(config, job)
    recipe, data = phase.recipe, phase.data
    train = source(data, "train")
    where = functools.partial(partition.shardings, mesh, fsdp=config.mesh.fsdp)
    stages, origin = load_stages(config, workdir, phase, where)
    program = make_program(config, phase, stages)
    reference = _reference(config, workdir, phase, program, stages, mesh)

    micro = recipe.batch // recipe.accumulate
    updates_per_epoch = count_updates(config, phase)
    total = round(recipe.epochs * updates_per_epoch) * recipe.accumulate
    params, fixed, frozen = taken_apart(program, stages)
    optimizer = make_optimizer(recipe, updates_per_epoch, params)
    if is_main():
        overview = parameter_overview.get_parameter_overview(params, include_stats=False)
        (directory / "parameters.txt").write_text(overview + "\n")
        if not (directory / "images.png").is_file():
            draw_images(directory / "images.png", train, data, recipe, micro, phase.seed)

    def begin(params, fixed):
        return initial_state(params, fixed, optimizer, recipe)

    shapes = jax.eval_shape(begin, params, fixed)
    placement = where(shapes)
    checkpoints = RunCheckpoints(directory / "checkpoints")
    start, restored = 0, checkpoints.restore_latest(jax.tree.map(_placed, shapes, placement))
    if restored:
        start, state = restored
        say(f"[{job}] resumed at step {start}/{total}")
    else:
        # The state takes the parameters over: there is one copy of them.
        state = jax.jit(begin, out_shardings=placement, donate_argnums=(0, 1))(params, fixed)
    del stages, params, fixed
    log = Log(directory / "metrics.jsonl", job, total, start)
    metrics_of = evaluator(program, data, config, mesh)
    target = reference.get("teacher_accuracy", reference.get("meta_accuracy"))
    every = config.evaluation.every  # at least a batch, however small a part of an epoch
    every = every and max(round(every * updates_per_epoch), 1)

    def near_enough(metrics: dict) -> bool:
        return metrics["eval_accuracy"] >= target - recipe.stop_within

    batches = train_batches(
        train,
        data,
        batch_size=micro,
        total_steps=max(total, start + 1),
        start_step=start,
        seed=phase.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    loop = Loop(
        name=job,
        step=make_step(
            meshes.on(mesh, program.loss), optimizer, recipe, data, phase.seed,
            out_shardings=(placement, meshes.replicated(mesh)),
        ),
        frozen=frozen,
        total_steps=total,
        log_every=config.log_every,
        evaluate_every=every * recipe.accumulate,
        evaluate=lambda s: metrics_of(evaluated_params(s), with_fixed(frozen, s["fixed"])),
        log=log,
        save=checkpoints.save,
        save_seconds=60.0 * config.checkpoint_minutes,
        stop=near_enough if recipe.stop_within and target is not None else None,
        learning_rate=learning_rate(recipe, updates_per_epoch),
        accumulate=recipe.accumulate,
    )
    try:
        placed = (meshes.put_batch(mesh, batch) for batch in batches)
        state, metrics, steps = loop.run(state, placed, start)
    except Preempted:
        checkpoints.close()
        raise
    finally:
        batches.close()
        log.close()
    # Not after an error, which may have come to this process alone: it would wait for the others.
    checkpoints.close()
    metrics = {**metrics, **reference}
    trees = {
        name: {"params": evaluated_params(state)[name], **_if_any(fixed=state["fixed"][name])}
        for name in phase.trainable
    }
    description = {**phase.describe, "job": job, "step": steps, "metrics": metrics}
    description["normalisation"] = {"mean": list(data.mean), "std": list(data.std)}
    save_weights(directory / "weights", trees, description)
    record = {
        "name": job,
        "status": "done",
        "steps": steps,
        "seconds": round(time.monotonic() - began, 2),
        "metrics": metrics,
        "origin": origin,
    }
    if is_main():
        write_json(directory / "done.json", record)
    barrier(f"{job} done")
    return record


def _if_any(**trees: dict) -> dict:
    return {name: tree for name, tree in trees.items() if tree}


def _placed(leaf: jax.ShapeDtypeStruct, sharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
