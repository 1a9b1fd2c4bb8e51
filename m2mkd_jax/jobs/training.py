"""Jobs in training, in one program: from their newest checkpoints to their finished weights."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from m2mkd_jax.checkpoint.checksums import SECONDS, saved_metrics
from m2mkd_jax.checkpoint.steps import latest_step
from m2mkd_jax.checkpoint.store import RunCheckpoints, save_weights
from m2mkd_jax.checkpoint.trees import not_finite
from m2mkd_jax.data.kept import KeptBatches
from m2mkd_jax.data.pipeline import BatchIterator, train_batches
from m2mkd_jax.data.scene_batches import evaluation_edges
from m2mkd_jax.data.scenes import is_scenes
from m2mkd_jax.detection.training import STAGE
from m2mkd_jax.errors import UserError
from m2mkd_jax.files.paths import local_directory, remove_tree
from m2mkd_jax.jobs.detection import BEST, DetectionEvaluator, said, scene_stream
from m2mkd_jax.jobs.diagnosis import what_helps, where_it_began
from m2mkd_jax.jobs.evaluation import evaluator
from m2mkd_jax.jobs.finished import check_same_place, run_of, write_result
from m2mkd_jax.jobs.fitting import FittingStep
from m2mkd_jax.jobs.inputs import describe_inputs
from m2mkd_jax.jobs.joint import JointSetup
from m2mkd_jax.jobs.kept_targets import FOLDER
from m2mkd_jax.jobs.log import Log
from m2mkd_jax.jobs.progress import pace
from m2mkd_jax.jobs.run import Run, image_source, total_steps
from m2mkd_jax.jobs.setup import Setup
from m2mkd_jax.jobs.time_left import TimeLeft
from m2mkd_jax.jobs.trackers import make_trackers
from m2mkd_jax.parallel import mesh as meshes
from m2mkd_jax.parallel.matrix_rate import matrix_rate
from m2mkd_jax.parallel.process import alone, any_process, barrier, from_main, is_main, say, union
from m2mkd_jax.phases.detection import DetectionPhase, DetectionProgram
from m2mkd_jax.phases.phase import Phase
from m2mkd_jax.train.loop import Loop, Member
from m2mkd_jax.train.step import evaluated_params, with_fixed
from m2mkd_jax.train.stops import NotFinite, Preempted


def _stop_rule(phase: Phase, reference: dict[str, float]) -> Callable[[dict], bool] | None:
    """metrics -> whether the hybrid is near enough to its reference; None: never stop early."""
    target = reference.get("teacher_accuracy", reference.get("meta_accuracy"))
    if target is None or not phase.recipe.stop_within:
        return None
    return lambda metrics: metrics["eval_accuracy"] >= target - phase.recipe.stop_within


@dataclasses.dataclass
class _Record:
    """What a job in training keeps beside its state."""

    directory: Path
    run: str  # the id of `run_of`
    total: int
    checkpoints: RunCheckpoints
    reference: dict[str, float]
    origin: dict[str, str]
    log: Log
    earlier: float  # seconds of the starts before this one, up to the checkpoint


class Training:
    """Jobs that train in one program, from their newest checkpoints to their finished weights.

    Args:
        run: the run.
        setup: of the jobs.
        made_for: the jobs that the program was made for, some of which may have ended.
        updates: optimizer updates in an epoch.
        step: their joint step, if it is compiled already.
        began: when the jobs began, for their results.
        kept: what batches are read from, where the jobs keep their targets.
        time_left: of the command; None: it is not said.
    """

    def __init__(
        self,
        run: Run,
        setup: JointSetup,
        made_for: tuple[str, ...],
        updates: int,
        step: FittingStep | None,
        began: float,
        kept: KeptBatches | None = None,
        time_left: TimeLeft | None = None,
    ):
        self._made_for, self._kept, self._time_left = made_for, kept, time_left
        self._stream: BatchIterator | None = None
        self._run, self._setup, self._updates, self._began = run, setup, updates, began
        self._steps = {tuple(setup.setups): step or setup.make_step()}
        self._records: dict[str, _Record] = {}
        self._states: dict[str, dict] = {}
        self._counters: dict[tuple[str, ...], Callable] = {}
        self._detections: DetectionEvaluator | None = None
        self._start = 0

    def begin(
        self, steps: dict[str, int], origins: dict[str, dict], references: dict[str, dict]
    ) -> list[str]:
        """Fetches the states, from checkpoints where there are any.

        Args:
            steps: the step that each job goes on from, by `common_steps`.
            origins: where the stages of each job come from, for its result.
            references: the accuracies that each job is measured by.

        Returns:
            The jobs that are at another step than the first, which do not take part.
        """
        put_off = []
        for name, setup in self._setup.setups.items():
            directory = self._run.directory(name)
            describe_inputs(setup, directory)
            best = BEST if isinstance(setup.phase, DetectionPhase) else "eval_accuracy"
            run = from_main(run_of(directory / "inputs.json")["id"] if is_main() else "")
            checkpoints = RunCheckpoints(directory / "checkpoints", best, name, run)
            start, earlier = 0, 0.0
            if (newest := latest_step(checkpoints.directory)) > steps[name]:
                say(f"[{name}] goes back from step {newest}, which not all modules have saved")
            restored = checkpoints.restore_latest(setup.abstract_state, steps[name])
            if restored:
                start, state = restored
                saved = saved_metrics(directory / "checkpoints" / str(start) / "state")
                earlier = from_main((saved or {}).get(SECONDS, 0.0))
            if self._states and start != self._start:  # its newest checkpoint is damaged
                checkpoints.close()
                put_off.append(name)
                continue
            total = total_steps(setup.phase, self._updates)
            if restored:
                say(f"[{name}] resumed at step {start}/{total}")
            self._states[name] = state if restored else setup.initial_state()
            self._start = start
            log = Log(
                directory / "metrics.jsonl",
                name,
                total,
                start,
                place=self._time_left.place(name) if self._time_left else "",
                every=self._run.config.log_seconds,
                trackers=make_trackers(self._run.config, directory, name) if is_main() else (),
            )
            self._records[name] = _Record(
                directory, run, total, checkpoints, references[name], origins[name], log, earlier
            )
        self._setup = self._setup.only(self._records)
        return put_off

    def run(self, release: Callable[[str], None]) -> None:
        """Trains the jobs to their ends; `release` is called with the name of each that has ended.

        Raises:
            UserError: a diverging loss.
            Preempted: a signal arrived; the states were saved.
        """
        config, phase = self._run.config, next(iter(self._setup.setups.values())).phase
        every = config.evaluation.every  # at least a batch, however small a part of an epoch
        accumulate = phase.recipe.accumulate
        loop = Loop(
            members=[self._member(name, release) for name in self._records],
            step_of=self._step_of,
            log_every=config.log_every * accumulate,
            evaluate_every=every and max(round(every * self._updates), 1) * accumulate,
            evaluate=self._evaluate,
            save_seconds=60.0 * config.checkpoint_minutes,
            accumulate=accumulate,
            wait=self._wait,
        )
        if is_main():  # what takes long does so before the clock runs
            matrix_rate(next(iter(self._setup.setups.values())).program.dtype)
            if self._time_left:
                self._time_left.seconds()
        try:
            loop.run(self._states, self._batches(phase), self._start)
        except Preempted:
            # Not after an error, which may have come to this process alone: it would wait for the
            # others.
            for record in self._records.values():
                record.checkpoints.close()
            raise
        except NotFinite as error:
            raise self._explained(error) from None
        except Exception:
            for record in self._records.values():  # whose end would explain any error
                if is_main():
                    check_same_place(record.directory, record.run)
            raise
        finally:
            self._close_stream()
            for record in self._records.values():
                record.log.close()

    def _explained(self, error: NotFinite) -> UserError:
        """The error with where it began, and what to do."""
        setup, where = self._setup.setups[error.name], ""
        if error.training and alone():
            where = where_it_began(setup, self._states[error.name], error.step)
        skip = ", or let config.max_skipped_steps steps be skipped" if error.training else ""
        return UserError(
            f"{error.name}: the {error.what} is no longer finite at step {error.step}{where}; "
            f"{what_helps(self._run, setup.phase)}{skip}"
        )

    def _batches(self, phase: Phase) -> Iterator[dict]:
        """The batches from the first step on, on the devices."""
        done = self._start
        while True:
            if self._stream is None:
                self._stream = self._open_stream(phase, done)
            yield meshes.put_batch(self._run.mesh, next(self._stream))
            done += 1

    def _open_stream(self, phase: Phase, done: int) -> BatchIterator:
        """The batches after `done` steps, on the host, of what the jobs need that are left."""
        total = max(record.total for record in self._records.values())
        if isinstance(phase, DetectionPhase):
            return scene_stream(phase, max(total, done + 1), done)
        kept = self._kept and KeptBatches({job: self._kept.jobs[job] for job in self._records})
        return train_batches(
            image_source(phase.data, "train"),
            phase.data,
            batch_size=phase.recipe.batch // phase.recipe.accumulate,
            total_steps=max(total, done + 1),
            start_step=done,
            seed=phase.seed,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            views=phase.views,
            kept=kept,
        )

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _member(self, name: str, release: Callable[[str], None]) -> Member:
        record, setup = self._records[name], self._setup.setups[name]

        def finish(state: dict, metrics: dict, steps: int) -> None:
            self._finish(name, state, metrics, steps)
            release(name)

        return Member(
            name=name,
            total_steps=record.total,
            log=functools.partial(self._log, name),
            save=functools.partial(self._save, name),
            stop=_stop_rule(setup.phase, record.reference),
            learning_rate=setup.rate,
            finish=finish,
            allowed=self._run.config.max_skipped_steps,
            skipped=int(self._states[name]["skipped"]),
            evaluated=from_main(record.log.evaluated),
        )

    def _wait(self) -> None:
        """Waits until all checkpoints are on disk."""
        for record in self._records.values():
            record.checkpoints.wait()

    def _save(
        self, name: str, step: int, state: dict, metrics: dict, together: tuple[str, ...]
    ) -> None:
        """Saves a state, and the seconds that it took, after the log of the steps before it.

        Raises NotFinite, in all processes, where its weights are not finite.
        """
        wrong = not_finite({key: state[key] for key in ("params", "ema") if key in state})
        if any_process(bool(wrong)):
            raise NotFinite(name, step, f"array {wrong}" if wrong else "weight", False)
        record = self._records[name]
        if is_main():
            check_same_place(record.directory, record.run)
        record.log.upload()
        metrics = metrics | {SECONDS: self._seconds(record)}
        record.checkpoints.save(step, state, metrics, together, self._made_for)

    def _seconds(self, record: _Record) -> float:
        """Seconds that a job has taken in all its starts."""
        return record.earlier + time.monotonic() - self._began

    def _log(self, name: str, entry: dict) -> None:
        """Logs an entry, with how fast the job goes and how long it takes."""
        record, setup = self._records[name], self._setup.setups[name]
        recipe = setup.phase.recipe
        if "seconds_per_step" in entry and is_main():
            ((_, step),) = self._steps.items()
            images, dtype = recipe.batch // recipe.accumulate, setup.program.dtype
            entry = entry | pace(entry, images, record.total, step.flops, dtype)
            # All jobs of the program have done as many steps.
            steps = {n: (entry["step"], r.total) for n, r in self._records.items()}
            per_step, left = entry["seconds_per_step"], None
            if self._time_left:
                left = self._time_left.seconds(steps, per_step)
            entry |= {} if left is None else {"run_seconds_left": left}
        record.log(entry)

    def _step_of(self, names: tuple[str, ...]) -> Callable[[dict, Any], tuple[dict, dict]]:
        """The step of those jobs that are left."""
        self._setup = self._setup.only(names)
        if names not in self._steps:
            self._steps = {names: self._setup.make_step()}
        step, frozen = self._steps[names], self._setup.frozen
        return lambda states, batch: step(states, frozen, batch)

    def _evaluate(self, states: dict[str, dict]) -> dict[str, dict]:
        """Metrics by job, from one pass over the validation images."""
        if self._stream is not None:
            self._stream.note_others(union)
        names, setup = tuple(states), self._setup.only(states)
        phase = next(iter(setup.setups.values())).phase
        if isinstance(phase, DetectionPhase):
            return self._detected(phase, states)
        if names not in self._counters:
            self._counters = {names: evaluator(self._run, setup.program, phase.data, "validation")}
        frozen = setup.frozen
        for state in states.values():
            frozen = with_fixed(frozen, state["fixed"])
        params = {name: evaluated_params(state) for name, state in states.items()}
        return self._counters[names](params, frozen)

    def _detected(self, phase: DetectionPhase, states: dict[str, dict]) -> dict[str, dict]:
        """COCO's numbers of the one detector, with pictures in its directory."""
        ((name, state),) = states.items()
        if self._detections is None:
            program = self._setup.setups[name].program
            assert isinstance(program, DetectionProgram)
            self._detections = DetectionEvaluator(self._run, phase, program)
        metrics = self._detections(evaluated_params(state)[STAGE])
        if is_main():
            self._detections.save_pictures(self._run.directory(name))
        return {name: metrics}

    def _finish(self, name: str, state: dict, metrics: dict, steps: int) -> None:
        """Leaves a job's weights and result."""
        record = self._records.pop(name)
        if self._kept:  # the others go on with what they need themselves
            self._close_stream()
        record.log.close()
        record.checkpoints.close()
        metrics = {**metrics, **record.reference}
        if is_main():
            check_same_place(record.directory, record.run)
        _save_finished(self._setup.setups[name], record.directory, state, steps, metrics)
        result = {
            "name": name,
            "status": "done",
            "steps": steps,
            "seconds": round(self._seconds(record), 2),
            "metrics": metrics,
            "origin": record.origin,
        }
        if self._detections is not None:
            result["per_class"] = self._detections.per_class
        if is_main():
            write_result(record.directory, record.run, result)
            remove_tree(local_directory(record.directory / FOLDER), if_possible=True)
        barrier(f"{name} done")
        shown = said(metrics) if BEST in metrics else f"accuracy {metrics['eval_accuracy']:.4f}"
        say(f"[{name}] done in {result['seconds']:.1f} s, {shown}")


def _save_finished(setup: Setup, directory: Path, state: dict, steps: int, metrics: dict) -> None:
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
    if data.get("orientation", False):
        description["orientation"] = True
    if phase.student[-1] in phase.trainable:  # which gives the logits
        source = image_source(data, "train")
        description["class_names"] = list(source.class_names)
        if is_scenes(data):
            description["category_ids"] = list(source.categories)
            description["test_edges"] = list(evaluation_edges(data))
    save_weights(directory / "weights", trees, description)
