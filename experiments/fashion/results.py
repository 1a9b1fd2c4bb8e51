"""The table of the experiments, from the directories of their runs."""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from experiments.fashion.arms import SCRATCH, TAUGHT, TEACHERS, Compute, arms_of
from m2mkd_jax.checkpoint.files import replace_file, write_json
from m2mkd_jax.evaluate.intervals import interval, paired_gap
from m2mkd_jax.jobs.dry_run import job_costs, planned_mesh
from m2mkd_jax.jobs.summary import measured
from m2mkd_jax.jobs.units import si
from m2mkd_jax.phases.build import END_TO_END, build_phase
from m2mkd_jax.report.records import ARMS as TITLES
from m2mkd_jax.report.records import JobRecord, RunRecord, read_run

SHARES = (1 / 16, 1 / 4, 1 / 2)  # of the budget, at which accuracy is shown beside the end's


@functools.cache
def compute(base: Path) -> Compute:
    """FLOPs of the training steps of a finished base run."""
    run = read_run(base)
    mesh = planned_mesh(run.restored)

    def total(*phases: str) -> float:
        jobs = [job for phase in phases for job in run.of_phase(phase)]
        return sum(_flops(run, job, mesh) for job in jobs)

    network = _flops(run, run.of_phase(TAUGHT)[0], mesh)
    return Compute(total(*TEACHERS), total("m2mkd"), network)


def _flops(run: RunRecord, job: JobRecord, mesh: Any) -> float:
    phase = build_phase(run.restored, job.name)
    recipe, costs = phase.recipe, job_costs(run.restored, phase, mesh)
    kept = costs.targets * phase.views * phase.data.train_images  # once for each view
    return costs.training * (recipe.batch // recipe.accumulate) * job.steps + kept


def write(home: Path) -> None:
    """results.json and results.md of a family, from the runs that have finished networks.

    Args:
        home: directory of the runs, which has the family's name.
    """
    base = read_run(home / "base")
    scratch = _by_seed(base, SCRATCH)
    rows = [_row(base, phase, TITLES[phase], "", scratch) for phase in END_TO_END]
    for arm in arms_of(home.name).values():
        if (home / arm.name / "config.json").is_file():
            rows.append(_row(read_run(home / arm.name), arm.phase, arm.title, arm.name, scratch))
    rows = [row for row in rows if row["accuracy"]["values"]]
    found = {
        "config": base.config.get("name"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "seconds": {row["name"]: row["seconds"] for row in rows},
        "compute": dataclasses.asdict(compute(home / "base")),
        "meta": _accuracy(base, "pt"),
        "teacher": _accuracy(base, "ft"),
        "rows": rows,
    }
    write_json(home / "results.json", found)
    text = "\n".join(_lines(found))
    replace_file(home / "results.md", lambda path: _write(path, text))


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _accuracy(run: RunRecord, name: str) -> float | None:
    return run.jobs[name].accuracy if name in run.jobs else None


def _by_seed(run: RunRecord, phase: str) -> dict[int, float]:
    """Accuracy on the test images by seed, as the job eval has measured it."""
    found = measured([job.result for job in run.of_phase("eval")])
    return {job.index: found[job.name] for job in run.of_phase(phase) if job.name in found}


def _row(
    run: RunRecord, phase: str, title: str, name: str, scratch: Mapping[int, float]
) -> dict[str, Any]:
    """An arm's accuracies, and their gaps to scratch with the base run's budget."""
    own = _by_seed(run, phase)
    jobs = [job for job in run.of_phase(phase) if job.status == "done"]
    return {
        "name": name or phase,
        "title": title,
        "epochs": run.restored.recipes.e2e.epochs,
        "accuracy": interval(list(own.values())) if own else {"values": []},
        "gap": None if phase == SCRATCH and not name else paired_gap(own, scratch),
        "at": {str(share): _at(jobs, share) for share in SHARES},
        "seconds": sum(job.seconds for job in jobs),
    }


def _at(jobs: list[JobRecord], share: float) -> float | None:
    """Mean accuracy at the last evaluation within a share of the budget; None: there was none."""
    found = []
    for job in jobs:
        steps, values = job.curve("eval_accuracy")
        within = [v for s, v in zip(steps, values, strict=True) if s <= share * job.steps + 0.5]
        found += within[-1:]
    return sum(found) / len(found) if jobs and len(found) == len(jobs) else None


def _lines(found: dict[str, Any]) -> list[str]:
    """The table in Markdown."""
    lines = [
        f"Meta model {_shown(found['meta'])}, teacher {_shown(found['teacher'])}, of validation "
        "images, as are accuracies within the budget.",
        "FLOPs of all training steps: "
        + ", ".join(f"{name} {si(value)}" for name, value in found["compute"].items())
        + ".",
        "",
        "| network | epochs | seeds | after 1/16 | 1/4 | 1/2 | test images | gap to scratch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in found["rows"]:
        cells = [row["title"], f"{row['epochs']:g}", str(len(row["accuracy"]["values"]))]
        cells += [_shown(value) for value in row["at"].values()]
        cells += [_interval(row["accuracy"]), _interval(row["gap"], "+")]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, ""]


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _interval(found: Mapping[str, Any] | None, sign: str = "") -> str:
    if not found or not found["values"]:
        return ""
    half = found["interval95"]
    return f"{found['mean']:{sign}.4f}" + ("" if half is None else f" ± {half:.4f}")
