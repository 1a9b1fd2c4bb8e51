"""The jobs in order: finished ones skipped, an interrupted one resumed, a summary at the end."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from scipy.special import stdtrit

from m2mkd_jax import checks
from m2mkd_jax.checkpoint.files import read_json, write_json
from m2mkd_jax.config import renditions_data
from m2mkd_jax.data.sources import describe_missing
from m2mkd_jax.errors import UserError
from m2mkd_jax.families import family
from m2mkd_jax.few_shot import run_few_shot
from m2mkd_jax.job import count_updates, evaluator, make_program, run_job, source
from m2mkd_jax.models import chain
from m2mkd_jax.parallel import partition
from m2mkd_jax.parallel.mesh import make_mesh, meet, spanning_groups
from m2mkd_jax.parallel.process import barrier, enable_compilation_cache, from_main, is_main, say
from m2mkd_jax.phases import build_phase, job_names, select
from m2mkd_jax.records import Source
from m2mkd_jax.weights import check_given, job_directory, load_stage, weights_directory

# A run may go on with other values of these: they do not change what a job computes.
HARMLESS = (
    "phases", "e2e_seeds", "log_every", "checkpoint_minutes", "evaluation.renditions", "mesh.",
    *(f"{data}.{key}" for data in ("data", "teaching_data", "few_shot.data")
      for key in ("root", "workers", "damaged_share")),
)  # fmt: skip


def run(config: ConfigDict, workdir: Path, only: str = "") -> dict:
    """Runs every job that is not done and returns the summary (also in workdir/summary.json).

    Raises:
        UserError: before any work where the input is wrong.
        Preempted: a signal arrived; the same command goes on from there.
    """
    mesh = make_mesh(data=config.mesh.data, expert=config.mesh.expert)
    checks.check(config, mesh.size)
    meet(mesh)
    chosen = select(config, only)
    todo = from_main(unfinished(config, workdir, chosen))
    check_data(config, todo)
    check_needs(config, workdir, todo)
    check_images(config, todo)
    check_partition(config, todo, mesh)
    if spanning_groups(mesh) > 1:
        say(f"mesh: a group of {config.mesh.expert} devices lies in {spanning_groups(mesh)} "
            "processes; its tokens cross the network between them")  # fmt: skip
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: {error.strerror}") from None
    if is_main():
        remember(config, workdir)
    enable_compilation_cache()
    try:
        for job in chosen:
            # Another process may have done it since: with --only they share a directory.
            if job not in todo or (job != "eval" and from_main(is_done(workdir, job))):
                say(f"[{job}] done already")
            elif job == "eval":
                evaluate_networks(config, workdir, mesh)
            elif job == "fewshot":
                run_few_shot(config, workdir, mesh)
            else:
                record = run_job(config, workdir, job, mesh)
                accuracy = record["metrics"]["eval_accuracy"]
                say(f"[{job}] done in {record['seconds']:.1f} s, accuracy {accuracy:.4f}")
    finally:  # an interrupted run has a summary too
        summary = summarise(config, workdir)
    return summary


def unfinished(config: ConfigDict, workdir: Path, chosen: list[str]) -> list[str]:
    """Those of the chosen jobs that are to run."""
    todo = [job for job in chosen if not is_done(workdir, job)]
    if "eval" in set(chosen) - set(todo) and not _evaluated(config, workdir):
        todo.append("eval")  # networks or renditions have come since
    return todo


def is_done(workdir: Path, job: str) -> bool:
    """Whether a job is finished. Raises UserError, before any work, where its record is damaged."""
    path = job_directory(workdir, job) / "done.json"
    if not path.is_file():
        return False
    if not isinstance(read_json(path), dict):
        raise UserError(f"{path} is not what a finished job leaves; delete it to run {job} again")
    return True


def _evaluated(config: ConfigDict, workdir: Path) -> bool:
    """Whether the finished job 'eval' has every network on all that it is asked for."""
    networks = read_json(job_directory(workdir, "eval") / "done.json")["networks"]
    wanted = {f"{name}_accuracy" for name in config.evaluation.renditions}
    return networks.keys() == set(needs(config, "eval")) and all(
        wanted <= metrics.keys()
        for job, metrics in networks.items()
        if build_phase(config, job).data == config.data
    )


def needs(config: ConfigDict, job: str) -> tuple[str, ...]:
    """Jobs that must be done before `job`; before 'eval', those whose networks it measures.

    They are the end-to-end ones, or where the run has none all networks that `config.init` names.
    """
    if job == "eval":
        networks = tuple(n for n in job_names(config) if n.startswith("e2e"))
        given = (("pt", "meta"), ("ft", "teacher"), ("e2e", "network"))
        return networks or tuple(name for name, field in given if config.init[field])
    phase = build_phase(config, job)
    needed = list(phase.needs)
    if phase.assembled and not config.init.network:
        needed += [f"m2mkd/{i}" for i in range(family(config).modules)]
    return tuple(needed)


def check_needs(config: ConfigDict, workdir: Path, todo: list[str]) -> None:
    """Refuses a job whose weights neither exist nor are about to be made, or do not fit.

    Raises:
        UserError: names the first such job.
    """
    for job in todo:
        for needed in needs(config, job):
            if needed not in todo:
                weights_directory(config, workdir, needed)
    training = [build_phase(config, job) for job in todo if job not in ("eval", "fewshot")]
    check_given(config, workdir, training)


def check_partition(config: ConfigDict, todo: list[str], mesh) -> None:
    """Raises UserError where the experts of a job that is to run cannot be dealt over the mesh."""
    if mesh.shape["expert"] == 1:
        return
    for job in todo:
        for record in () if job == "eval" else build_phase(config, job).stages.values():
            partition.shardings(mesh, chain.abstract(record.build).params, config.mesh.fsdp)


def missing_data(config: ConfigDict, jobs: list[str]) -> list[str]:
    """What stands between the jobs and their data: a line for each data set that is not there."""
    wanted = []  # and what says where each is
    for job in jobs:
        for reader in needs(config, "eval") if job == "eval" else (job,):
            data, key = build_phase(config, reader).data, "data"
            if reader == "fewshot":
                key = "few_shot.data"
            elif not reader.startswith("e2e") and config.teaching_data.name:
                key = "teaching_data"
            wanted.append((data, f"config.{key}.root"))
        for name in config.evaluation.renditions if job == "eval" else ():
            wanted.append((renditions_data(config, name), "$M2MKD_DATA"))
    lines = [(describe_missing(data), where) for data, where in wanted]
    return list(dict.fromkeys(line.replace("data.root", where) for line, where in lines if line))


def check_data(config: ConfigDict, todo: list[str]) -> None:
    """Raises UserError when the data of a job that is to run are not there."""
    if missing := missing_data(config, todo):
        raise UserError("; ".join(missing))


def check_images(config: ConfigDict, todo: list[str]) -> None:
    """Opens the images of all jobs that are to run, so that a later job's do not end the run late.

    Raises:
        UserError: they cannot be read, are not those of the config, or fewer than a batch.
    """
    for job in todo:
        if job == "eval":
            for name in needs(config, job):
                source(build_phase(config, name).data, "test")
        elif job != "fewshot":
            phase = build_phase(config, job)
            count_updates(config, phase)
            source(phase.data, "test")


def remember(config: ConfigDict, workdir: Path) -> None:
    """Writes workdir/config.json, or refuses to mix two configs in one directory."""
    path, now = workdir / "config.json", _plain(config)
    if path.is_file():
        before = read_json(path)
        if not isinstance(before, dict):
            raise UserError(f"{path} is no config; delete it or restore it")
        for key in sorted(set(_flat(before)) | set(_flat(now))):
            old, new = _flat(before).get(key), _flat(now).get(key)
            if old != new and not key.startswith(HARMLESS):
                raise UserError(
                    f"{workdir} holds a run with config.{key} = {old!r}, not {new!r}; use another "
                    "--workdir, or delete it"
                )
    write_json(path, now)


def _plain(config: ConfigDict) -> dict:
    return json.loads(config.to_json())


def _flat(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def evaluate_networks(config: ConfigDict, workdir: Path, mesh) -> None:
    """The job 'eval': networks (`needs`) from their finished weights, each on its test split."""
    began, metrics = time.monotonic(), {}
    for job in needs(config, "eval"):
        phase = build_phase(config, job)
        stages = {
            name: load_stage(
                config, workdir, Source("job", job, name), chain.abstract(phase.stages[name].build)
            )
            for name in phase.student
        }
        stages = partition.put(stages, partition.shardings(mesh, stages, config.mesh.fsdp))
        program = make_program(config, phase, stages)
        params = {name: stage["params"] for name, stage in stages.items()}
        result = evaluator(program, phase.data, config, mesh)(params, stages)
        for name in config.evaluation.renditions if phase.data == config.data else ():
            data = renditions_data(config, name)
            renditions = evaluator(program, data, config, mesh)(params, stages)
            result[f"{name}_accuracy"] = renditions["eval_accuracy"]
        metrics[job] = result
        say(f"[eval] {job}: accuracy {result['eval_accuracy']:.4f}")
    first = metrics.get("e2e", next(iter(metrics.values()), {}))
    record = {
        "name": "eval",
        "status": "done",
        "steps": 0,
        "seconds": round(time.monotonic() - began, 2),
        "metrics": {k: v for k, v in first.items() if k == "eval_accuracy"},
        "networks": metrics,
    }
    if is_main():
        directory = job_directory(workdir, "eval")
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "done.json", record)
    barrier("eval done")


def summarise(config: ConfigDict, workdir: Path) -> dict:
    """workdir/summary.json: every job, and the accuracies that matter side by side."""
    jobs = []
    for job in job_names(config):
        if is_done(workdir, job):
            jobs.append(read_json(job_directory(workdir, job) / "done.json"))
        else:
            checkpoints = job_directory(workdir, job) / "checkpoints"
            status = "interrupted" if checkpoints.is_dir() else "pending"
            saved = [int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal()]
            jobs.append({"name": job, "status": status, "steps": max(saved, default=0),
                         "seconds": 0.0, "metrics": {}})  # fmt: skip
    summary = {"name": config.name, "jobs": jobs, "results": results(jobs)}
    if is_main():
        write_json(workdir / "summary.json", summary)
    return summary


def results(jobs: list[dict]) -> dict:
    """Accuracies side by side: networks over seeds, the gap to scratch, pupils and teachers."""
    accuracy = {j["name"]: j["metrics"].get("eval_accuracy") for j in jobs if j["metrics"]}
    measured = {n: m for j in jobs for n, m in j.get("networks", {}).items()}  # given, not trained
    accuracy = {n: m["eval_accuracy"] for n, m in measured.items()} | accuracy
    found: dict = {}
    for name, title in (("pt", "meta"), ("ft", "teacher")):
        if name in accuracy:
            found[title] = accuracy[name]
    seeds: dict[str, list[float]] = {}
    for name, value in accuracy.items():
        if name.startswith("e2e"):
            seeds.setdefault(name.split("/")[0], []).append(value)
    for phase, values in seeds.items():
        found[phase] = interval(values)
    if {"e2e", "e2e_scratch"} <= seeds.keys():
        pairs = zip(seeds["e2e"], seeds["e2e_scratch"], strict=False)
        found["e2e_minus_scratch"] = interval([a - b for a, b in pairs])
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


def interval(values: list[float]) -> dict:
    """Mean and half-width of the 95% Student interval over seeds (None for one seed)."""
    half = None
    if len(values) > 1:
        spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
        half = float(stdtrit(len(values) - 1, 0.975)) * spread
    return {"mean": float(np.mean(values)), "interval95": half, "values": values}


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
    for name in ("meta", "teacher"):
        if name in summary["results"]:
            yield f"{name}: {summary['results'][name]:.4f}"
    for name, value in summary["results"].items():
        if isinstance(value, dict):
            half = value["interval95"]
            yield f"{name}: {value['mean']:.4f}" + (
                "" if half is None else f" +- {half:.4f} (95%, {len(value['values'])} seeds)"
            )


def print_summary(summary: dict) -> None:
    if is_main():
        print("\n".join(table(summary)), file=sys.stdout, flush=True)
