"""What the job eval has measured beside accuracy: corrupted images, networks with parts removed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from m2mkd_jax.report.charts import COLOURS, DASHES, SERIES, SHAPES, Figure, draw, legend_below
from m2mkd_jax.report.records import RunRecord
from m2mkd_jax.report.tables import cell, percent, table

Networks = Mapping[str, Mapping[str, Any]]


def figures(run: RunRecord) -> list[str | Figure]:
    """Figures of corruptions and reductions; [] where the job eval has none."""
    job = run.jobs.get("eval")
    networks: Networks = job.result.get("networks", {}) if job else {}
    corrupted = {name: own for name, own in networks.items() if own.get("corruptions")}
    reduced = {name: own for name, own in networks.items() if own.get("reductions")}
    found: list[str | Figure] = []
    if corrupted:
        found += [_severities(corrupted), _kinds(corrupted)]
    if reduced:
        found += [_removed(reduced), _reductions(reduced)]
    return found


def _mean(own: Mapping[str, Any]) -> list[float]:
    """Accuracy by severity, the mean over kinds, from the images as they are (0) on."""
    levels = np.mean(list(own["corruptions"].values()), axis=0)
    return [own["eval_accuracy"], *levels.tolist()]


def _severities(networks: Networks) -> Figure:
    def plot(axes: Any) -> None:
        for number, (name, own) in enumerate(networks.items()):
            style = {"color": COLOURS[number % SERIES], "linestyle": DASHES[number % SERIES]}
            axes.plot(_mean(own), marker=SHAPES[number % SERIES], label=name, **style)
        axes.set_xlabel("severity (0: images as they are)")
        axes.set_ylabel("accuracy")
        legend_below(axes)

    spoken = "; ".join(
        f"{name} falls from {_mean(own)[0]:.3f} to {_mean(own)[-1]:.3f}"
        for name, own in networks.items()
    )
    return draw(
        "Accuracy on corrupted images",
        "Mean over the kinds of corruption. The flatter a line, the less a network minds.",
        f"Accuracy by severity: {spoken}.",
        plot,
    )


def _kinds(networks: Networks) -> str:
    kinds = list(next(iter(networks.values()))["corruptions"])
    rows = [
        [name, own["eval_accuracy"], own["corrupted_accuracy"]]
        + [float(np.mean(own["corruptions"].get(kind, np.nan))) for kind in kinds]
        for name, own in networks.items()
    ]
    return table(
        ("network", "as they are", "all kinds", *kinds),
        rows,
        "Accuracy on corrupted images. For each kind the mean over five severities.",
    )


def _lines(networks: Networks) -> dict[str, list[tuple[float, float]]]:
    """(FLOPs saved, accuracy) by network and what is removed, from the whole network on."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for name, own in networks.items():
        for entry in own["reductions"]:
            points = lines.setdefault(f"{name}: {entry['removed']}", [(0.0, own["eval_accuracy"])])
            points.append((100 * entry["flops_saved"], entry["eval_accuracy"]))
    return lines


def _removed(networks: Networks) -> Figure:
    lines = _lines(networks)

    def plot(axes: Any) -> None:
        for number, (name, points) in enumerate(lines.items()):
            style = {"color": COLOURS[number % SERIES], "linestyle": DASHES[number % SERIES]}
            marker = SHAPES[number % SERIES]
            axes.plot(*zip(*points, strict=True), marker=marker, label=name, **style)
        axes.set_xlabel("% of FLOPs saved")
        axes.set_ylabel("accuracy")
        legend_below(axes, 1)

    spoken = "; ".join(f"{name} ends at {points[-1][1]:.3f}" for name, points in lines.items())
    return draw(
        "Accuracy with parts removed",
        "The finished network without some of its parts, nothing trained again. A line that stays "
        "level: those parts can go; one that falls more than 'at random': the order is a bad one.",
        f"Accuracy with parts removed: {spoken}.",
        plot,
        size=(4.4, 3.4),
    )


def _reductions(networks: Networks) -> str:
    rows = [
        [
            name,
            entry["removed"],
            cell(str(entry["kept"]), entry["kept"]),
            entry["eval_accuracy"],
            percent(entry["flops_saved"]),
        ]
        for name, own in networks.items()
        for entry in own["reductions"]
    ]
    return table(
        ("network", "removed", "left", "accuracy", "FLOPs saved"),
        rows,
        "Networks with parts removed. 'left' is how many of the parts are.",
    )
