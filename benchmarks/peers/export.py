"""A job of this package as files: what the PyTorch program of the same work needs to know.

job.json        stages, chains, loss, recipe
arrays.json     name of every parameter and fixed array -> its file
N.npy           the arrays, in PyTorch's layouts, under the names of the published networks
check.npz       images, targets, and our logits and loss of them without noise
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from ml_collections import ConfigDict

from m2mkd_jax.conversion.names import Entry, array_at, as_tuple, vit_stage_names, write_layout
from m2mkd_jax.conversion.names_nac import nac_names, nac_student_names
from m2mkd_jax.conversion.names_vmoe import vmoe_stage_names
from m2mkd_jax.jobs.setup import Setup
from m2mkd_jax.models import chain
from m2mkd_jax.models.moe.vmoe import VMoEStage
from m2mkd_jax.models.nac.circuit import NAC
from m2mkd_jax.models.nac.students import MediatorStudent, ReadInStudent, ReadOutStudent
from m2mkd_jax.models.vit import ViTStage
from m2mkd_jax.train.optimizer import decay_mask
from m2mkd_jax.train.step import with_fixed

GRAPH = "latent_graphs.0."  # what the published names of a NAC's graph begin with
STUDENTS = {ReadInStudent: "readin", MediatorStudent: "mediator", ReadOutStudent: "readout"}
RECIPE = ("mixup", "cutmix", "switch_prob", "mix_prob", "smoothing", "clip", "weight_decay", "lr")


def describe(module: chain.Stage) -> tuple[dict[str, Any], list[Entry]]:
    """What a stage (of shapes) is, and which tensor of it is which array."""
    ends = {}
    if isinstance(module, ViTStage | VMoEStage):
        ends = {"first": module.first, "last": module.last}
    if isinstance(module, ViTStage):
        spec, depth = module.spec, module.depth
        table = vit_stage_names(depth, **ends, qkv_bias=spec.qkv_bias)
        facts = {"kind": "vit", "depth": depth, **ends}
    elif isinstance(module, VMoEStage):
        spec, start, depth = module.spec, module.start, module.depth
        table = vmoe_stage_names(spec, start, depth, **ends)
        facts = {"kind": "vmoe", "start": start, "depth": depth, **ends}
    elif isinstance(module, NAC):
        spec, facts = module.spec, {"kind": "nac"}
        table = nac_names(spec)
    elif type(module) in STUDENTS:
        part = STUDENTS[type(module)]
        layer = module.read_in.attention if part == "readin" else module.layer.attention
        spec = layer.query.spec
        if part == "readin":
            stitch = module.post_stitch.kernel.shape[1]
        else:
            stitch = module.pre_stitch.kernel.shape[0]
        table = nac_student_names(spec, part)
        facts = {"kind": part, "stitch_dim": stitch, "codes": module.codes.shape}
        facts |= {"states": None if part == "mediator" else module.states.shape}
    else:
        raise ValueError(f"there is no peer of a {type(module).__name__}")
    return {**facts, "spec": dataclasses.asdict(spec)}, table


def stage_tables(setup: Setup) -> dict[str, tuple[dict[str, Any], list[Entry]]]:
    """`describe` of all stages of a job, by name."""
    builders = {name: spec.build for name, spec in setup.phase.stages.items()}
    return {n: describe(_shapes(build)) for n, build in builders.items()}


def _shapes(build: Callable[[nnx.Rngs], chain.Stage]) -> chain.Stage:
    parts = chain.abstract(build)
    return chain.merge(parts.graph, parts.params, parts.fixed)


def peer_name(stage: str, entry: Entry) -> str:
    """Name of a tensor among those of all stages."""
    return f"{stage}.{entry.torch.removeprefix(GRAPH)}"


def in_torch_layout(
    stage: str, facts: Mapping[str, Any], table: list[Entry], tree: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The arrays of a stage's nested dict by the peer's names."""
    spec = facts["spec"]
    patch, found = spec.get("vit", spec).get("patch", 0), {}
    whole: dict[tuple[str, ...], np.ndarray] = {}
    for entry in table:
        if entry.path not in whole:
            whole[entry.path] = np.asarray(array_at(tree, entry.path), np.float32)
        value = write_layout(whole[entry.path][as_tuple(entry.index)], entry, patch)
        value = value[0] if entry.layout == "expert" else value  # a layer of one expert
        found[peer_name(stage, entry)] = np.array(value, order="C")
    return found


def _check_supported(setup: Setup) -> None:
    """Raises ValueError where a job has a part that the peers lack."""
    recipe, phase, program = setup.phase.recipe, setup.phase, setup.program
    regulariser = phase.regulariser is not None
    if recipe.optimizer != "adamw" or recipe.ema or recipe.accumulate > 1 or phase.head:
        raise ValueError("the peers train whole stages by AdamW, without average or accumulation")
    if any(program.balance.values()) or program.kind not in ("none", "soft"):
        raise ValueError("the peers have no balance losses and no hard distillation")
    if regulariser and set(phase.stages) != {"nac"}:
        raise ValueError("the peers have the regulariser of a NAC alone")


def job_facts(setup: Setup, config: ConfigDict, stages: Mapping[str, Any]) -> dict[str, Any]:
    """What job.json holds but for the stages."""
    phase, program, data = setup.phase, setup.joined.single, setup.phase.data
    regulariser = None
    if phase.regulariser is not None:
        wanted = config.regulariser
        if wanted.kind != "hinge":
            raise ValueError(f"the peers have no regulariser {wanted.kind!r}")
        regulariser = {"weight": wanted.weight, "hinge": wanted.hinge}
    shapes = jax.eval_shape(setup.joined.split, setup.params)
    mask = decay_mask(shapes, phase.recipe.decay_rule)
    decayed = [
        peer_name(stage, entry)
        for stage in program.trainable
        for entry in stages[stage][1]
        if array_at(mask[stage], entry.path)
    ]
    return {
        "student": program.student,
        "teacher": program.teacher,
        "trainable": program.trainable,
        "shared": program.shared,
        "rates": program.rates,
        "alpha": program.alpha,
        "temperature": program.temperature,
        "regulariser": regulariser,
        "decayed": decayed,
        "recipe": {name: phase.recipe[name] for name in RECIPE},
        "mean": tuple(data.mean),
        "std": tuple(data.std),
        "erase": data.augment.erase,
        "image_size": data.image_size,
        "classes": data.classes,
    }


def check_inputs(setup: Setup, count: int = 2) -> dict[str, np.ndarray]:
    """Images (B, H, W, 3) and targets (B, K) of check.npz."""
    data, rng = setup.phase.data, np.random.default_rng(0)
    shape = (count, data.image_size, data.image_size, 3)
    return {
        "images": rng.normal(size=shape).astype(np.float32),
        "target": rng.dirichlet(np.ones(data.classes), count).astype(np.float32),
    }


def answers(setup: Setup, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Our logits, and our loss without noise."""
    # It runs once, and a CPU's compiler takes several times as long when it optimises.
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None

    @functools.partial(jax.jit, compiler_options=options)
    def run(params: dict, frozen: dict, images: jax.Array, target: jax.Array) -> tuple:
        logits = setup.program.logits(params, frozen, images)
        batch = {"image": images, "target": target}
        return logits, setup.program.loss(params, frozen, batch, None)[0]

    frozen = with_fixed(setup.frozen, setup.fixed)
    given = [jnp.asarray(inputs[name]) for name in ("images", "target")]
    logits, loss = run(setup.params, frozen, *given)
    return {"logits": np.asarray(logits), "loss": np.asarray(loss)}


def export(
    directory: Path,
    setup: Setup,
    config: ConfigDict,
    batch: int,
    predict: bool,
    known: Mapping[str, np.ndarray] | None = None,
) -> None:
    """Writes all files.

    Args:
        directory: an empty one.
        setup: of the job, its arrays not yet donated.
        config: of the run.
        batch: images per step.
        predict: whether an evaluation is timed in place of a training step.
        known: what check.npz holds; None: `check_inputs` and the `answers` to them.
    """
    _check_supported(setup)
    stages = stage_tables(setup)
    index: dict[str, str] = {}
    trained = setup.joined.split(setup.params)
    still = setup.joined.single_stages(setup.frozen)
    for name, (facts, table) in stages.items():
        tree = trained.get(name) or still[name]["params"]
        fixed = setup.fixed.get(name) or still.get(name, {}).get("fixed", {})
        arrays = in_torch_layout(name, facts, table, tree)
        arrays |= {f"{name}.{key}": np.asarray(value) for key, value in fixed.items()}
        for key, value in arrays.items():
            index[key] = f"{len(index)}.npy"
            np.save(directory / index[key], value)
    job = job_facts(setup, config, stages)
    job |= {"batch": batch, "predict": predict, "dtype": str(jnp.dtype(setup.program.dtype))}
    job |= {"stages": {name: facts for name, (facts, _) in stages.items()}}
    job |= {"trained_parameters": chain.count_parameters(setup.params)}
    frozen = [s["params"] for n, s in setup.frozen.items() if n not in setup.params]
    job |= {"frozen_parameters": chain.count_parameters(frozen)}
    (directory / "job.json").write_text(json.dumps(job, default=list))
    (directory / "arrays.json").write_text(json.dumps(index))
    if known is None:
        inputs = check_inputs(setup)
        known = inputs | answers(setup, inputs)
    np.savez(directory / "check.npz", **known)
