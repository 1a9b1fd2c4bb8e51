"""Few-shot evaluation: every episode gives a trained network a fresh head, and trains only that.

The compiled step is the same for all episodes. A finished episode is one line of episodes.jsonl, so
that an interrupted job goes on with the next.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from ml_collections import ConfigDict

from m2mkd_jax.checkpoint.files import sealed, unseal
from m2mkd_jax.data.few_shot import draw_tasks
from m2mkd_jax.data.indices import BatchIndices
from m2mkd_jax.data.pipeline import eval_batches, train_batches
from m2mkd_jax.errors import UserError, located, require
from m2mkd_jax.evaluate.accuracy import evaluate, make_counter
from m2mkd_jax.files.paths import make_directory, write_bytes
from m2mkd_jax.jobs.data_checks import image_facts
from m2mkd_jax.jobs.diagnosis import what_helps
from m2mkd_jax.jobs.evaluation import evaluation_batch, until_interrupted
from m2mkd_jax.jobs.finished import check_same_place, run_of, write_result
from m2mkd_jax.jobs.inputs import draw_images
from m2mkd_jax.jobs.plan import EPISODES, Job, standing_on, write_inputs
from m2mkd_jax.jobs.run import Run, image_source
from m2mkd_jax.jobs.setup import set_up
from m2mkd_jax.models import chain
from m2mkd_jax.parallel import backend, partition
from m2mkd_jax.parallel import mesh as meshes
from m2mkd_jax.parallel.process import barrier, from_main, is_main, say, union
from m2mkd_jax.phases.families import students
from m2mkd_jax.phases.initial_weights import load_stage
from m2mkd_jax.phases.phase import FRESH, Phase, WeightsFrom
from m2mkd_jax.train.loop import Loop, Member
from m2mkd_jax.train.step import evaluated_params, with_fixed
from m2mkd_jax.train.stops import NotFinite, Preempted


def load_network(config: ConfigDict, workdir: Path) -> dict[str, dict]:
    """{stage: {"params", "fixed"}} of the trained network; the head is still that of its classes.

    Raises:
        UserError: weights are missing, damaged, or of another network.
    """
    # The phase's network has the episodes' classes; what is loaded has its own.
    stages = students(config).network(FRESH).stages
    return {
        name: load_stage(
            config,
            workdir,
            WeightsFrom("job", config.few_shot.network, name),
            chain.abstract(spec.build),
        )
        for name, spec in stages.items()
    }


def run_few_shot(run: Run, job: Job) -> dict[str, Any]:
    """Runs the episodes that are not done and returns the job's result (also in its done.json).

    Raises:
        UserError: input that is wrong, or a diverging loss.
        Preempted: a signal arrived; the finished episodes are kept.
    """
    began, config, phase = time.monotonic(), run.config, job.phase
    directory = run.directory(job.name)
    make_directory(directory)
    if is_main():
        write_inputs(
            run.workdir,
            job,
            weights=standing_on(config, run.workdir, job),
            images=image_facts(phase),
        )
    train, test = (image_source(phase.data, split) for split in ("train", "test"))
    episode = Episode(run, phase)
    path = directory / EPISODES
    run_id = from_main(run_of(directory / "inputs.json")["id"] if is_main() else "")
    done = from_main(_finished(path, run_id) if is_main() else [])
    # A line has the seconds that all starts of the job had taken by then.
    earlier = done[-1].get("seconds", 0.0) if done else 0.0
    seconds = lambda: round(earlier + time.monotonic() - began, 2)
    for number, (support, query) in enumerate(draw_tasks(train, test, config.few_shot)):
        if number < len(done):
            continue
        seed = config.few_shot.seed + number
        if is_main() and not (directory / "images.png").is_file():
            episode.draw(directory / "images.png", seed, support)
        metrics = episode.run(seed, support, query)
        line = {"episode": number, "seed": seed, "run": run_id, "seconds": seconds(), **metrics}
        done.append(sealed(line))
        if is_main():
            check_same_place(directory, run_id)
            write_bytes(path, "".join(json.dumps(line) + "\n" for line in done).encode())
        say(
            f"[{job.name}] episode {number + 1}/{config.few_shot.episodes}  "
            f"accuracy {done[-1]['eval_accuracy']:.4f}"
        )
    accuracies = [line["eval_accuracy"] for line in done]
    metrics = {"eval_accuracy": sum(accuracies) / len(accuracies)}
    if damaged := sum(line.get("eval_damaged", 0) for line in done):
        metrics["eval_damaged"] = damaged
    result = {
        "name": job.name,
        "status": "done",
        "steps": episode.steps * len(done),
        "seconds": seconds(),
        "metrics": metrics,
        "episodes": accuracies,
        "origin": dict.fromkeys(phase.student, config.few_shot.network),
    }
    if is_main():
        write_result(directory, run_id, result)
    barrier(f"{job.name} done")
    return result


def updates_per_epoch(config: ConfigDict, phase: Phase) -> int:
    """Optimizer updates in an epoch of an episode's support images.

    Raises:
        UserError: there are none.
    """
    recipe, images = phase.recipe, config.few_shot.ways * config.few_shot.shots
    micro, repeats = recipe.batch // recipe.accumulate, phase.data.repeated_augmentation
    with located("config.recipes.fewshot.batch"):
        steps = BatchIndices(images, micro, 0, repeats).steps_per_epoch
    updates = steps // recipe.accumulate
    require(
        round(recipe.epochs * updates) > 0,
        f"config.recipes.fewshot: {recipe.epochs:g} epochs of {updates} batches are none; raise "
        "epochs or lower batch",
    )
    return updates


def check_episodes(config: ConfigDict, phase: Phase) -> None:
    """Draws the images of all episodes.

    Raises:
        UserError: the data cannot be read, or there are too few of them.
    """
    updates_per_epoch(config, phase)
    with located("config.few_shot.data"):
        train, test = (image_source(phase.data, split) for split in ("train", "test"))
    with located("config.few_shot"):
        for _ in draw_tasks(train, test, config.few_shot):
            pass


def _finished(path: Path, run: str = "") -> list[dict]:
    """The episodes that are done, in their order, up to a line that is damaged or another run's."""
    lines = path.read_bytes().splitlines() if path.is_file() else []
    found: list[dict] = []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):  # UnicodeDecodeError, too
            break
        if not isinstance(entry, dict) or not _is_episode(dict(entry), len(found), run):
            break
        found.append(entry)
    if len(found) < len(lines):
        say(f"{path}: from line {len(found) + 1} on it is damaged or of another run; done again")
    return found


def _is_episode(entry: dict[str, Any], number: int, run: str) -> bool:
    """Whether a line is what episode `number` of this run has left."""
    accuracy = entry.get("eval_accuracy")
    return (
        unseal(entry)
        and entry.get("episode") == number
        and entry.get("run", run) == run
        and isinstance(accuracy, float)
        and 0 <= accuracy <= 1
    )


class Episode:
    """What all episodes share: the frozen network, the compiled step, the counter.

    Attributes:
        steps: the steps of one episode.
    """

    def __init__(self, run: Run, phase: Phase):
        config, mesh, recipe = run.config, run.mesh, phase.recipe
        self._run, self._config, self._phase, self._mesh = run, config, phase, mesh
        # Labels are 0 .. ways - 1; the data set's own classes are only drawn from.
        self._data = ConfigDict(phase.data.to_dict())
        self._data.classes = config.few_shot.ways
        (self._stage,) = phase.trainable
        self._micro = recipe.batch // recipe.accumulate
        updates = updates_per_epoch(config, phase)
        self.steps = round(recipe.epochs * updates) * recipe.accumulate
        build = phase.stages[self._stage].build
        head = phase.trained({self._stage: chain.abstract(build).params})
        stages = load_network(config, run.workdir)
        self._setup = set_up(
            config, phase, stages, mesh=mesh, updates_per_epoch=updates, params=head
        )
        self._frozen = partition.put(self._setup.frozen, run.shardings(self._setup.frozen))
        self._begin = self._beginning(build)
        self._step = self._setup.make_step(self._data)
        logits = self._setup.on_mesh(self._setup.program.logits)
        everywhere = meshes.replicated(mesh)
        self._count = make_counter(logits, self._data.mean, self._data.std, everywhere)

    def _beginning(self, build: Callable) -> Callable[[jax.Array, dict], dict]:
        """(key, fixed arrays) -> the state of a fresh head."""
        stage, path = self._stage, self._phase.head

        def begin(key: jax.Array, fixed: dict) -> dict:
            # Of the rest of the stage nothing is computed.
            head = {stage: chain.subtree(chain.split(build(nnx.Rngs(key))).params, path)}
            # Copied, because the step gives its state's buffers away.
            return self._setup.begin(head, jax.tree.map(jnp.copy, fixed))

        return backend.jit(
            begin,
            out_shardings=self._setup.placement,
        )

    def draw(self, path: Path, seed: int, support: Any) -> None:
        """Draws images as the first step of an episode sees them."""
        draw_images(path, support, self._data, self._phase.recipe, self._micro, seed)

    def run(self, seed: int, support: Any, query: Any) -> dict:
        """Trains a head on the support images and returns its metrics on the queries."""
        batches = train_batches(
            support,
            self._data,
            batch_size=self._micro,
            total_steps=self.steps,
            seed=seed,
            **_processes(),
        )
        name = f"{self._phase.job}, episode of seed {seed}"
        loop = Loop(
            members=[
                Member(
                    name=name,
                    total_steps=self.steps,
                    log=lambda entry: None,
                    save=lambda *_: None,
                    stop=None,
                    learning_rate=self._setup.rate,
                )
            ],
            step_of=lambda names: self._train,
            log_every=self._config.log_every,
            evaluate_every=0,
            evaluate=lambda states: {name: self._evaluate(states[name], query)},
            save_seconds=float("inf"),
            accumulate=self._phase.recipe.accumulate,
        )
        fixed = {self._stage: self._frozen[self._stage]["fixed"]}
        states = {name: self._begin(jax.random.key(seed), fixed)}
        try:
            metrics = loop.run(states, (meshes.put_batch(self._mesh, b) for b in batches))
        except Preempted:
            raise Preempted(f"{name}: stopped by a signal; finished ones are kept") from None
        except NotFinite as error:
            raise UserError(
                f"{name}: the {error.what} is no longer finite at step {error.step}; "
                f"{what_helps(self._run, self._phase)}"
            ) from None
        finally:
            batches.close()
        return metrics[name]

    def _train(self, states: dict[str, dict], batch: Any) -> tuple[dict, dict]:
        """A step of the loop's only job."""
        ((name, state),) = states.items()
        state, metrics = self._step(state, self._frozen, batch)
        return {name: state}, {name: metrics}

    def _evaluate(self, state: dict, query: Any) -> dict:
        batch = evaluation_batch(self._config, len(query), self._mesh)
        batches = eval_batches(query, self._data, batch_size=batch, **_processes())
        placed = (meshes.put_batch(self._mesh, b) for b in until_interrupted(batches))
        frozen = with_fixed(self._frozen, state["fixed"])
        key = jax.random.key(self._config.seed)
        metrics = evaluate(self._count, evaluated_params(state), frozen, placed, key, len(query))
        batches.note_others(union)
        return metrics


def _processes() -> dict[str, Any]:
    return {"process_index": jax.process_index(), "process_count": jax.process_count()}
