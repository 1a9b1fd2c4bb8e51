"""summary.json of a run, and the table at its end."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from m2mkd_jax.checkpoint.checksums import SECONDS, saved_metrics
from m2mkd_jax.checkpoint.files import read_record, write_json
from m2mkd_jax.checkpoint.steps import latest_step
from m2mkd_jax.config.defaults import DETECTION_PHASES
from m2mkd_jax.evaluate.intervals import interval, paired_gap
from m2mkd_jax.jobs.locks import is_held
from m2mkd_jax.jobs.plan import Job, Kind, Plan, is_current, open_jobs
from m2mkd_jax.parallel.process import is_main
from m2mkd_jax.phases.build import END_TO_END
from m2mkd_jax.phases.weight_files import job_directory

CONFIG = "config.json"  # which a run leaves in its directory first
TITLES = {"pt": "meta", "ft": "teacher"}  # in the results, of phases of one network


def summarise(plan: Plan, workdir: Path) -> dict[str, Any]:
    """workdir/summary.json: every job, and the accuracies that matter side by side.

    A job's status is done, running (in another process), interrupted, pending, or not needed: what
    it was needed for is done. What eval has measured of other networks does not count. Steps and
    seconds of a job that is not done are those up to its newest checkpoint.
    """
    jobs, still_open = [], open_jobs(plan, workdir)
    for name in plan.names:
        directory = job_directory(workdir, name)
        if is_current(plan, workdir, name):
            jobs.append(read_record(directory / "done.json"))
            continue
        checkpoints = directory / "checkpoints"
        step = latest_step(checkpoints)
        saved = saved_metrics(checkpoints / str(step) / "state") if step else None
        status = "interrupted" if checkpoints.is_dir() else "pending"
        if name not in still_open:
            status = "not needed"
        elif is_held(directory):
            status = "running"
        jobs.append(
            {
                "name": name,
                "status": status,
                "steps": step,
                "seconds": round((saved or {}).get(SECONDS, 0.0), 2),
                "metrics": {},
            }
        )
    held_out = {n for n in plan.names if _validates(plan.job(n))}
    summary = {"name": plan.config.name, "jobs": jobs, "results": results(jobs, bool(held_out))}
    if held_out or any("validation" in j.get("splits", {}).values() for j in jobs):
        summary["accuracy_of"] = _accuracy_of(jobs, held_out)
    if is_main() and (workdir / CONFIG).is_file():  # else it has vanished, and is not made again
        write_json(workdir / "summary.json", summary)
    return summary


def _validates(job: Job) -> bool:
    """Whether a job looks at validation images in training, not at the test images."""
    return job.kind is Kind.TRAINING and bool(job.phase.data.get("validation"))


def results(jobs: list[dict], held_out: bool = False) -> dict:
    """Accuracies side by side: networks over seeds, the gap to scratch, students and teachers.

    Args:
        jobs: of the run, with their metrics.
        held_out: what jobs measured of the networks that they trained is of validation images, and
            gives way to what the job eval measured of test images.
    """
    accuracy = _trained(jobs)
    accuracy = accuracy | _tested(jobs) if held_out else measured(jobs) | accuracy
    found = _detection(jobs)
    for name, title in TITLES.items():
        if name in accuracy:
            found[title] = accuracy[name]
    seeds: dict[str, dict[int, float]] = {}
    for name, value in accuracy.items():
        phase, _, seed = name.partition("/")
        if phase in END_TO_END:
            seeds.setdefault(phase, {})[int(seed or 0)] = value
    for phase, values in seeds.items():
        found[phase] = interval(list(values.values()))
    gap = paired_gap(seeds.get("e2e", {}), seeds.get("e2e_scratch", {}))
    found |= {"e2e_minus_scratch": gap} if gap else {}
    found |= {j["name"]: interval(j["episodes"]) for j in jobs if "episodes" in j}
    hybrids = [j for j in jobs if "teacher_accuracy" in j["metrics"]]
    if hybrids:
        found["hybrids"] = [
            {
                "module": j["name"],
                "student": j["metrics"]["eval_accuracy"],
                "teacher": j["metrics"]["teacher_accuracy"],
            }
            for j in hybrids
        ]
    return found


def _trained(jobs: list[dict]) -> dict[str, float]:
    """The accuracies that jobs ended with, of the images that training looks at."""
    return {
        j["name"]: j["metrics"]["eval_accuracy"] for j in jobs if "eval_accuracy" in j["metrics"]
    }


def measured(jobs: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The accuracies that the job eval has measured, of its images."""
    networks = {n: own for job in jobs for n, own in job.get("networks", {}).items()}
    return {n: own["eval_accuracy"] for n, own in networks.items() if "eval_accuracy" in own}


def _tested(jobs: list[dict]) -> dict[str, float]:
    """Those of `measured` that stand in the results, where validation images are held out.

    Networks that are compared are measured on the same images: of the end-to-end ones all, or none.
    """
    found = measured(jobs)
    compared = {name for name in _trained(jobs) if name.partition("/")[0] in END_TO_END}
    left_out = set() if compared <= found.keys() else compared
    return {name: value for name, value in found.items() if name not in left_out}


def _accuracy_of(jobs: list[dict], held_out: Collection[str]) -> str:
    """Which images the accuracies are of.

    Args:
        jobs: of the run, with their metrics.
        held_out: the jobs that look at validation images.
    """
    splits = {name: split for job in jobs for name, split in job.get("splits", {}).items()}
    tested = [name for name, split in splits.items() if split == "test"]
    others = [n for n in _trained(jobs) if n not in (*held_out, "eval", "fewshot")]
    parts = ["validation images"]
    if splits and not tested:
        parts[0] += ", eval's too: there are no test images"
    if others:
        parts.append(f"of {', '.join(_phases(others))}: test images")
    if tested:
        measured_by = "eval" if len(tested) == len(splits) else f"eval's {_listed(tested)}"
        below = [n for n in _tested(jobs) if n in tested and n not in others]
        further = f", and of {_listed(below)} below" if below else ""
        parts.append(f"of {measured_by}{further}: test images")
    if "fewshot" in _trained(jobs):
        parts.append("of fewshot: the queries of its episodes")
    return "; ".join(parts)


def _listed(jobs: Iterable[str]) -> str:
    """The phases of some jobs by their titles."""
    return ", ".join(TITLES.get(phase, phase) for phase in _phases(jobs))


def _phases(jobs: Iterable[str]) -> list[str]:
    """The phases of some jobs, in order."""
    return list(dict.fromkeys(name.partition("/")[0] for name in jobs))


DETECTION = ("box_AP", "box_AP50", "mask_AP", "mask_AP50")


def _detection(jobs: list[dict]) -> dict:
    """The main numbers of detectors over seeds, such as detect_box_AP."""
    values: dict[str, list[float]] = {}
    for job in jobs:
        phase = job["name"].partition("/")[0]
        for name in DETECTION if phase in DETECTION_PHASES and job["metrics"] else ():
            values.setdefault(f"{phase}_{name}", []).append(job["metrics"][f"eval_{name}"])
    return {name: interval(own) for name, own in values.items()}


def table(summary: dict) -> Iterator[str]:
    """The summary as lines of text."""
    yield f"{'job':<16}{'status':<13}{'steps':>8}{'seconds':>10}{'accuracy':>10}{'reference':>11}"
    for job in summary["jobs"]:
        metrics = job["metrics"]
        shown = f"{metrics['eval_accuracy']:.4f}" if "eval_accuracy" in metrics else "-"
        reference = metrics.get("teacher_accuracy", metrics.get("meta_accuracy"))
        beside = f"{reference:.4f}" if reference is not None else ""
        yield (
            f"{job['name']:<16}{job['status']:<13}{job['steps']:>8}{job['seconds']:>10.1f}"
            f"{shown:>10}{beside:>11}"
        )
    if "accuracy_of" in summary:
        yield f"accuracy of the jobs: of {summary['accuracy_of']}"
    for name in ("meta", "teacher"):
        if name in summary["results"]:
            yield f"{name}: {summary['results'][name]:.4f}"
    for name, value in summary["results"].items():
        if isinstance(value, dict):
            half = value["interval95"]
            over = "episodes" if name == "fewshot" else "seeds"
            yield f"{name}: {value['mean']:.4f}" + (
                "" if half is None else f" +- {half:.4f} (95%, {len(value['values'])} {over})"
            )


def print_summary(summary: dict) -> None:
    if is_main():
        print("\n".join(table(summary)), file=sys.stdout, flush=True)
