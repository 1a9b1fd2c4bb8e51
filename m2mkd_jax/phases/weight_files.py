"""Where the weights of a job are, and what is read from there: this run's, or `config.init`'s.

A directory of weights is what a finished job leaves in DIR/jobs/JOB/weights (checkpoint/store.py),
or what `python -m m2mkd_jax.convert` makes; `config.init` also takes torch and safetensors files.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from m2mkd_jax.conversion.arch_flag import job_fields, vit_fields
from m2mkd_jax.conversion.open_weights import (
    HUB,
    Weights,
    description_errors,
    local_path,
    open_weights,
)
from m2mkd_jax.conversion.torch_layouts import has_weights
from m2mkd_jax.errors import UserError
from m2mkd_jax.files.paths import at_home, in_bucket
from m2mkd_jax.models import registry
from m2mkd_jax.models.vit_spec import ViTSpec
from m2mkd_jax.phases.families import students, teacher
from m2mkd_jax.phases.phase import FRESH, WeightsFrom

# Which `config.init` field stands for the weights of which job.
INIT_FIELD = {
    "pt": "meta",
    "mt": "modules",
    "ft": "teacher",
    "m2mkd": "students",
    "e2e": "network",
}


def job_directory(workdir: Path, job: str) -> Path:
    return workdir / "jobs" / job


def init_path(config: ConfigDict, job: str) -> tuple[str, str]:
    """The field of `config.init` that stands for `job`, and the path in it ("": none)."""
    phase, _, index = job.partition("/")
    # Not for another seed's network, nor for the one that this run trains from it.
    own = phase == "e2e" and (index or "e2e" in config.phases)
    field = "" if own else INIT_FIELD.get(phase, "")
    return field, config.init[field] if field else ""


def weights_directory(config: ConfigDict, workdir: Path, job: str) -> Path:
    """The weights of `job`, a directory or a file: those that `config.init` names, else this run's.

    A network is given to be trained, too: where this run trains it, that is the one.

    Raises:
        UserError: they are not there.
    """
    field, given = init_path(config, job)
    path = job_directory(workdir, job) / "weights"
    if given:
        return _given_weights(job, field, given)
    if not _is_whole(path):
        if (path.parent / "done.json").is_file():
            raise UserError(
                f"{path} is missing, though {job} is done; restore it, or --redo={job} does it and "
                "what stands on it again"
            )
        phase = job.partition("/")[0]
        listed = "" if phase in config.phases else f' ("{phase}" in config.phases)'
        hint = listed + (f", or set config.init.{field}" if field else "")
        raise UserError(f"{workdir}: job {job} is not done; run it first{hint}")
    return path


def _is_whole(path: Path) -> bool:
    """Whether a job's weights are there; in a bucket half of them may be, without description."""
    return (path / "description.json").is_file() if in_bucket(path) else path.is_dir()


def _given_weights(job: str, field: str, given: str) -> Path:
    """Weights of `job` in what config.init.`field` names: another run's directory, one
    subdirectory a student, a directory of weights, or torch files."""
    root = local_path(given) if given.startswith(HUB) else at_home(given)
    index = job.partition("/")[2]
    inside = [root / "jobs" / job / "weights"]
    inside += [root / index / "weights", root / index] if index else []
    for path in [*inside, root]:
        if (path / "description.json").is_file():
            return path
    if has_weights(root):
        return root
    looked = ", ".join(str(p / "description.json") for p in [*inside, root])
    raise UserError(
        f"config.init.{field}: no weights of {job} in {root}; looked for {looked} and torch files"
    )


@functools.lru_cache(maxsize=4)
def _from_torch(path: Path, fields: str) -> Weights:
    try:
        return open_weights(path, fields=json.loads(fields))
    except UserError as error:  # which speaks to those who convert
        raise UserError(str(error).replace("--arch", "the config")) from None


def described(config: ConfigDict, job: str) -> dict[str, Any]:
    """What the weights of a job's network are described as (models/registry.py), but for the job.

    Raises:
        UserError: the config describes no such network.
    """
    phase, _, index = job.partition("/")
    if phase in ("pt", "mt", "ft"):
        whole = teacher(config)
        return whole.describe(whole.meta_depths if phase == "pt" else whole.depths)
    if phase == "m2mkd":
        return students(config).student(int(index)).describe
    return students(config).network(FRESH).describe


def _torch_fields(config: ConfigDict, job: str) -> dict[str, Any]:
    """What the config says about the network whose weights, in a torch file, stand for `job`.

    Raises:
        UserError: it is one of the user's own, whose parameters have no names in torch.
    """
    phase = job.partition("/")[0]
    if phase == "mt":  # the modules of one transformer
        job = phase = "ft"
    if phase in ("pt", "ft"):
        key, own = "teacher.family", bool(config.teacher.family)
    else:
        key, own = "family", config.family not in ("nac", "vmoe")
    if not own:
        return job_fields(config, job)
    describe = described(config, job)
    if describe.get("kind") != "vit" or "module" in describe:
        raise UserError(
            f"config.init.{INIT_FIELD[phase]}: torch files cannot be read into the networks of "
            f"config.{key}; give a directory of weights that a run has made"
        )
    spec = registry.spec_of(describe)
    assert isinstance(spec, ViTSpec)
    return vit_fields(spec) | {"depths": list(describe["depths"])}


def weights_path(config: ConfigDict, workdir: Path, job: str, initial: bool) -> Path:
    """Where the weights of `job` are; `initial`: those that config.init.network names."""
    if initial:
        return _given_weights(job, "network", config.init.network)
    return weights_directory(config, workdir, job)


def read_description(path: Path) -> Mapping[str, Any]:
    """What weights are described as; torch files: {}. Raises UserError where it is damaged."""
    whole = (path / "description.json").is_file()
    return open_weights(path).description if whole else {}


@dataclasses.dataclass(frozen=True)
class Recorded:
    """What weights record of the data that they were trained on.

    Attributes:
        path: of the weights.
        job: that trained them; "": converted ones, or nothing is recorded.
        normalisation: mean and std of the pixels; {}: not recorded.
        class_names: in the order of the logits; (): not recorded, or they give none.
    """

    path: Path
    job: str = ""
    normalisation: Mapping[str, tuple[float, ...]] = dataclasses.field(default_factory=dict)
    class_names: tuple[str, ...] = ()


def read_recorded(config: ConfigDict, workdir: Path, job: str, initial: bool = False) -> Recorded:
    """What weights record; of torch files nothing.

    Args:
        config: of the run.
        workdir: its directory.
        job: whose weights they are, or stand for.
        initial: those that config.init.network names, whatever this run has trained.

    Raises:
        UserError: they are not there, or the description is damaged.
    """
    path = weights_path(config, workdir, job, initial)
    description = read_description(path)
    if not description:
        return Recorded(path)
    with description_errors(path):
        return Recorded(
            path,
            description.get("job", ""),
            registry.normalisation(description),
            registry.class_names(description),
        )


def read_tree(config: ConfigDict, workdir: Path, weights: WeightsFrom) -> tuple[dict, str]:
    """The tree that `weights` (a job's, or given by config.init) names, and where it is from.

    Converted weights and those of other jobs may call a stage differently (module_2 for meta_2):
    then its number decides.

    Raises:
        UserError: the weights, or the tree among them, are not there or cannot be read.
    """
    initial = weights.kind == "init"
    job, name = "e2e" if initial else weights.job, weights.tree
    path = weights_path(config, workdir, job, initial)
    if (path / "description.json").is_file():
        found = open_weights(path)
    else:
        fields = _torch_fields(config, job)
        if config.init.fresh_head and (initial or job.startswith("mt/")):
            fields.pop("classes", None)
        found = _from_torch(path, json.dumps(fields))
    names = list(found.trees)
    same = [n for n in names if registry.index_of(n) == registry.index_of(name)]
    chosen = [name] if name in names else same if len(same) == 1 else names
    if len(chosen) != 1:
        raise UserError(f"{path} has no weights named {name!r}, only {', '.join(names)}")
    return found.trees[chosen[0]], f"{path}/{chosen[0]}"


def is_given(config: ConfigDict, weights: WeightsFrom) -> bool:
    """Whether weights are what config.init names."""
    return weights.kind == "init" or bool(
        weights.kind == "job" and init_path(config, weights.job)[1]
    )
