"""What detectors find: COCO's numbers, by class, and pictures."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from m2mkd_jax.config.defaults import DETECTION_PHASES
from m2mkd_jax.evaluate.coco import NUMBERS
from m2mkd_jax.jobs.detection import PICTURES, TITLES
from m2mkd_jax.report.charts import Figure, image_tag
from m2mkd_jax.report.records import JobRecord, RunRecord
from m2mkd_jax.report.tables import table

SIDE = 320  # pixels of a picture on the page
MOST = 8  # pictures of a detector


def figures(run: RunRecord) -> list[str | Figure]:
    """Tables and pictures of the detectors of a run; [] where none has been measured."""
    jobs = [
        job
        for phase in DETECTION_PHASES
        for job in run.of_phase(phase)
        if "eval_box_AP" in job.metrics
    ]
    if not jobs:
        return []
    found: list[str | Figure] = [_numbers(jobs, title) for title in TITLES.values()]
    by_class = {j.name: j.result["per_class"] for j in jobs if j.result.get("per_class")}
    if by_class:
        found.append(_classes(by_class))
    return found + [figure for job in jobs if (figure := _pictures(run, job))]


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
