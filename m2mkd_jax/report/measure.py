"""Finished networks and modules on test images: what the report shows beyond the log.

Axes: N images, H height, W width, T tokens, D channels, K classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from m2mkd_jax.data.sources import load_source
from m2mkd_jax.errors import UserError
from m2mkd_jax.evaluate.similarity import linear_cka
from m2mkd_jax.jobs.run import has_test_images
from m2mkd_jax.models import chain
from m2mkd_jax.parallel import backend
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.phases.initial_weights import load_stage
from m2mkd_jax.phases.phase import Phase, WeightsFrom
from m2mkd_jax.train.batch import normalise

STITCHES = ("pre_stitch", "post_stitch")


@dataclasses.dataclass(frozen=True)
class Images:
    """Test images.

    Attributes:
        pixels: uint8 (N, H, W, C).
        labels: int (N,).
        class_names: in the order of the labels.
        data: of the config, for the normalisation.
        split: "test", or "held-out" where these are images of data.validation.
    """

    pixels: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]
    data: ConfigDict
    split: str = "test"

    @property
    def normalised(self) -> np.ndarray:
        """float32 (N, H, W, C)."""
        return np.asarray(normalise(jnp.asarray(self.pixels), self.data.mean, self.data.std))


def test_images(data: ConfigDict, count: int) -> Images:
    """At most `count` test images, evenly spread over the split, which may be sorted by class.

    Where there are none, those of data.validation. Damaged ones are left out, as in evaluation.

    Raises:
        UserError: the data are not there or cannot be read.
    """
    split = "test" if has_test_images(data) else "held-out"
    source = load_source(data, "test")
    chosen = np.unique(np.linspace(0, len(source) - 1, min(count, len(source))).round().astype(int))
    reader = source.reader()
    pixels = reader.evaluation_images(chosen, data.image_size)
    sound = ~np.isin(chosen, list(reader.replaced))
    if not sound.any():
        raise UserError(
            f"none of the {len(chosen)} {split} images that are looked at can be decoded; raise "
            "--images"
        )
    pixels, chosen = pixels[sound], chosen[sound]
    labels = np.asarray(reader.labels_of(chosen))
    return Images(pixels, labels, tuple(source.class_names), data, split)


@dataclasses.dataclass(frozen=True)
class LoadedStage:
    """A stage with its weights.

    Attributes:
        graph, params, fixed: see chain.SplitStage.
        batch: images that it runs on at a time. A NAC's students deal their random states over a
            batch: only with that of the evaluation are their outputs the same.
    """

    graph: Any
    params: dict
    fixed: dict
    batch: int

    @property
    def merged(self) -> Any:
        """The stage as a module."""
        return chain.merge(self.graph, self.params, self.fixed)

    def outputs(self, x: np.ndarray) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The stage's outputs for N inputs, in batches, and auxiliary outputs, their means."""
        pieces, auxiliary = [], []
        size = min(self.batch, len(x))
        for start in range(0, len(x), size):
            part = x[start : start + size]
            padded = np.concatenate([part, x[: size - len(part)]])
            y, aux = jax.device_get(_RUN(self.graph, self.params, self.fixed, padded))
            pieces.append(y[: len(part)])
            auxiliary.append(aux)
        means = jax.tree.map(lambda *own: np.mean(own, axis=0), *auxiliary)
        return np.concatenate(pieces), means


def _run(graph: Any, params: dict, fixed: dict, x: jax.Array) -> tuple[jax.Array, dict]:
    return chain.merge(graph, params, fixed).with_aux(x)


# One program for all stages of one structure: the meta model's middle modules share theirs.
_RUN = backend.jit(_run, static_argnums=0)


def run_chain(stages: Sequence[LoadedStage], x: np.ndarray) -> np.ndarray:
    """What a chain of stages gives for images or tokens."""
    for stage in stages:
        x = stage.outputs(x)[0]
    return x


class Weights:
    """Stages of a run with their finished weights, each read once.

    Args:
        config: of the run.
        workdir: its directory.
    """

    def __init__(self, config: ConfigDict, workdir: Path):
        self.config, self._workdir = config, workdir
        self._stages: dict[tuple[str, str], LoadedStage] = {}

    def stage(self, phase: Phase, name: str, job: str) -> LoadedStage:
        """A stage as a job has left it.

        Raises:
            UserError: there are no such weights, or they are damaged.
        """
        if (job, name) not in self._stages:
            shape = chain.abstract(phase.stages[name].build)
            found = load_stage(self.config, self._workdir, WeightsFrom("job", job, name), shape)
            batch = self.config.evaluation.batch
            self._stages[job, name] = LoadedStage(
                shape.graph, found["params"], found["fixed"], batch
            )
        return self._stages[job, name]

    def network(self, job: str) -> list[LoadedStage]:
        """The chain that a job has trained. Raises UserError as `stage`."""
        phase = build_phase(self.config, job)
        return [self.stage(phase, name, job) for name in phase.student]


def measure_modules(
    weights: Weights, images: Images, indices: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Each taught student inside the meta model, beside its teacher.

    Args:
        weights: of the run.
        images: of the teaching data.
        indices: of the students that are finished.

    Returns:
        By module number: student_accuracy and teacher_accuracy of the hybrids, agreement (share of
        the images that both put into the same class), cka (linear, of the modules' outputs, tokens
        averaged), stitches (Frobenius norm by name).

    Raises:
        UserError: weights that these stand on are not there.
    """
    config, found = weights.config, {}
    phases = {i: build_phase(config, f"m2mkd/{i}") for i in indices}
    every = len(next(iter(phases.values())).student)
    meta: dict[int, LoadedStage] = {}
    for phase in phases.values():
        for name in phase.student:
            if name.startswith("meta_") and (at := int(name.split("_")[1])) not in meta:
                meta[at] = weights.stage(phase, name, "pt")
    x = images.normalised
    for i in range(every):
        if i in phases:
            rest = [meta[j] for j in range(i + 1, every)]
            student = weights.stage(phases[i], f"student_{i}", f"m2mkd/{i}")
            teacher = imitated(weights, phases[i])
            ours, theirs = student.outputs(x)[0], teacher.outputs(x)[0]
            guess, taught = (run_chain(rest, y).argmax(-1) for y in (ours, theirs))
            found[str(i)] = {
                "student_accuracy": float((guess == images.labels).mean()),
                "teacher_accuracy": float((taught == images.labels).mean()),
                "agreement": float((guess == taught).mean()),
                "cka": linear_cka(_features(ours), _features(theirs)),
                "stitches": stitch_norms(student.params),
            }
        if i not in meta:
            break
        x = meta[i].outputs(x)[0]
    return found


def imitated(weights: Weights, phase: Phase) -> LoadedStage:
    """The module that a pair's student has imitated, from the job that the config takes it from."""
    (name,) = set(phase.teacher) - set(phase.student)
    return weights.stage(phase, name, phase.stages[name].weights.job)


def _features(outputs: np.ndarray) -> np.ndarray:
    """Tokens (N, T, D) averaged to (N, D); logits (N, K) as they are."""
    return outputs.mean(1) if outputs.ndim == 3 else outputs


def stitch_norms(params: Mapping[str, Any]) -> dict[str, float]:
    """Frobenius norms of a student's stitches: of each named pre_stitch or post_stitch."""
    found: dict[str, float] = {}

    def visit(tree: Mapping[str, Any]) -> None:
        for name, value in tree.items():
            if name in STITCHES:
                kernel = value.get("kernel", value.get("linear", {}).get("kernel"))
                if kernel is not None:
                    found[name] = float(np.linalg.norm(np.asarray(kernel, np.float64)))
            elif isinstance(value, Mapping):
                visit(value)

    visit(params)
    return found
