"""Where the weights of a phase's stages come from: fresh, finished jobs, or `config.init`.

A directory of weights is what a finished job leaves in DIR/jobs/JOB/weights (checkpoint/store.py).
"""

from __future__ import annotations

from pathlib import Path

import jax
from ml_collections import ConfigDict

from m2mkd_jax.checkpoint.store import load_weights
from m2mkd_jax.checkpoint.trees import match_tree
from m2mkd_jax.errors import UserError
from m2mkd_jax.models import chain
from m2mkd_jax.models.nac import priors, students
from m2mkd_jax.phases import Phase, Source, StageRecord

# Which `config.init` field stands for the weights of which job.
INIT_FIELD = {"pt": "meta", "ft": "teacher", "m2mkd": "students"}


def job_directory(workdir: Path, job: str) -> Path:
    return workdir / "jobs" / job


def weights_directory(config: ConfigDict, workdir: Path, job: str) -> Path:
    """The weights of `job`: those that `config.init` names, else those of this run.

    Raises:
        UserError: they are not there.
    """
    phase, _, index = job.partition("/")
    field = INIT_FIELD.get(phase, "network" if job == "e2e" else "")
    given = config.init[field] if field else ""
    if not given:
        path = job_directory(workdir, job) / "weights"
        if not path.is_dir():
            hint = f", or set config.init.{field}" if field else ""
            raise UserError(f"{workdir}: job {job} is not done; run it first{hint}")
        return path
    # A directory of weights, one subdirectory a student, or another run's directory.
    root = Path(given).expanduser()
    inside = [root / "jobs" / job / "weights"]
    inside += [root / index / "weights", root / index] if index else [root]
    for path in inside:
        if (path / "description.json").is_file():
            return path
    raise UserError(
        f"config.init.{field}: no weights of {job} in {root}; looked for "
        f"{', '.join(str(p / 'description.json') for p in inside)}"
    )


def _loaded(config: ConfigDict, workdir: Path, source: Source, shape: chain.SplitStage) -> dict:
    path = weights_directory(config, workdir, source.job)
    trees, _ = load_weights(path, [source.tree])
    expected = {"params": shape.params, "fixed": shape.fixed}
    expected = {name: tree for name, tree in expected.items() if tree}
    tree = match_tree(trees[source.tree], expected, f"{path}/{source.tree}")
    return {"params": tree["params"], "fixed": tree.get("fixed", {})}


def fresh_stage(config: ConfigDict, record: StageRecord, name: str, seed: int) -> dict:
    """{"params", "fixed"} of a stage before any training; a NAC's mediators get their graph."""
    key = jax.random.key(seed)
    for letter in name:  # the same stage starts alike in whatever job it appears
        key = jax.random.fold_in(key, ord(letter))
    stage = chain.initialise(record.build, key)
    params = stage.params
    if name == "nac":
        student = config.student
        if student.prior != "none":
            params["mediator_latents"]["signatures"] = priors.prior_signatures(
                student.prior,
                student.mediator_latents,
                student.signature_dim,
                dict(student.options),
                seed,
            )
    return {"params": params, "fixed": stage.fixed}


def _assembled(config: ConfigDict, workdir: Path, record: StageRecord, name: str, seed: int):
    fresh = fresh_stage(config, record, name, seed)
    taught = []
    for i in range(config.student.iterations + 2):
        path = weights_directory(config, workdir, f"m2mkd/{i}")
        trees, _ = load_weights(path, [f"student_{i}"])
        taught.append(trees[f"student_{i}"]["params"])
    params, origin = students.assemble(fresh["params"], taught)
    return {**fresh, "params": params}, origin


def load_stages(
    config: ConfigDict, workdir: Path, phase: Phase
) -> tuple[dict[str, dict], dict[str, str]]:
    """{stage: {"params", "fixed"}} for every stage of a phase, and where each came from.

    Raises:
        UserError: weights are missing, damaged, or of another shape.
    """
    stages, origin = {}, {}
    for name, record in phase.stages.items():
        if record.source.kind == "assembled" and config.init.network:
            source = Source("job", "e2e", name)
            stages[name] = _loaded(config, workdir, source, chain.abstract(record.build))
            origin[name] = config.init.network
        elif record.source.kind == "assembled":
            stages[name], parts = _assembled(config, workdir, record, name, phase.seed)
            origin |= {f"{name}/{part}": where for part, where in parts.items()}
        elif record.source.kind == "job":
            shape = chain.abstract(record.build)
            stages[name] = _loaded(config, workdir, record.source, shape)
            origin[name] = record.source.job
        else:
            stages[name] = fresh_stage(config, record, name, phase.seed)
            origin[name] = "fresh"
    return stages, origin
