"""Directories of runs that have trained nothing: what a run leaves, with numbers made up."""

import json
import runpy
from pathlib import Path

from m2mkd_jax.checkpoint.files import write_record

E2E = Path(__file__).parents[2] / "e2e"


def config(name="tiny"):
    return runpy.run_path(str(E2E / f"{name}.py"))["get_config"]()


def entries(steps, rate, routers=False):
    for step in range(5, steps + 1, 5):
        entry = {"step": step, "loss": 2.3 / step, "accuracy": 1 - rate / step, "lr": 1e-3}
        entry |= {"seconds_per_step": 0.1}
        if routers:
            entry["router/load"] = [[0.5, 0.5 - step / 100, step / 100, 0.0]] * 2
        yield entry


def add_job(workdir, name, accuracy=None, needs=(), steps=20, **metrics):
    """A job that is done, or without an accuracy, that was stopped."""
    folder = Path(workdir) / "jobs" / name
    folder.mkdir(parents=True)
    inputs = {"config": {"seed": 0}, "needs": {needed: "0" for needed in needs}}
    write_record(folder / "inputs.json", inputs)
    rows = list(entries(steps, 1.0, routers=name.startswith("e2e")))
    if accuracy is None:
        (folder / "metrics.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 25, "lo'
        )
        return
    rows.append({"step": steps, "eval_accuracy": accuracy, "eval_loss": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = {"name": name, "status": "done", "steps": steps, "seconds": 12.5}
    write_record(folder / "done.json", result | {"metrics": {"eval_accuracy": accuracy, **metrics}})


def add_run(workdir, seeds=3, students=3, **changes):
    """A run of the tiny config, as far as its end-to-end networks."""
    given = config()
    given.e2e_seeds = seeds
    given.update(changes)
    workdir.mkdir()
    (workdir / "config.json").write_text(given.to_json())
    add_job(workdir, "pt", 0.9)
    for i in range(3):
        add_job(workdir, f"mt/{i}", 0.88, ("pt",), meta_accuracy=0.9)
    add_job(workdir, "ft", 0.93, tuple(f"mt/{i}" for i in range(3)))
    for i in range(students):
        add_job(workdir, f"m2mkd/{i}", 0.8 + i / 100, ("pt", "ft"), teacher_accuracy=0.9)
    for seed in range(seeds if students == 3 else 0):
        suffix = f"/{seed}" if seed else ""
        add_job(workdir, f"e2e{suffix}", 0.95 + seed / 100, ("m2mkd/0", "m2mkd/1"))
        add_job(workdir, f"e2e_scratch{suffix}", 0.9 + seed / 50)
    return workdir
