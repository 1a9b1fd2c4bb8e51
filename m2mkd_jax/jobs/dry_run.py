"""--dry_run: what would run, how large it is, and what is missing; needs no data and no memory.

Axes: B batch, H height, W width, K classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from m2mkd_jax.data.channels import image_shape
from m2mkd_jax.detection.training import STAGE, batch_shapes
from m2mkd_jax.evaluate.flops import count_flops, kept_bytes
from m2mkd_jax.jobs.changes import check_same_config
from m2mkd_jax.jobs.checks import check_weights, validate
from m2mkd_jax.jobs.choice import choose
from m2mkd_jax.jobs.data_checks import missing_data
from m2mkd_jax.jobs.joint import JointSetup, keeps_targets
from m2mkd_jax.jobs.plan import (
    Job,
    Kind,
    is_current,
    open_jobs,
)
from m2mkd_jax.jobs.setup import Setup, abstract_stages, compute_dtype, set_up
from m2mkd_jax.jobs.time_left import detection_flops
from m2mkd_jax.jobs.units import binary_size, si
from m2mkd_jax.models import chain
from m2mkd_jax.parallel import backend, partition
from m2mkd_jax.parallel.mesh import AXES, mesh_shape, with_mesh
from m2mkd_jax.parallel.process import say
from m2mkd_jax.phases.detection import DetectionPhase
from m2mkd_jax.phases.phase import Phase
from m2mkd_jax.train.step import with_fixed


def dry_run(
    config: ConfigDict, workdir: Path, only: str = "", redo: str = "", extend: str = ""
) -> None:
    """Prints jobs, stages, sizes, costs, sharding and missing data.

    For the devices that are here, or, where config.mesh gives both numbers, for that many.

    Args:
        config: from a config file.
        workdir: directory of the run; nothing is written there.
        only: the jobs to tell about, "a,b"; by default all.
        redo: jobs that would start again.
        extend: jobs that would train for more epochs.

    Raises:
        UserError: the config cannot run.
    """
    mesh = planned_mesh(config)
    plan = validate(config, mesh.size)
    choice = choose(plan, workdir, only, redo, extend)
    check_same_config(plan, workdir, plan.names, choice.stale, choice.extended)
    here, backend = len(jax.devices()), jax.default_backend()
    beside = f" (here {here})" if here != mesh.size else ""
    dtype = compute_dtype(config.precision).name
    say(f"{config.name}: {mesh.size} {backend} device(s){beside}, compute type {dtype}")
    chosen, to_run = choice.chosen, open_jobs(plan, workdir, choice.again)
    # --only alone tells about some of the jobs of a whole run.
    wanted = choice.todo if choice.again else [name for name in plan.names if name in to_run]
    check_weights(plan, workdir, wanted, choice.again)
    for name in chosen:
        job = plan.job(name)
        done = name not in choice.again and is_current(plan, workdir, name)
        status = "done" if done else "to run" if name in to_run or only else "not needed"
        say(f"\n{name}  [{status}]  after: {', '.join(job.needs) or '-'}")
        if job.kind is not Kind.EVALUATION:
            for line in describe_job(config, job, mesh):
                say(f"  {line}")
    for line in missing_data(plan, chosen):
        say(f"\nmissing data: {line}")


def planned_mesh(config: ConfigDict) -> AbstractMesh:
    """The shape of the mesh, without its devices."""
    data, expert = config.mesh.data, config.mesh.expert
    devices = data * expert if min(data, expert) > 0 else len(jax.devices())
    return AbstractMesh(mesh_shape(devices, data, expert), AXES)


def describe_job(config: ConfigDict, job: Job, mesh: AbstractMesh) -> Iterator[str]:
    """Lines on one job that trains: its recipe, stages, costs and memory."""
    phase, recipe = job.phase, job.phase.recipe
    parts = f" in {recipe.accumulate} parts" if recipe.accumulate > 1 else ""
    yield (
        f"data {phase.data.name}, {phase.data.image_size} px, {phase.data.classes} classes; "
        f"{recipe.epochs} epochs of batch {recipe.batch}{parts}, {recipe.optimizer} "
        f"{recipe.lr:g}, decay {recipe.weight_decay:g}"
    )
    if isinstance(phase, DetectionPhase):
        yield from describe_detector(phase)
    else:
        setup = set_up(config, phase, abstract_stages(phase))
        _, x = _group_images(phase, mesh)
        yield from describe_stages(setup, x)
    yield describe_costs(job_costs(config, phase, mesh))
    shares = ", ".join(describe_sharding(mesh, config.mesh.fsdp, phase))
    yield (
        f"sharding: batch over {mesh.size} device(s) (data {mesh.shape['data']} x expert "
        f"{mesh.shape['expert']}); parameters of the chain: {shares}"
    )


def describe_stages(setup: Setup, x: jax.ShapeDtypeStruct) -> Iterator[str]:
    """A line for every stage of both chains, given images (B, H, W, C)."""
    phase, shapes = setup.phase, abstract_stages(setup.phase)
    for title, names in (("chain", phase.student), ("teacher", setup.joined.single.teacher)):
        y = x
        for name in names:
            y = _output(phase.stages[name].build, y.shape, y.dtype)
            mark = "train " if name in phase.trainable else "frozen"
            yield (
                f"{title:<8}{name:<11}{mark}  {phase.stages[name].title:<24}"
                f"-> {'x'.join(str(n) for n in ('B', *y.shape[1:])):<13}"
                f"{chain.count_parameters(shapes[name]['params']):>13,} parameters"
            )
    total = sum(chain.count_parameters(shapes[name]["params"]) for name in set(phase.student))
    yield f"parameters: {total:,} in the chain, {chain.count_parameters(setup.params):,} trained"


@dataclasses.dataclass(frozen=True)
class Costs:
    """What a job's training step takes.

    Attributes:
        forward, training: FLOPs per image, of an evaluation and of a step.
        weights, optimizer, frozen, activations: bytes on one device; gradients are as many as
            weights. The optimizer's are of its moments, accumulated gradients and moving average.
        images: of one device in a step.
        targets: FLOPs per image and view of what is kept, computed once before the first step.
    """

    forward: int
    training: int
    weights: int
    optimizer: int
    frozen: int
    activations: int
    images: int
    targets: int = 0

    @property
    def memory(self) -> int:
        """Bytes on one device."""
        return 2 * self.weights + self.optimizer + self.frozen + self.activations


def job_costs(config: ConfigDict, phase: Phase, mesh: AbstractMesh) -> Costs:
    """What a step of a phase takes on the devices of a mesh, counted without computing it."""
    setup = set_up(config, phase, abstract_stages(phase))
    group, x = _group_images(phase, mesh)
    with backend.counting():
        if isinstance(phase, DetectionPhase):
            return detector_costs(phase, setup, len(x), group, _held(config, mesh))
        return count_costs(setup, x, group, _held(config, mesh))


def _group_images(phase: Phase, mesh: AbstractMesh) -> tuple[AbstractMesh, jax.ShapeDtypeStruct]:
    """The devices that share the experts, and the images of a step that they get.

    What one of them does depends on how many they are.
    """
    recipe = phase.recipe
    images = max(recipe.batch // recipe.accumulate // mesh.size, 1)
    group = AbstractMesh((1, mesh.shape["expert"]), AXES)
    return group, jax.ShapeDtypeStruct((images * group.size, *image_shape(phase.data)), jnp.float32)


def _held(config: ConfigDict, mesh: AbstractMesh) -> Callable[[Any], int]:
    """A tree of shapes -> bytes on one device."""
    return functools.partial(bytes_held, mesh, config.mesh.fsdp)


def count_costs(
    setup: Setup, x: jax.ShapeDtypeStruct, group: AbstractMesh, held: Callable[[Any], int]
) -> Costs:
    """Counts FLOPs per image and memory per device.

    Args:
        setup: of the phase, shapes alone.
        x: images of the devices of `group`.
        group: devices that share the experts.
        held: a tree of shapes -> bytes on one device.
    """
    phase, program = setup.phase, setup.program
    params, frozen = setup.params, with_fixed(setup.frozen, setup.fixed)
    logits = with_mesh(group, program.logits)
    classes = jax.eval_shape(logits, params, frozen, x).shape[-1]
    own_loss, needed, rows = _loss_of(setup, x)

    def loss(params: dict, frozen: dict, rows: dict) -> jax.Array:
        batch = rows | {"target": jnp.zeros((len(x), classes)), "step": 0}
        return with_mesh(group, own_loss)(params, frozen, batch, jax.random.key(0))[0]

    weights = held(params)
    still = (tree for name, tree in needed.items() if name not in program.trainable)
    targets = 0
    if keeps_targets(phase):
        given = with_mesh(group, JointSetup({phase.job: setup}).program.given)
        targets = count_flops(given, setup.frozen, x) // len(x)
    return Costs(
        # At the real batch: what is computed once a step (codes) is shared by its images.
        forward=count_flops(logits, params, frozen, x) // len(x),
        training=count_flops(jax.value_and_grad(loss), params, needed, rows) // len(x),
        weights=weights,
        optimizer=_beside_weights(setup, held),
        frozen=sum(held(tree) for tree in still),
        activations=kept_bytes(loss, params, needed, rows) // group.size,
        images=len(x) // group.size,
        targets=targets,
    )


def _loss_of(setup: Setup, x: jax.ShapeDtypeStruct) -> tuple[Callable, dict, dict]:
    """The loss of a training step, the frozen stages that it takes, and what its batch has.

    Where the targets are kept, these are in the batch, and the stages that give them are not run.

    Args:
        setup: of the phase, shapes alone.
        x: images of a batch.
    """
    phase, program = setup.phase, setup.program
    if not keeps_targets(phase):
        return program.loss, with_fixed(setup.frozen, setup.fixed), {"image": x}
    joint = JointSetup({phase.job: setup})
    kept = joint.on_kept()
    rows = {
        name: jax.ShapeDtypeStruct((len(x), *leaf.shape[1:]), leaf.dtype)
        for name, leaf in joint.given_shapes.items()
    }

    def loss(params: dict, *arguments: Any) -> tuple[jax.Array, dict]:
        return kept.program.loss({phase.job: params}, *arguments)

    return loss, with_fixed(kept.frozen, setup.fixed), rows


def _beside_weights(setup: Setup, held: Callable[[Any], int]) -> int:
    """Bytes of what a training state has beside the weights: optimizer's state, moving average."""
    state = setup.abstract_state
    return held(state["opt_state"]) + held(state.get("ema", {}))


# Parts of a detector by their paths in its parameters.
PARTS = {
    "transformer": ("net",),
    "pyramid": ("pyramid",),
    "proposals": ("rpn",),
    "box head": ("heads", "box_head"),
    "box predictor": ("heads", "box_predictor"),
    "mask head": ("heads", "mask_head"),
}


def describe_detector(phase: DetectionPhase) -> Iterator[str]:
    """A line for every part of a detector, with its parameters."""
    stage = phase.stages[STAGE]
    params = chain.abstract(stage.build).params
    yield f"{stage.title}, images padded to {phase.data.image_size} px"
    for title, path in PARTS.items():
        yield f"{title:<15}{chain.count_parameters(chain.subtree(params, path)):>13,} parameters"
    yield f"parameters: {chain.count_parameters(params):,}, all trained"


def detector_costs(
    phase: DetectionPhase,
    setup: Setup,
    images: int,
    group: AbstractMesh,
    held: Callable[[Any], int],
) -> Costs:
    """`count_costs` of a detector; `images`: of the devices of `group`."""
    shapes = batch_shapes(phase.data, images)

    def loss(params: dict, batch: dict) -> jax.Array:
        return with_mesh(group, setup.program.loss)(params, {}, batch, jax.random.key(0))[0]

    weights = held(setup.params)
    return Costs(
        forward=detection_flops(phase),
        training=count_flops(jax.value_and_grad(loss), setup.params, shapes) // images,
        weights=weights,
        optimizer=_beside_weights(setup, held),
        frozen=0,
        activations=kept_bytes(loss, setup.params, shapes) // group.size,
        images=images // group.size,
    )


def describe_costs(costs: Costs) -> str:
    """FLOPs per image and memory per device, in two lines."""
    once = f", {si(costs.targets)} for each kept view, once" if costs.targets else ""
    return (
        f"FLOPs per image: {si(costs.forward)} forward, {si(costs.training)} training{once}\n"
        f"  memory per device: {binary_size(costs.weights)} trained + "
        f"{binary_size(costs.weights)} gradients + {binary_size(costs.optimizer)} optimizer "
        f"+ {binary_size(costs.frozen)} frozen + "
        f"{binary_size(costs.activations)} activations ({costs.images} images)"
    )


@functools.cache  # most stages are the same in most jobs
def _output(
    build: Callable[[nnx.Rngs], chain.Stage], shape: tuple[int, ...], dtype: jnp.dtype
) -> jax.ShapeDtypeStruct:
    """Shape and type of a stage's output for an input of this shape and type."""
    stage, x = chain.abstract(build), jax.ShapeDtypeStruct(shape, dtype)

    def run(params: dict, fixed: dict, x: jax.Array) -> jax.Array:
        return chain.merge(stage.graph, params, fixed)(x)

    return jax.eval_shape(run, stage.params, stage.fixed, x)


def bytes_held(mesh: AbstractMesh, fsdp: bool, tree: Any) -> int:
    """Bytes of a tree of shapes on one device."""
    return partition.bytes_per_device(tree, partition.shardings(mesh, tree, fsdp))


def describe_sharding(mesh: AbstractMesh, fsdp: bool, phase: Phase) -> Iterator[str]:
    """How many parameters are cut over which axes."""
    shapes = abstract_stages(phase)
    tree = {name: shapes[name]["params"] for name in set(phase.student)}
    kinds: Counter[str] = Counter()
    places = jax.tree.leaves(partition.shardings(mesh, tree, fsdp))
    for leaf, place in zip(jax.tree.leaves(tree), places, strict=True):
        cut = [axis for axis in AXES if axis in place.spec and mesh.shape[axis] > 1]
        kinds[" and ".join(cut)] += leaf.size
    for axes, count in sorted(kinds.items()):
        yield f"{count:,} " + (f"over {axes}" if axes else "on every device")
