"""What a run has done: its pipeline, results over seeds, costs, and how configs differ."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m2mkd_jax.config.defaults import PHASES
from m2mkd_jax.evaluate.intervals import interval, paired_gap
from m2mkd_jax.jobs.summary import measured
from m2mkd_jax.jobs.units import binary_size, si
from m2mkd_jax.phases.weight_files import INIT_FIELD
from m2mkd_jax.report.charts import COLOURS, INK, SHAPES, Figure, draw
from m2mkd_jax.report.records import ARMS, JobRecord, RunRecord
from m2mkd_jax.report.tables import (
    cell,
    duration,
    percent,
    shown_duration,
    table,
)

PHASE_TITLES = {
    "pt": "pt: the meta model learns the labels",
    "mt": "mt: each teacher module learns inside the frozen meta model",
    "ft": "ft: the teacher modules, assembled, are fine-tuned",
    "m2mkd": "m2mkd: each student module imitates its teacher module inside the meta model",
    "e2e": "e2e: the network assembled from the students is trained end to end",
    "e2e_scratch": "e2e_scratch: the same network from fresh weights",
    "e2e_kd": "e2e_kd: the same network, fresh, imitating the whole teacher's logits",
    "e2e_upcycled": "e2e_upcycled: the same network, its experts copied from the teacher",
    "detect": "detect: a detector is trained with the network of e2e as backbone",
    "detect_scratch": "detect_scratch: the same detector from fresh weights",
    "fewshot": "fewshot: fresh heads for classes that the network has not seen",
    "eval": "eval: finished networks measured again",
}
# What a phase stands on: its cost is charged to a network when teaching is charged too.
STANDS_ON = {
    "mt": ("pt",),
    "ft": ("mt",),
    "m2mkd": ("pt", "ft"),
    "e2e": ("m2mkd",),
    "e2e_kd": ("ft",),
    "e2e_upcycled": ("ft",),
}
WORDS_PER_STATUS = {
    "interrupted": "stopped before its end",
    "pending": "not begun",
    "running": "under way",
    "not needed": "not needed",
}


def pipeline(run: RunRecord) -> Figure:
    """The jobs in the order in which they run, phase by phase, as a list of lists."""
    rows = []
    for phase in PHASES:
        jobs = run.of_phase(phase)
        if jobs:
            cards = "".join(_card(job) for job in jobs)
            rows.append(
                f'<li><span class="phase">{html.escape(PHASE_TITLES[phase])}</span>{cards}</li>'
            )
    return Figure(
        "",
        f'<ol class="pipeline">{"".join(rows)}</ol>',
        "From top to bottom, each phase stands on those above it; a box is a job, with its "
        "accuracy on test images (with data.validation on those held out), behind the slash the "
        "accuracy that it is measured by (mt: the meta model's, m2mkd: the teacher hybrid's), its "
        "steps and its wall time. Of fewshot it is the mean over the queries of episodes, of eval "
        "that of its first network. Solid: done; dashed: begun; dotted: not begun or not needed.",
        wide=True,
    )


def _card(job: JobRecord) -> str:
    accuracy = "" if job.accuracy is None else f"{job.accuracy:.3f}"
    if job.reference is not None:
        accuracy += f" / {job.reference:.3f}"
    if "eval_box_AP50" in job.metrics:
        accuracy = f"box AP50 {job.metrics['eval_box_AP50']:.3f}"
    lines = [f"{job.steps} steps"] if job.steps else []
    lines += [shown_duration(job.seconds)] if job.seconds else []
    if job.status != "done":
        lines = [WORDS_PER_STATUS[job.status], *lines]
    return (
        f'<div class="job {job.status}"><b>{html.escape(job.name)}</b>'
        f'<span class="number">{accuracy}</span> {html.escape(", ".join(lines))}</div>'
    )


def by_seed(jobs: Sequence[JobRecord]) -> dict[int, float]:
    """Final accuracy by seed, of finished jobs."""
    return {j.index: j.accuracy for j in jobs if j.status == "done" and j.accuracy is not None}


def compared(run: RunRecord) -> tuple[dict[str, dict[int, float]], str]:
    """Accuracies of the finished end-to-end networks by phase and seed, and of which images.

    With data.validation they are of test images once the job eval has measured all of them, before
    that of those held out: never some of each.
    """
    arms = {phase: by_seed(jobs) for phase, jobs in run.arms().items()}
    arms = {phase: seeds for phase, seeds in arms.items() if seeds}
    if not run.config.get("data", {}).get("validation"):
        return arms, "test images"
    results = [job.result for job in run.of_phase("eval")]
    splits = {name: split for result in results for name, split in result.get("splits", {}).items()}
    tested = {n: value for n, value in measured(results).items() if splits.get(n) == "test"}
    names = {(phase, i): f"{phase}/{i}" if i else phase for phase in arms for i in arms[phase]}
    if not tested.keys() >= set(names.values()):
        return arms, "held-out images"
    arms = {p: {i: tested[names[p, i]] for i in seeds} for p, seeds in arms.items()}
    return arms, "test images"


def results(run: RunRecord) -> list[str | Figure]:
    """The end-to-end networks side by side; [] where none has finished."""
    arms, images = compared(run)
    if not arms:
        return []
    rows = []
    for phase, seeds in arms.items():
        own = interval(list(seeds.values()))
        gap = paired_gap(seeds, arms.get("e2e_scratch", {})) if phase != "e2e_scratch" else None
        rows.append(
            [
                f"{ARMS[phase]} ({phase})",
                len(seeds),
                own["mean"],
                _half_width(own),
                *gap_cells(gap, len(seeds)),
                ", ".join(f"{value:.4f}" for value in seeds.values()),
            ]
        )
    listed = table(
        ("network", "seeds", "accuracy", "± 95%", "minus scratch", "± 95%", "each seed"),
        rows,
        f"Accuracy at the end of the end-to-end budget, on {images}. ± is the half-width of the "
        "95% Student interval over seeds, and needs two; 'minus scratch' pairs networks of the "
        "same seed, so that an interval without 0 is a difference that seeds do not explain.",
    )
    return [_dots(arms), listed]


def gap_cells(gap: Mapping[str, Any] | None, seeds: int) -> list[Any]:
    """Cells of a paired gap and its half-width; how many pairs, where they are fewer than seeds."""
    if gap is None:
        return [None, None]
    pairs = len(gap["values"])
    beside = f" ({pairs} of {seeds} seeds)" if pairs < seeds else ""
    return [cell(f"{gap['mean']:+.4f}{beside}", gap["mean"]), _half_width(gap)]


def _half_width(found: Mapping[str, Any]) -> Any:
    return None if found["interval95"] is None else float(found["interval95"])


def _dots(arms: Mapping[str, Mapping[int, float]]) -> Figure:
    def plot(axes: Any) -> None:
        for place, (phase, seeds) in enumerate(arms.items()):
            number = list(ARMS).index(phase)
            own, values = interval(list(seeds.values())), list(seeds.values())
            spread = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [0.0]
            axes.scatter(
                np.add(place, spread), values, color=COLOURS[number], marker=SHAPES[number], s=28
            )
            if own["interval95"] is not None:
                axes.errorbar(
                    place + 0.25, own["mean"], own["interval95"], color=INK, fmt="_", capsize=4
                )
        axes.set_xticks(range(len(arms)), [ARMS[phase] for phase in arms])
        axes.set_xlim(-0.6, len(arms) - 0.3)
        axes.set_ylabel("accuracy")

    spoken = "; ".join(
        f"{ARMS[phase]} {interval(list(seeds.values()))['mean']:.4f}"
        for phase, seeds in arms.items()
    )
    return draw(
        "Networks at the end of the same end-to-end budget",
        "Each point is a seed. The bar beside them is the mean with its 95% Student interval, "
        "drawn from two seeds on.",
        f"Accuracy by network: {spoken}.",
        plot,
    )


def costs(run: RunRecord, found: Mapping[str, Mapping[str, float]]) -> str:
    """What each job cost.

    Args:
        run: the run.
        found: by job what the analysis has counted (`Analysis.costs`).
    """
    rows = []
    for job in run.jobs.values():
        own = found.get(job.name, {})
        planned, flops = own.get("memory"), job_flops(job, found)
        rows.append(
            [
                job.name,
                job.status,
                job.steps,
                duration(job.seconds) if job.seconds else None,
                cell(si(flops), flops) if flops else None,
                cell(binary_size(planned), planned) if planned else None,
                percent(job.accuracy),
            ]
        )
    return table(
        ("job", "status", "steps", "wall time", "FLOPs", "memory", "accuracy"),
        rows,
        "What it cost. FLOPs are those of the matrix products of all training steps, teacher and "
        "frozen stages (with distillation.views once for each view) included, evaluations not; "
        "memory is what the plan counts on one device. Jobs mt/i and m2mkd/i that trained in one "
        "program each show the time since that program began, so their times overlap; their FLOPs "
        "are those of each by itself, and together they took fewer.",
    )


def job_flops(job: JobRecord, found: Mapping[str, Mapping[str, float]]) -> float:
    """FLOPs of a job so far, by itself; 0: not counted."""
    own = found.get(job.name, {})
    once = own.get("flops_once", 0.0) if job.steps else 0.0
    return own.get("flops_per_step", 0.0) * job.steps + once


def _teaching(run: RunRecord, phase: str) -> tuple[list[str], list[str]]:
    """The phases of a run that a network of a phase stands on, and those of given weights.

    What the weights of `config.init` stand on themselves is no phase of this run, also where it
    has one of that name for other networks.
    """
    init, given = run.config.get("init", {}), set[str]()
    before_tuning = run.config.get("distillation", {}).get("teach_from") == "mt"
    found, todo = set[str](), [phase]
    while todo:
        standing = todo.pop()
        if standing == "e2e" and init.get(INIT_FIELD[standing]):
            given.add(standing)
            continue
        for below in STANDS_ON.get(standing, ()):
            if below == "ft" and standing == "m2mkd" and before_tuning:
                below = "mt"
            if init.get(INIT_FIELD[below]):
                given.add(below)
            elif below not in found:
                found.add(below)
                todo.append(below)
    return sorted(found, key=PHASES.index), sorted(given, key=PHASES.index)


def uncharged(run: RunRecord, phase: str, found: Mapping[str, Mapping[str, float]]) -> list[str]:
    """What a network of a phase stands on, and whose FLOPs are not known.

    Jobs that were deleted or have not begun, and phases whose weights came from elsewhere.
    """
    phases, given = _teaching(run, phase)
    missing = [f"{name} (config.init.{INIT_FIELD[name]})" for name in given]
    for teaching in phases:
        jobs = run.of_phase(teaching)
        missing += [job.name for job in jobs if not job_flops(job, found)]
        missing += [] if jobs else [teaching]
    return missing


def teaching_flops(run: RunRecord, phase: str, found: Mapping[str, Mapping[str, float]]) -> float:
    """FLOPs of the jobs that a network of a phase stands on, each by itself."""
    return sum(
        job_flops(job, found)
        for teaching in _teaching(run, phase)[0]
        for job in run.of_phase(teaching)
    )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def config_differences(runs: Sequence[RunRecord]) -> str:
    """The keys whose values differ between runs, as a table; "" for runs of one config."""
    flat = [_flat(run.config) for run in runs]
    absent = object()
    keys = sorted({key for own in flat for key in own})
    rows = []
    for key in keys:
        values = [own.get(key, absent) for own in flat]
        if any(value != values[0] for value in values):
            rows.append([key, *(None if v is absent else str(v) for v in values)])
    if not rows:
        return ""
    return table(
        ("key", *(str(run.path) for run in runs)),
        rows,
        "Config keys that differ. A dash: the run's config.json does not have the key.",
    )


def comparison(runs: Sequence[RunRecord]) -> str:
    """The end-to-end networks of several runs, as a table."""
    rows = []
    for run in runs:
        arms, images = compared(run)
        for phase, seeds in arms.items():
            own = interval(list(seeds.values()))
            row = [str(run.path), ARMS[phase], len(seeds), own["mean"], _half_width(own), images]
            rows.append(row)
    return table(
        ("run", "network", "seeds", "accuracy", "± 95%", "of"),
        rows,
        "Networks of all runs. Intervals are over the seeds of one run.",
    )
