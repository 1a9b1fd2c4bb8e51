"""--dry_run: what would run, how large it is, and what is missing; needs no data and no memory.

Axes: B batch, H height, W width, K classes.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from m2mkd_jax import checks
from m2mkd_jax.evaluate.flops import count_flops, kept_bytes
from m2mkd_jax.job import compute_dtype
from m2mkd_jax.models import chain
from m2mkd_jax.parallel import partition
from m2mkd_jax.parallel.mesh import AXES, mesh_shape, on
from m2mkd_jax.parallel.process import say
from m2mkd_jax.phases import Phase, build_phase, select
from m2mkd_jax.pipeline import is_done, missing_data, needs

ADAM_COPIES = 2  # first and second moment


def dry_run(config: ConfigDict, workdir: Path, only: str = "") -> None:
    """Prints jobs, stages, sizes, costs, sharding and missing data.

    For the devices that are here, or, where config.mesh gives both numbers, for that many.

    Raises:
        UserError: the config cannot run.
    """
    mesh = planned_mesh(config)
    checks.check(config, mesh.size)
    here = len(jax.devices())
    say(f"{config.name}: {mesh.size} {jax.default_backend()} device(s)"
        + (f" (here {here})" if here != mesh.size else "")
        + f", compute type {compute_dtype(config.precision).name}")  # fmt: skip
    chosen = select(config, only)
    for job in chosen:
        status = "done" if is_done(workdir, job) else "to run"
        after = ", ".join(needs(config, job)) or "-"
        if job == "eval":
            say(f"\n{job}  [{status}]  after: {after}")
            continue
        phase = build_phase(config, job)
        recipe = phase.recipe
        say(
            f"\n{job}  [{status}]  after: {after}\n"
            f"  data {phase.data.name}, {phase.data.image_size} px, {phase.data.classes} classes; "
            f"{recipe.epochs} epochs of batch {recipe.batch}"
            + (f" in {recipe.accumulate} parts" if recipe.accumulate > 1 else "")
            + f", {recipe.optimizer} {recipe.lr:g}, decay {recipe.weight_decay:g}"
        )
        for line in describe_phase(config, phase, mesh):
            say(f"  {line}")
    for line in missing_data(config, chosen):
        say(f"\nmissing data: {line}")


def planned_mesh(config: ConfigDict) -> AbstractMesh:
    """The shape of the mesh, without its devices."""
    data, expert = config.mesh.data, config.mesh.expert
    devices = data * expert if min(data, expert) > 0 else len(jax.devices())
    return AbstractMesh(mesh_shape(devices, data, expert), AXES)


def describe_phase(config: ConfigDict, phase: Phase, mesh: AbstractMesh):
    """Lines on one training job."""
    shapes = {name: chain.abstract(r.build) for name, r in phase.stages.items()}
    program = phase.program(None, compute_dtype(config.precision), False)
    size = phase.data.image_size
    images = max(phase.recipe.batch // phase.recipe.accumulate // mesh.size, 1)
    # Of the devices that share the experts: what one does depends on how many they are.
    group = AbstractMesh((1, mesh.shape["expert"]), AXES)
    x = jax.ShapeDtypeStruct((images * group.size, size, size, 3), jnp.float32)
    for title, names in (("chain", phase.student), ("teacher", phase.teacher)):
        y = x
        for name in names if title == "chain" or program.teacher else ():
            y = _output(phase.stages[name].build, y.shape, y.dtype)
            mark = "train " if name in phase.trainable else "frozen"
            yield (
                f"{title:<8}{name:<11}{mark}  {phase.stages[name].title:<24}"
                f"-> {'x'.join(str(n) for n in ('B', *y.shape[1:])):<13}"
                f"{chain.count(shapes[name].params):>13,} parameters"
            )
    trainable = phase.trained({name: shape.params for name, shape in shapes.items()})
    total = sum(chain.count(shapes[name].params) for name in set(phase.student))
    yield f"parameters: {total:,} in the chain, {chain.count(trainable):,} trained"
    frozen = {
        name: {"params": chain_cast(s.params, program.dtype), "fixed": s.fixed}
        for name, s in shapes.items()
    }

    logits = on(group, program.logits)
    classes = jax.eval_shape(logits, trainable, frozen, x).shape[-1]

    def loss(params, frozen, images):
        target = jnp.zeros((len(images), classes))
        batch = {"image": images, "target": target}
        return on(group, program.loss)(params, frozen, batch, jax.random.key(0))[0]

    # At the real batch: what is computed once a step (codes) is shared by its images.
    forward = count_flops(logits, trainable, frozen, x) // len(x)
    step = count_flops(jax.value_and_grad(loss), trainable, frozen, x) // len(x)
    yield f"FLOPs per image: {_si(forward)} forward, {_si(step)} training"
    activations = kept_bytes(loss, trainable, frozen, x) // group.size
    held = functools.partial(bytes_held, mesh, config.mesh.fsdp)
    weights = held(trainable)
    copies = weights * ADAM_COPIES if phase.recipe.optimizer == "adamw" else weights
    still = sum(
        held(tree) for name, tree in frozen.items() if name not in phase.trainable
    )
    yield (
        f"memory per device: {_bytes(weights)} trained + {_bytes(weights)} gradients + "
        f"{_bytes(copies)} optimizer + {_bytes(still)} frozen + {_bytes(activations)} activations "
        f"({images} images)"
    )
    yield f"sharding: batch over {mesh.size} device(s) (data {mesh.shape['data']} x expert " + (
        f"{mesh.shape['expert']}); parameters of the chain: "
        + ", ".join(describe_sharding(mesh, config.mesh.fsdp, phase, shapes))
    )


@functools.cache  # most stages are the same in most jobs
def _output(build, shape: tuple[int, ...], dtype) -> jax.ShapeDtypeStruct:
    """Shape and type of what a stage makes of an input of this shape and type."""
    stage, x = chain.abstract(build), jax.ShapeDtypeStruct(shape, dtype)
    run = lambda p, f, x: chain.merge(stage.graph, p, f)(x)  # noqa: E731
    return jax.eval_shape(run, stage.params, stage.fixed, x)


def bytes_held(mesh: AbstractMesh, fsdp: bool, tree) -> int:
    """Bytes of a tree of shapes on one device."""
    return partition.bytes_per_device(tree, partition.shardings(mesh, tree, fsdp))


def describe_sharding(mesh: AbstractMesh, fsdp: bool, phase: Phase, shapes: dict):
    """How many parameters are cut over which axes."""
    tree = {name: shapes[name].params for name in set(phase.student)}
    kinds = Counter()
    places = jax.tree.leaves(partition.shardings(mesh, tree, fsdp))
    for leaf, place in zip(jax.tree.leaves(tree), places, strict=True):
        axes = [axis for axis in AXES if axis in place.spec and mesh.shape[axis] > 1]
        kinds[" and ".join(axes)] += leaf.size
    for axes, count in sorted(kinds.items()):
        yield f"{count:,} " + (f"over {axes}" if axes else "on every device")


def chain_cast(params: dict, dtype) -> dict:
    return jax.eval_shape(lambda p: chain.cast_compute(p, dtype), params)


def _si(number: int) -> str:
    if not number:
        return "0"
    power = min(int(math.log10(number)) // 3, 5)
    return f"{number / 1000**power:.3g} {['', 'k', 'M', 'G', 'T', 'P'][power]}".strip()


def _bytes(number: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if number < 1024:
            return f"{number:.4g} {unit}"
        number /= 1024
    return f"{number:.4g} GiB"
