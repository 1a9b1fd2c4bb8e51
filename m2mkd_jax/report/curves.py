"""Learning curves, by step and by compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from m2mkd_jax.jobs.units import unit_of
from m2mkd_jax.report.charts import COLOURS, DASHES, INK, SERIES, SHAPES, Figure, draw, legend_below
from m2mkd_jax.report.overview import teaching_flops, uncharged
from m2mkd_jax.report.records import ARMS, JobRecord, RunRecord

Costs = Mapping[str, Mapping[str, float]]


def learning_curves(run: RunRecord) -> list[Figure]:
    """Losses and accuracies by step, for each group of phases that has begun."""
    figures = []
    arms = [job for jobs in run.arms().values() for job in jobs]
    groups = (
        ("end to end", arms, lambda job: list(ARMS).index(job.phase)),
        ("meta model and teacher", run.of_phase("pt") + run.of_phase("ft"), _by_phase),
        ("teacher modules in the meta model", run.of_phase("mt"), _by_index),
        ("students in the meta model", run.of_phase("m2mkd"), _by_index),
    )
    for title, jobs, series in groups:
        if any(job.entries for job in jobs):
            figures.append(_curves(f"Training loss, {title}", jobs, "loss", series))
            figures.append(_curves(f"Accuracy, {title}", jobs, "accuracy", series))
    return figures


def _by_phase(job: JobRecord) -> int:
    return {"pt": 0, "ft": 1}[job.phase]


def _by_index(job: JobRecord) -> int:
    return job.index % SERIES


def _curves(
    title: str, jobs: Sequence[JobRecord], name: str, series: Callable[[JobRecord], int]
) -> Figure:
    """A number of the log by step; for accuracy the measured ones as points."""

    def plot(axes: Any) -> None:
        named, drawn = set[str](), set[int]()
        for job in jobs:
            number, (steps, values) = series(job), job.curve(name)
            shown = ARMS.get(job.phase, job.name)  # seeds share a name, modules have their own
            label = "_" if shown in named else shown
            style: dict[str, Any] = {
                "color": COLOURS[number],
                "alpha": 0.55 if number in drawn else 1.0,
            }
            named.add(shown)
            drawn.add(number)
            axes.plot(steps, values, linestyle=DASHES[number], label=label, **style)
            if name == "accuracy":
                axes.plot(*job.curve("eval_accuracy"), SHAPES[number], **style)
        axes.set_xlabel("step")
        axes.set_ylabel(name)
        legend_below(axes)

    paler = ""
    if len({series(job) for job in jobs}) < len(jobs):
        paler = f" Paler: further seeds, or modules from number {SERIES} on."
    caption = (
        "Lines: training accuracy between two lines of the log, of augmented images under "
        "training noise. Points: test images (with data.validation those held out), measured."
        if name == "accuracy"
        else "Mean of the training loss between two lines of the log. Losses of different phases "
        "have different terms; compare those of one phase."
    )
    return draw(title, caption + paler, f"{title}. {_spoken(jobs, name)}", plot)


def _spoken(jobs: Iterable[JobRecord], name: str) -> str:
    """The last value of each curve, in words."""
    said = []
    for job in jobs:
        steps, values = job.curve(name)
        if steps:
            said.append(f"{job.name} ends at {values[-1]:.3f} after {steps[-1]} steps")
    return "; ".join(said[:12]) + "."


def against_compute(run: RunRecord, costs: Costs) -> list[Figure]:
    """Accuracy against FLOPs, teaching charged and not; [] where none are counted."""
    jobs = [
        job
        for arm in run.arms().values()
        for job in arm
        if costs.get(job.name, {}).get("flops_per_step") and _accuracies(job)[0]
    ]
    if not jobs:
        return []
    return [
        _compute(run, jobs, costs, charged=True),
        _compute(run, jobs, costs, charged=False),
    ]


def _accuracies(job: JobRecord) -> tuple[list[int], list[float]]:
    """Measured accuracies by step, the last one of the result included."""
    steps, values = job.curve("eval_accuracy")
    if job.status == "done" and job.accuracy is not None and job.steps not in steps:
        steps, values = [*steps, job.steps], [*values, job.accuracy]
    return steps, values


def _compute(run: RunRecord, jobs: Sequence[JobRecord], costs: Costs, charged: bool) -> Figure:
    ends = [
        (teaching_flops(run, job.phase, costs) if charged else 0.0)
        + job.steps * costs[job.name]["flops_per_step"]
        for job in jobs
    ]
    unit, prefix = unit_of(max(ends))

    def plot(axes: Any) -> None:
        named: set[str] = set()
        for job in jobs:
            number = list(ARMS).index(job.phase)
            before = teaching_flops(run, job.phase, costs) if charged else 0.0
            each = costs[job.name]["flops_per_step"]
            steps, values = job.curve("accuracy")
            label = "_" if job.phase in named else ARMS[job.phase]
            named.add(job.phase)
            scaled = [(before + step * each) / unit for step in steps]
            axes.plot(scaled, values, linestyle=DASHES[number], color=COLOURS[number], label=label)
            steps, values = _accuracies(job)
            scaled = [(before + step * each) / unit for step in steps]
            axes.plot(scaled, values, SHAPES[number], color=COLOURS[number])
        axes.set_xlabel(f"{prefix}FLOP, training steps")
        axes.set_ylabel("accuracy")
        axes.set_xlim(left=0)
        legend_below(axes)

    title = "Accuracy against compute, " + ("teaching included" if charged else "teaching given")
    spoken = "; ".join(
        f"{job.name} {_accuracies(job)[1][-1]:.3f} at {end / unit:.3g} {prefix}FLOP"
        for job, end in zip(jobs[:8], ends, strict=False)
    )
    return draw(
        title,
        "FLOPs of all training steps so far. "
        + (
            "A network starts where the phases that it stands on have ended (m2mKD: pt, mt, ft and "
            "m2mkd, all of them; kd and upcycled: pt, mt and ft): what a first run costs, each job "
            "by itself; modules that train in one program take less together."
            + _left_out(run, jobs, costs)
            if charged
            else "Phases before the end-to-end one are not charged: what it costs where teacher or "
            "students are there already."
        )
        + " Lines: training accuracy; points: measured accuracy.",
        f"{title}: {spoken}.",
        plot,
    )


def _left_out(run: RunRecord, jobs: Sequence[JobRecord], costs: Costs) -> str:
    """A sentence on teaching whose compute is not known, or nothing."""
    phases = dict.fromkeys(job.phase for job in jobs)
    missing = dict.fromkeys(name for phase in phases for name in uncharged(run, phase, costs))
    if not missing:
        return ""
    return (
        f" Not charged, because this directory does not have their steps: {', '.join(missing)}; "
        "networks that stand on these cost more than is shown."
    )


def routers(run: RunRecord) -> list[Figure]:
    """Load of each expert over time, and experts without any; [] without routers."""
    figures = []
    for job in run.jobs.values():
        entries = [e for e in job.entries if isinstance(e.get("router/load"), list)]
        if job.phase.startswith("e2e") and job.index == 0 and entries:
            figures.append(_load(job, entries))
            figures.append(_dead(job, entries))
    return figures


def _load(job: JobRecord, entries: Sequence[Mapping[str, Any]]) -> Figure:
    steps = [e["step"] for e in entries]
    layers, experts = len(entries[0]["router/load"]), len(entries[0]["router/load"][0])

    def plot(panels: Any) -> None:
        flat = list(np.atleast_1d(panels).flat)
        for layer, axes in enumerate(flat[:layers]):
            for expert in range(experts):
                values = [e["router/load"][layer][expert] for e in entries]
                number = expert % SERIES
                axes.plot(steps, values, linestyle=DASHES[number], color=COLOURS[number])
            axes.axhline(1 / experts, linewidth=0.8, color=INK)
            axes.set_title(f"layer {layer} with experts")
        for axes in flat[layers:]:
            axes.set_axis_off()

    columns = min(layers, 3)
    rows = -(-layers // columns)
    last = entries[-1]["router/load"]
    widest = max(max(layer) for layer in last)
    return draw(
        f"Load of each expert over time, {job.name}",
        "Share of the tokens' choices that each expert gets, a line an expert; the thin horizontal "
        "line is the even share. Lines that fall to 0 are experts that die out.",
        f"Load by expert, {layers} layers of {experts} experts; at the end the busiest expert has "
        f"{100 * widest:.0f}% of a layer's load, the even share is {100 / experts:.0f}%.",
        plot,
        size=(3.6 * columns, 2.4 * rows),
        panels=(rows, columns),
        wide=columns > 1,
    )


def _dead(job: JobRecord, entries: Sequence[Mapping[str, Any]]) -> Figure:
    steps = [e["step"] for e in entries]
    layers = len(entries[0]["router/load"])
    counts = [
        [sum(share == 0.0 for share in e["router/load"][layer]) for e in entries]
        for layer in range(layers)
    ]

    def plot(axes: Any) -> None:
        for layer, values in enumerate(counts):
            number = layer % SERIES
            axes.plot(
                steps,
                values,
                linestyle=DASHES[number],
                color=COLOURS[number],
                label=f"layer {layer}",
            )
        axes.set_xlabel("step")
        axes.set_ylabel("experts without any token")
        axes.set_ylim(bottom=-0.1)
        legend_below(axes, 4)

    ends = ", ".join(f"layer {i} {own[-1]}" for i, own in enumerate(counts))
    return draw(
        f"Dead experts, {job.name}",
        "Experts that got no token at all between two lines of the log. Dead experts are "
        "parameters that do nothing; importance_weight in the recipe works against them.",
        f"Dead experts at the end: {ends}.",
        plot,
    )
