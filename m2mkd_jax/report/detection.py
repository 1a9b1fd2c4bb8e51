"""How detectors learn and what they find: losses, COCO's numbers, by class, and pictures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from m2mkd_jax.config.defaults import DETECTION_PHASES
from m2mkd_jax.evaluate.coco import NUMBERS
from m2mkd_jax.evaluate.intervals import interval, paired_gap
from m2mkd_jax.jobs.detection import PICTURES, TITLES
from m2mkd_jax.jobs.summary import DETECTION
from m2mkd_jax.report.charts import COLOURS, DASHES, SHAPES, Figure, draw, image_tag, legend_below
from m2mkd_jax.report.overview import gap_cells
from m2mkd_jax.report.records import JobRecord, RunRecord
from m2mkd_jax.report.tables import table

SIDE = 320  # pixels of a picture on the page
MOST = 8  # pictures of a detector
GIVEN, FRESH = DETECTION_PHASES
BACKBONES = {GIVEN: "trained backbone", FRESH: "fresh backbone"}
LOSSES = {
    "loss": "sum of the five losses",
    "loss_rpn_cls": "objectness of anchors",
    "loss_rpn_loc": "boxes of anchors",
    "loss_cls": "classes of proposals",
    "loss_box_reg": "boxes of proposals",
    "loss_mask": "masks",
}


def figures(run: RunRecord) -> list[str | Figure]:
    """Curves, tables and pictures of the detectors of a run; [] where none has begun."""
    begun = [job for phase in DETECTION_PHASES for job in run.of_phase(phase)]
    found: list[str | Figure] = []
    if any(job.curve("loss")[0] for job in begun):
        found.append(_losses(begun))
    if any(job.curve("eval_box_AP")[0] for job in begun):
        found.append(_precision(begun))
    jobs = [job for job in begun if "eval_box_AP" in job.metrics]
    if not jobs:
        return found
    if done := [job for job in jobs if job.status == "done"]:
        found.append(_over_seeds(done))
    found += [_numbers(jobs, title) for title in TITLES.values()]
    by_class = {j.name: j.result["per_class"] for j in jobs if j.result.get("per_class")}
    if by_class:
        found.append(_classes(by_class))
    return found + [figure for job in jobs if (figure := _pictures(run, job))]


def _lines(axes: Any, jobs: Sequence[JobRecord], name: str, shapes: bool = False) -> None:
    """A number of the log by step, a line for each detector."""
    named: set[str] = set()
    for job in jobs:
        number, first = DETECTION_PHASES.index(job.phase), job.phase not in named
        named.add(job.phase)
        axes.plot(
            *job.curve(name),
            linestyle=DASHES[number],
            marker=SHAPES[number] if shapes else None,
            color=COLOURS[number],
            alpha=1.0 if first else 0.55,
            label=BACKBONES[job.phase] if first else "_",
        )


def _ends(jobs: Sequence[JobRecord], name: str) -> str:
    """The last value of each curve, in words."""
    ends = {job.name: job.curve(name)[1] for job in jobs}
    return "; ".join(f"{job} ends at {values[-1]:.3f}" for job, values in ends.items() if values)


def _losses(jobs: Sequence[JobRecord]) -> Figure:
    def plot(panels: Any) -> None:
        flat = list(np.atleast_1d(panels).flat)
        for axes, (name, title) in zip(flat, LOSSES.items(), strict=True):
            _lines(axes, jobs, name)
            axes.set_title(title)
        for axes in flat[-3:]:
            axes.set_xlabel("step")
        legend_below(flat[-2])

    return draw(
        "Training losses, detectors",
        "Means between two lines of the log; a line is a detector, further seeds are paler. "
        "Anchors are the boxes that proposals are made from; masks are those of proposals.",
        f"Losses of detectors by step. {_ends(jobs, 'loss')}.",
        plot,
        size=(10.8, 5.2),
        panels=(2, 3),
        wide=True,
    )


def _precision(jobs: Sequence[JobRecord]) -> Figure:
    def plot(axes: Any) -> None:
        _lines(axes, jobs, "eval_box_AP", shapes=True)
        axes.set_xlabel("step")
        axes.set_ylabel("AP of boxes")
        legend_below(axes)

    return draw(
        "AP of boxes, detectors",
        "Points: measured on the test scenes; further seeds are paler.",
        f"AP of boxes by step. {_ends(jobs, 'eval_box_AP')}.",
        plot,
    )


def _over_seeds(jobs: Sequence[JobRecord]) -> str:
    """The main numbers of finished detectors of both kinds, over seeds and paired by seed."""
    rows = []
    for number in DETECTION:
        seeds: dict[str, dict[int, float]] = {}
        for job in jobs:
            if (value := _known(job.metrics.get(f"eval_{number}"))) is not None:
                seeds.setdefault(job.phase, {})[job.index] = value
        for phase, values in seeds.items():
            own = interval(list(values.values()))
            gap = paired_gap(values, seeds.get(FRESH, {})) if phase == GIVEN else None
            rows.append(
                [
                    f"{BACKBONES[phase]} ({phase})",
                    number.replace("_", " "),
                    len(values),
                    own["mean"],
                    own["interval95"],
                    *gap_cells(gap, len(values)),
                    ", ".join(f"{value:.4f}" for value in values.values()),
                ]
            )
    return table(
        ("detector", "number", "seeds", "mean", "± 95%", "minus fresh", "± 95%", "each seed"),
        rows,
        "Detectors on the test scenes, over seeds. ± is the half-width of the 95% Student "
        "interval, and needs two seeds; 'minus fresh' pairs detectors of the same seed, so that an "
        "interval without 0 is a difference that seeds do not explain.",
    )


def _numbers(jobs: Sequence[JobRecord], title: str) -> str:
    rows = [
        [job.name, *(_known(job.metrics.get(f"eval_{title}_{n}")) for n in NUMBERS)] for job in jobs
    ]
    return table(
        ("detector", *NUMBERS),
        rows,
        f"COCO's numbers of {'boxes' if title == 'box' else 'masks'} on the test scenes. AP: mean "
        "over overlaps from 0.50 to 0.95; s, m, l: objects below 32 x 32 pixels, up to 96 x 96, "
        "above; AR1, AR10, AR100: recall with as many detections an image.",
    )


def _known(value: Any) -> float | None:
    """A number of COCO's evaluation; -1 stands for nothing to measure."""
    return None if value is None or value < 0 else float(value)


def _classes(by_class: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    columns = [(job, title) for job in by_class for title in TITLES.values()]
    names = next(iter(by_class.values()))["box"]
    rows = [
        [name, *(_known(by_class[job][title].get(name)) for job, title in columns)]
        for name in names
    ]
    heads = ("class", *(f"{job}, {title}" for job, title in columns))
    return table(heads, rows, "AP by class, of boxes and masks.")


def _pictures(run: RunRecord, job: JobRecord) -> Figure | None:
    folder = run.path / "jobs" / job.name / PICTURES
    files = sorted(folder.glob("*.png"), key=lambda path: (len(path.stem), path.stem))[:MOST]
    tags = []
    for file in files:
        try:
            pixels = np.asarray(Image.open(file).convert("RGB"))
        except OSError:  # a picture that a kill cut off
            continue
        alt = f"test scene {file.stem} with the detections of {job.name}"
        tags.append(f"<li>{image_tag(pixels, alt, SIDE, SIDE // 2)}</li>")
    if not tags:
        return None
    return Figure(
        f"Detections, {html.escape(job.name)}",
        f'<ul class="samples">{"".join(tags)}</ul>',
        "Test scenes with boxes, masks, classes and scores of the detections.",
        wide=True,
    )
