"""The job 'fewshot': every episode gives a trained network a fresh head, and trains only that.

The compiled step is the same for all episodes. A finished episode is one line of episodes.jsonl, so
that an interrupted job goes on with the next.
"""

from __future__ import annotations

import functools
import json
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from m2mkd_jax.checkpoint.files import write_json
from m2mkd_jax.data.few_shot import draw_tasks
from m2mkd_jax.data.indices import BatchIndices
from m2mkd_jax.data.pipeline import eval_batches, train_batches
from m2mkd_jax.evaluate.accuracy import evaluate, make_counter
from m2mkd_jax.families import family
from m2mkd_jax.job import compute_dtype, draw_images, evaluation_batch, source
from m2mkd_jax.models import chain
from m2mkd_jax.parallel import mesh as meshes
from m2mkd_jax.parallel import partition
from m2mkd_jax.parallel.process import barrier, from_main, is_main, say
from m2mkd_jax.phases import build_phase
from m2mkd_jax.records import FRESH, Phase, Source
from m2mkd_jax.train.loop import Loop
from m2mkd_jax.train.optimizer import make_optimizer
from m2mkd_jax.train.schedule import learning_rate
from m2mkd_jax.train.step import evaluated_params, initial_state, make_step, with_fixed
from m2mkd_jax.weights import job_directory, load_stage

JOB = "fewshot"


def load_network(config: ConfigDict, workdir: Path) -> dict[str, dict]:
    """{stage: {"params", "fixed"}} of the trained network; the head is still that of its classes.

    Raises:
        UserError: weights are missing, damaged, or of another network.
    """
    # The phase's network has the episodes' classes; what is loaded has its own.
    records = family(config).network(FRESH).stages
    sources = {name: Source("job", config.few_shot.network, name) for name in records}
    return {
        name: load_stage(config, workdir, sources[name], chain.abstract(record.build))
        for name, record in records.items()
    }


def run_few_shot(config: ConfigDict, workdir: Path, mesh) -> dict:
    """Runs the episodes that are not done and returns the job's record (also in its done.json).

    Raises:
        UserError: input that is wrong, or a diverging loss.
        Preempted: a signal arrived; the finished episodes are kept.
    """
    began = time.monotonic()
    directory, phase = job_directory(workdir, JOB), build_phase(config, JOB)
    directory.mkdir(parents=True, exist_ok=True)
    train, test = (source(phase.data, split) for split in ("train", "test"))
    program = phase.program(None, compute_dtype(config.precision), config.evaluation.sampled)
    where = functools.partial(partition.shardings, mesh, fsdp=config.mesh.fsdp)
    stages = load_network(config, workdir)
    frozen = {
        name: {"params": chain.cast_compute(s["params"], program.dtype), "fixed": s["fixed"]}
        for name, s in stages.items()
    }
    frozen = partition.put(frozen, where(frozen))
    episode = Episode(config, phase, program, frozen, mesh)
    path = directory / "episodes.jsonl"
    done = from_main(_finished(path) if is_main() else [])
    for number, (support, query) in enumerate(draw_tasks(train, test, config.few_shot)):
        if number < len(done):
            continue
        seed = config.few_shot.seed + number
        if is_main() and not (directory / "images.png").is_file():
            episode.draw(directory / "images.png", seed, support)
        record = {"episode": number, "seed": seed, **episode.run(seed, support, query)}
        done.append(record)
        if is_main():
            path.write_text("".join(json.dumps(line) + "\n" for line in done))
        say(f"[{JOB}] episode {number + 1}/{config.few_shot.episodes}  "
            f"accuracy {record['eval_accuracy']:.4f}")  # fmt: skip
    accuracies = [record["eval_accuracy"] for record in done]
    record = {
        "name": JOB,
        "status": "done",
        "steps": episode.steps * len(done),
        "seconds": round(time.monotonic() - began, 2),
        "metrics": {"eval_accuracy": sum(accuracies) / len(accuracies)},
        "episodes": accuracies,
        "origin": {name: config.few_shot.network for name in phase.student},
    }
    if is_main():
        write_json(directory / "done.json", record)
    barrier(f"{JOB} done")
    return record


def _finished(path: Path) -> list[dict]:
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


class Episode:
    """What all episodes share: the frozen network, the compiled step, the counter.

    Attributes: steps, the steps of one episode.
    """

    def __init__(self, config: ConfigDict, phase: Phase, program, frozen: dict, mesh):
        self._config, self._phase, self._frozen, self._mesh = config, phase, frozen, mesh
        # Labels are 0 .. ways - 1; the data set's own classes are only drawn from.
        self._data = ConfigDict(phase.data.to_dict())
        self._data.classes = ways = config.few_shot.ways
        recipe, (stage,) = phase.recipe, phase.trainable
        self._micro = recipe.batch // recipe.accumulate
        indices = BatchIndices(
            ways * config.few_shot.shots, self._micro, 0, phase.data.repeated_augmentation
        )
        updates = indices.steps_per_epoch // recipe.accumulate
        self.steps = round(recipe.epochs * updates) * recipe.accumulate
        shapes = phase.trained({stage: chain.abstract(phase.stages[stage].build).params})
        self._rate = learning_rate(recipe, updates)
        everywhere, build = meshes.replicated(mesh), phase.stages[stage].build
        optimizer = make_optimizer(recipe, updates, shapes)

        def begin(key, fixed):
            """The state of a fresh head; of the rest of its stage nothing is computed."""
            head = {stage: chain.part(chain.split(build(nnx.Rngs(key))).params, phase.head)}
            # Copied, because the step gives its state's buffers away.
            return initial_state(head, jax.tree.map(jnp.copy, fixed), optimizer, recipe)

        self._begin = jax.jit(begin, out_shardings=everywhere)
        self._step = make_step(
            meshes.on(mesh, program.loss), optimizer, recipe, self._data, phase.seed,
            out_shardings=(everywhere, everywhere),
        )  # fmt: skip
        logits = meshes.on(mesh, program.logits)
        self._count = make_counter(logits, self._data.mean, self._data.std, everywhere)

    def draw(self, path: Path, seed: int, support) -> None:
        """Draws images as the first step of an episode sees them."""
        draw_images(path, support, self._data, self._phase.recipe, self._micro, seed)

    def run(self, seed: int, support, query) -> dict:
        """Trains a head on the support images and returns its metrics on the queries."""
        (stage,) = self._phase.trainable
        batches = train_batches(
            support, self._data, batch_size=self._micro, total_steps=self.steps,
            seed=seed, **_processes(),
        )  # fmt: skip
        loop = Loop(
            name=f"{JOB}, episode of seed {seed}",
            step=self._step,
            frozen=self._frozen,
            total_steps=self.steps,
            log_every=self._config.log_every,
            evaluate_every=0,
            evaluate=lambda state: self._evaluate(state, query),
            log=lambda record: None,
            save=lambda *_: None,
            save_seconds=float("inf"),
            stop=None,
            learning_rate=self._rate,
            accumulate=self._phase.recipe.accumulate,
        )
        state = self._begin(jax.random.key(seed), {stage: self._frozen[stage]["fixed"]})
        try:
            _, metrics, _ = loop.run(state, (meshes.put_batch(self._mesh, b) for b in batches))
        finally:
            batches.close()
        return metrics

    def _evaluate(self, state: dict, query) -> dict:
        batch = evaluation_batch(self._config, len(query), self._mesh)
        batches = eval_batches(query, self._data, batch_size=batch, **_processes())
        placed = (meshes.put_batch(self._mesh, b) for b in batches)
        frozen = with_fixed(self._frozen, state["fixed"])
        key = jax.random.key(self._config.seed)
        return evaluate(self._count, evaluated_params(state), frozen, placed, key)


def _processes() -> dict:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}
