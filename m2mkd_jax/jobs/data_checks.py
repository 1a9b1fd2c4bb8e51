"""Refuses data that are missing, or other than weights were trained on: pixel values, classes.

Finished weights record their normalisation and, where they give logits, the names of the classes in
the order of the logits (training.py). Converted weights record no classes, torch files nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import renditions_data
from m2mkd_jax.data.class_lists import PARENTS, wordnet_ids
from m2mkd_jax.data.scenes import describe_missing as missing_scenes
from m2mkd_jax.data.scenes import is_scenes
from m2mkd_jax.data.sources import describe_missing
from m2mkd_jax.errors import UserError, printable
from m2mkd_jax.jobs.plan import Kind, Plan, inputs_path, read_inputs
from m2mkd_jax.jobs.run import image_source
from m2mkd_jax.phases.detection import DetectionPhase
from m2mkd_jax.phases.families import students
from m2mkd_jax.phases.phase import Phase
from m2mkd_jax.phases.weight_files import init_path, read_recorded

CONVERTED = ", or convert with the right --mean and --std"  # advice on weights that no job made


@dataclass(frozen=True)
class _Use:
    """Weights that a job measures or starts from.

    Attributes:
        phase: whose data they meet.
        job: whose weights they are, or stand for.
        initial: they are what config.init.network names, whatever this run has trained.
        order_only: their logits are only a start, so that classes of other names will do.
        measured: they stay as they are.
    """

    phase: Phase
    job: str
    initial: bool = False
    order_only: bool = False
    measured: bool = False


def image_facts(phase: Phase, split: str = "train") -> dict[str, str]:
    """What there is of a job's images, which are opened, by the key of their section."""
    source = image_source(phase.data, split)
    names, labels = names_and_labels(source)
    known = hashlib.sha256(names + labels).hexdigest()[:8]
    what = "training" if split == "train" else split
    return {phase.data_key: f"{len(source)} {what} images (labels {known})"}


def names_and_labels(source: Any) -> tuple[bytes, bytes]:
    """Names of the classes of an image source, and its labels, in their order, as bytes."""
    names = "\n".join(source.class_names).encode("utf-8", "replace")
    return names, np.asarray(getattr(source, "labels", ()), np.int64).tobytes()  # scenes have none


def measured_images(phases: Iterable[Phase]) -> dict[str, str]:
    """What there is of the images on which networks are measured, by the keys of their sections."""
    return {key: what for phase in phases for key, what in image_facts(phase, "test").items()}


def check_same_images(
    plan: Plan, workdir: Path, todo: Collection[str], stale: Collection[str] = ()
) -> None:
    """Refuses jobs whose images are others than when they began, or what they stand on did.

    Args:
        plan: of the run.
        workdir: its directory.
        todo: the jobs that are to run; their images can be opened.
        stale: jobs that start again.

    Raises:
        UserError: one line that names the job and says what there was, and is.
    """
    now: dict[str, str] = {}
    for job in map(plan.job, todo):
        if job.kind is not Kind.EVALUATION and job.phase.data_key not in now:
            now |= image_facts(job.phase)
    for name in plan.closure(todo):
        measured = plan.job(name).kind is Kind.EVALUATION  # anew, of whatever is there
        if name in stale or measured or not inputs_path(workdir, name).is_file():
            continue
        for key, before in read_inputs(workdir, name)[1]["images"].items():
            if now.get(key, before) != before:
                raise UserError(
                    f"{workdir}: {name} was made with {before} of config.{key}, and there are "
                    f"{now[key]}; restore those, or --redo={name} does it and what stands on it "
                    "again"
                )


def check_normalisation(plan: Plan, workdir: Path, todo: Collection[str]) -> None:
    """Refuses jobs whose images are normalised otherwise than the weights that they begin with.

    Args:
        plan: of the run.
        workdir: its directory.
        todo: the jobs that are to run.

    Raises:
        UserError: one line that names both values, and the key to set.
    """
    for use in _uses(plan, todo):
        data, key = use.phase.data, use.phase.data_key
        if use.job in todo and not use.initial:
            made = plan.job(use.job).phase
            known, advice = _normalisation(made.data), ""
            turned: bool | None = made.data.get("orientation")
            origin = f"{use.job} is trained with config.{made.data_key}"
        else:
            recorded = read_recorded(plan.config, workdir, use.job, use.initial)
            known, advice = recorded.normalisation, "" if recorded.job else CONVERTED
            turned = recorded.oriented if recorded.job else None
            origin = f"the weights in {recorded.path} record"
        if use.measured and turned is not None and "orientation" in data:
            _check_orientation(key, data.orientation, turned, origin)
        given = use.initial or init_path(plan.config, use.job)[1]
        for field, value in _normalisation(data).items():
            wanted = known.get(field)
            if given and wanted and len(wanted) == 3 != len(value):
                continue  # their patch embedding is adapted to other channels
            if wanted and not (len(wanted) == len(value) and np.allclose(wanted, value, 0, 1e-6)):
                raise UserError(
                    f"config.{key}.{field} is {value} and {origin} {field} {wanted}: set "
                    f"config.{key}.{field}={wanted}{advice}"
                )


def _check_orientation(key: str, given: bool, known: bool, origin: str) -> None:
    """Refuses images that are turned as EXIF says for a network that is used to others."""
    if given != known:
        raise UserError(
            f"config.{key}.orientation is {given} and {origin} orientation {known}: set "
            f"config.{key}.orientation={known}"
        )


def check_classes(plan: Plan, workdir: Path, todo: Collection[str]) -> None:
    """Refuses jobs whose classes are not those of the logits that they begin with.

    Args:
        plan: of the run.
        workdir: its directory.
        todo: the jobs that are to run; their images can be opened.

    Raises:
        UserError: one line with the first class that differs.
    """
    for use in _uses(plan, todo):
        fresh_head = plan.job(use.phase.job).kind is Kind.FEW_SHOT
        fresh_head |= isinstance(use.phase, DetectionPhase) and use.job != use.phase.job
        if fresh_head:
            continue
        if plan.config.init.fresh_head and (use.initial or use.job.startswith("mt/")):
            continue
        if use.job in todo and not use.initial:
            known, origin = _names(plan.job(use.job).phase), use.job
        else:
            recorded = read_recorded(plan.config, workdir, use.job, use.initial)
            known, origin = recorded.class_names, f"the weights in {recorded.path}"
        if known:
            check_names(use.phase.data_key, _names(use.phase), known, origin, use.order_only)


def check_names(
    key: str,
    given: Sequence[str],
    known: Sequence[str],
    origin: str,
    order_only: bool = False,
) -> None:
    """Refuses classes that are not those of some logits.

    Args:
        key: of the section of the config whose classes they are.
        given: their names, in the order of the labels.
        known: names of the classes that the logits stand for; (): they are not known.
        origin: what says so, for the message.
        order_only: other names will do.

    Raises:
        UserError: one line with the first class that differs.
    """
    given, known = tuple(given), tuple(known)
    if known == given or len(known) != len(given) or _numbered(known) or _numbered(given):
        return
    reordered = sorted(known) == sorted(given)
    if order_only and not reordered:
        return
    i = next(i for i, (a, b) in enumerate(zip(known, given, strict=True)) if a != b)
    what = "the same classes in another order" if reordered else "other classes"
    advice = "name the classes so that they sort as then" if reordered else "use those classes"
    raise UserError(
        printable(
            f'config.{key} has {what}: class {i} is "{given[i]}", and "{known[i]}" in {origin}; '
            f"{advice}, or train again"
        )
    )


def _uses(plan: Plan, todo: Collection[str]) -> Iterator[_Use]:
    """The weights that jobs measure or start from, those of a data set once."""
    seen = set()
    for job in map(plan.job, todo):
        for phase in job.phases:
            for use in _of_phase(plan, phase, job.kind is Kind.EVALUATION):
                what = (use.job, use.initial, phase.data_key, use.order_only)
                if what not in seen:
                    seen.add(what)
                    yield use


def _of_phase(plan: Plan, phase: Phase, measured: bool) -> Iterator[_Use]:
    if measured:
        yield _Use(phase, phase.job, measured=True)
        return
    for weights in {stage.weights.kind: stage.weights for stage in phase.stages.values()}.values():
        if weights.kind == "init":
            yield _Use(phase, "e2e", initial=True)
        elif weights.kind == "assembled":
            for i in range(students(plan.config).modules):
                yield _Use(phase, f"m2mkd/{i}", order_only=True)
    for job in dict.fromkeys(s.weights.job for s in phase.stages.values() if s.weights.job):
        yield _Use(phase, job, measured=bool(phase.head))


def _normalisation(data: ConfigDict) -> Mapping[str, tuple[float, ...]]:
    return {field: tuple(map(float, data[field])) for field in ("mean", "std")}


def _names(phase: Phase) -> tuple[str, ...]:
    """The names of the classes that the logits of a phase's network stand for, in their order."""
    name: Any = phase.data.name
    if name in PARENTS:  # images of some of the network's classes
        return wordnet_ids(PARENTS[name])
    return tuple(image_source(phase.data, "validation").class_names)


def _numbered(names: Sequence[str]) -> bool:
    """Whether classes have no names but their numbers in shards (data/formats/tar.py)."""
    return all(name == f"{i:06d}" for i, name in enumerate(names))


def missing_data(plan: Plan, names: Iterable[str]) -> list[str]:
    """What stands between jobs and their data: a line for each data set that is not there."""
    wanted = []  # and what says where each is
    for job in (plan.job(name) for name in names):
        wanted += [(phase.data, f"config.{phase.data_key}.root") for phase in job.phases]
        if job.kind is Kind.EVALUATION:
            renditions = plan.config.evaluation.renditions
            wanted += [(renditions_data(plan.config, name), "$M2MKD_DATA") for name in renditions]
    lines = [(_missing(data), where) for data, where in wanted]
    return list(dict.fromkeys(line.replace("data.root", where) for line, where in lines if line))


def _missing(data: ConfigDict) -> str | None:
    return missing_scenes(data) if is_scenes(data) else describe_missing(data)
