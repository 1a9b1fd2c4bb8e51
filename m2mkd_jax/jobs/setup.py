"""From a phase to what its training step is made of: program, state, step, frozen parameters.

Training, few-shot episodes, the dry run and the benchmarks all get theirs here.

Axes: B batch, H height, W width, K classes.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from m2mkd_jax.config.files import find_config, read_config
from m2mkd_jax.data.channels import image_shape
from m2mkd_jax.data.indices import balanced_weights
from m2mkd_jax.data.sources import describe_missing
from m2mkd_jax.detection import optimizer as detection_optimizer
from m2mkd_jax.detection.training import batch_shapes
from m2mkd_jax.jobs.fitting import FittingStep, in_two_programs
from m2mkd_jax.jobs.run import image_source
from m2mkd_jax.models import chain
from m2mkd_jax.parallel import backend, partition
from m2mkd_jax.parallel import mesh as meshes
from m2mkd_jax.phases.build import build_phase
from m2mkd_jax.phases.detection import DetectionPhase
from m2mkd_jax.phases.initial_weights import fresh_stage
from m2mkd_jax.phases.joined import Joined, join_neighbours
from m2mkd_jax.phases.phase import Phase
from m2mkd_jax.phases.program import Program
from m2mkd_jax.train.optimizer import make_optimizer
from m2mkd_jax.train.schedule import learning_rate
from m2mkd_jax.train.step import Step, initial_state, make_step
from m2mkd_jax.train.trained_parts import by_part

# Of the learning rate, where there are no data to count.
UPDATES_PER_EPOCH = 1000


def compute_dtype(precision: str) -> jnp.dtype:
    """The type of activations: config.precision, 'auto' being bfloat16 but on a CPU."""
    if precision == "auto":
        precision = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(precision)


def make_program(
    config: ConfigDict,
    phase: Phase,
    stages: dict[str, dict] | None = None,
    updates_per_epoch: int = UPDATES_PER_EPOCH,
) -> Program:
    """The phase's program.

    Args:
        config: of the run.
        phase: the phase.
        stages: its initial stages, to which a regulariser may be fitted; None: without regulariser.
        updates_per_epoch: optimizer updates in an epoch.
    """
    regulariser = None
    if phase.regulariser and stages is not None:
        initial = {
            name: chain.merge(
                chain.abstract(phase.stages[name].build).graph,
                stages[name]["params"],
                stages[name]["fixed"],
            )
            for name in (phase.trainable if phase.regulariser_fitted else ())
        }
        regulariser = phase.regulariser(initial)
    program = phase.program(
        regulariser,
        compute_dtype(config.precision),
        config.evaluation.sampled,
        updates=round(phase.recipe.epochs * updates_per_epoch),
    )
    return dataclasses.replace(program, class_weights=_class_weights(phase))


def _class_weights(phase: Phase) -> tuple[float, ...]:
    """Weights of the classes by the sizes that they have in training; (): the recipe has none.

    Nor has a dry run without data, where no number depends on them.
    """
    wanted = phase.recipe.get("class_weights", "none") != "none"
    if not wanted or describe_missing(phase.data) is not None:
        return ()
    labels = np.asarray(image_source(phase.data, "train").labels)
    return balanced_weights(labels, phase.data.classes)


def frozen_program(
    config: ConfigDict,
    phase: Phase,
    names: tuple[str, ...],
    stages: dict[str, dict],
    apart: Collection[str] = (),
    shared: Mapping[str, dict] | None = None,
) -> tuple[Program, dict]:
    """A chain of a phase's stages that is only evaluated.

    Args:
        config: of the run.
        phase: the phase.
        names: of the chain's stages.
        stages: {name: {"params", "fixed"}}, placed arrays.
        apart, shared: as for `set_up`.

    Returns:
        Its program, neighbouring stages joined, and what it takes for frozen.
    """
    whole = make_program(config, phase)
    single = Program(
        whole.graphs, names, (), dtype=whole.dtype, sampled_evaluation=whole.sampled_evaluation
    )
    joined = join_neighbours(single, stages, trained=False, apart=apart)
    shared, own = split_shared(joined, {name: stages[name] for name in names}, shared)
    cast = {
        name: {**stage, "params": chain.cast_compute(stage["params"], whole.dtype)}
        for name, stage in own.items()
    }
    return joined.program, shared | joined.stages(cast)


def split_shared(
    joined: Joined, stages: dict[str, dict], shared: Mapping[str, dict] | None
) -> tuple[dict[str, dict], dict[str, dict]]:
    """Those of the joined stages that exist already, and the single stages of all others."""
    shared = shared or {}
    reused = {name: shared[name] for name in joined.groups if name in shared}
    parts = {part for name in reused for part in joined.groups[name]}
    return reused, {name: stage for name, stage in stages.items() if name not in parts}


def partition_stages(
    phase: Phase, dtype: jnp.dtype, stages: dict[str, dict]
) -> tuple[dict, dict, dict]:
    """Stages {name: {"params", "fixed"}} in three parts, by stage.

    Returns:
        The parameters that are trained; the fixed arrays beside them; and what is frozen, its
        parameters in the compute type. Of a stage that is trained in part (Phase.head) the whole
        is among the frozen.
    """
    params = phase.trained({name: stages[name]["params"] for name in phase.trainable})
    fixed = {name: stages[name]["fixed"] for name in phase.trainable}
    frozen = {
        name: {"params": chain.cast_compute(s["params"], dtype), "fixed": s["fixed"]}
        for name, s in stages.items()
        if phase.head or name not in phase.trainable
    }
    return params, fixed, frozen


@dataclass(frozen=True)
class Setup:
    """What a phase's training step is made of; arrays, or shapes where nothing is to be computed.

    Attributes:
        phase: the phase.
        joined: its chains, neighbouring stages joined.
        params, fixed, frozen: see `partition_stages`, by joined stage.
        optimizer: the recipe's.
        rate: optimizer update -> learning rate.
        mesh: the devices; None: the first one alone.
        fsdp: cut large parameters over 'data'.
    """

    phase: Phase
    joined: Joined
    params: dict
    fixed: dict
    frozen: dict
    optimizer: optax.GradientTransformation
    rate: Callable
    mesh: Mesh | None
    fsdp: bool

    @property
    def program(self) -> Program:
        """The phase's loss and logits, on joined stages."""
        return self.joined.program

    def begin(self, params: dict, fixed: dict) -> dict:
        """The training state before the first step."""
        return initial_state(params, fixed, self.optimizer, self.phase.recipe)

    def on_mesh(self, function: Callable) -> Callable:
        """`function`, traced where layers find the mesh."""
        return function if self.mesh is None else meshes.with_mesh(self.mesh, function)

    @functools.cached_property
    def placement(self) -> Any:
        """Where the state's arrays lie; None with one device."""
        if self.mesh is None:
            return None
        shapes = jax.eval_shape(self.begin, self.params, self.fixed)
        return partition.shardings(self.mesh, shapes, self.fsdp)

    @functools.cached_property
    def abstract_state(self) -> dict:
        """Shapes and types of the state's arrays, and where they lie."""
        shapes = jax.eval_shape(self.begin, self.params, self.fixed)
        return shapes if self.mesh is None else jax.tree.map(_placed, shapes, self.placement)

    @property
    def abstract_frozen(self) -> dict:
        """Shapes and types of the frozen arrays, and where they lie."""
        if self.mesh is None:
            return jax.eval_shape(lambda tree: tree, self.frozen)
        where = partition.shardings(self.mesh, self.frozen, self.fsdp)
        return jax.tree.map(_placed, self.frozen, where)

    @property
    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of a batch from the host, and where it lies."""
        data, recipe = self.phase.data, self.phase.recipe
        images = recipe.batch // recipe.accumulate
        if isinstance(self.phase, DetectionPhase):
            batch = batch_shapes(data, images)
        else:
            batch = {
                "image": jax.ShapeDtypeStruct((images, *image_shape(data)), jnp.uint8),
                "label": jax.ShapeDtypeStruct((images,), jnp.int32),
            }
        if self.mesh is None:
            return batch
        where = meshes.batch_sharding(self.mesh)
        return jax.tree.map(lambda leaf: _placed(leaf, where), batch)

    def initial_state(self) -> dict:
        """The state before the first step; it takes over the buffers of `params` and `fixed`."""
        begin = backend.jit(
            self.begin,
            out_shardings=self.placement,
            donate_argnums=(0, 1),
            once=True,
        )
        return begin(self.params, self.fixed)

    def make_step(self, data: ConfigDict | None = None) -> FittingStep:
        """(state, frozen, batch) -> (state, metrics), compiled at its first call.

        Args:
            data: whose images are normalised how, and classes; by default the phase's.
        """
        phase = self.phase
        where = None
        if self.mesh is not None:
            where = (self.placement, meshes.replicated(self.mesh))

        def make(loss: Callable) -> Step:
            return make_step(
                self.on_mesh(loss),
                self.optimizer,
                phase.recipe,
                data or phase.data,
                phase.seed,
                out_shardings=where,
                apart=in_two_programs(self.params),
            )

        return FittingStep(phase.job, make, self.program.loss)


def _placed(leaf: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def set_up(
    config: ConfigDict,
    phase: Phase,
    stages: dict[str, dict],
    *,
    mesh: Mesh | None = None,
    updates_per_epoch: int = UPDATES_PER_EPOCH,
    params: dict | None = None,
    apart: Collection[str] = (),
    shared: Mapping[str, dict] | None = None,
) -> Setup:
    """Everything a phase's training step is made of.

    Args:
        config: of the run.
        phase: the phase.
        stages: {name: {"params", "fixed"}}, arrays or (jax.ShapeDtypeStruct) their shapes.
        mesh: the devices; None: the first one alone.
        updates_per_epoch: optimizer updates in an epoch.
        params: the trained parameters or their shapes, where they are not those of `stages`.
        apart: stages that are joined to no other.
        shared: frozen joined stages of another phase, by name, used where this one has the same.
    """
    leaves = jax.tree.leaves(stages)
    abstract = bool(leaves) and isinstance(leaves[0], jax.ShapeDtypeStruct)
    initial = None if abstract and phase.regulariser_fitted else stages
    program = make_program(config, phase, initial, updates_per_epoch)
    whole = not phase.head and phase.regulariser is None and not by_part(phase.recipe)
    joined = join_neighbours(program, stages, trained=whole, apart=apart)
    place = None
    if mesh is not None and not abstract:
        place = functools.partial(partition.shardings, mesh, fsdp=config.mesh.fsdp)
    separate = functools.partial(partition_stages, phase, program.dtype)
    reused, own = split_shared(joined, stages, shared)
    trained, fixed, still = jax.eval_shape(separate, own) if abstract else separate(own)
    trained = joined.join(trained, place) if params is None else params
    optimizer, rate = _optimizer(phase, updates_per_epoch, trained)
    return Setup(
        phase=phase,
        joined=joined,
        params=trained,
        fixed=joined.fixed(fixed),
        frozen=reused | joined.stages(still, place),
        optimizer=optimizer,
        rate=rate,
        mesh=mesh,
        fsdp=config.mesh.fsdp,
    )


def _optimizer(
    phase: Phase, updates: int, params: dict
) -> tuple[optax.GradientTransformation, Callable]:
    """The optimizer of a phase's recipe, and optimizer update -> learning rate."""
    recipe = phase.recipe
    if isinstance(phase, DetectionPhase):
        backbone = phase.detector.backbone
        rate = detection_optimizer.learning_rate(recipe, updates)
        return detection_optimizer.make_optimizer(recipe, updates, params, backbone), rate
    optimizer = make_optimizer(recipe, updates, params, phase.trainable)
    return optimizer, learning_rate(recipe, updates)


def abstract_stages(phase: Phase) -> dict[str, dict]:
    """Shapes of all stages of a phase: {name: {"params", "fixed"}}."""
    shapes = {name: chain.abstract(spec.build) for name, spec in phase.stages.items()}
    return {name: {"params": s.params, "fixed": s.fixed} for name, s in shapes.items()}


def fresh_setup(config: ConfigDict, job: str) -> Setup:
    """A job's training step on one device, every stage fresh, wherever it comes from in a run."""
    return _fresh_setup(config, build_phase(config, job))


def _fresh_setup(config: ConfigDict, phase: Phase) -> Setup:
    stages = {
        name: fresh_stage(config, spec, name, phase.seed) for name, spec in phase.stages.items()
    }
    return set_up(config, phase, stages)


def training_step(name: str | ConfigDict, job: str = "e2e_scratch") -> tuple[Setup, dict, Callable]:
    """A job's training step from a shipped config, on one device, with fresh weights.

    Args:
        name: of a shipped config or a path, or a config.
        job: such as "m2mkd/1" or "e2e_scratch".

    Returns:
        The setup, the state before the first step, and (state, setup.frozen, batch) ->
        (state, metrics); a batch is {"image": uint8 (B, H, W, 3), "label": int32 (B,)}.

    Raises:
        UserError: no such config, or one that describes no such job.
    """
    config = name if isinstance(name, ConfigDict) else read_config(find_config(name))
    phase, step = build_phase(config, job), None
    if phase.regulariser is None or not phase.regulariser_fitted:
        shapes = set_up(config, phase, abstract_stages(phase))
        step = shapes.make_step()
        step.compile_ahead(shapes.abstract_state, shapes.abstract_frozen, shapes.abstract_batch)
    setup = _fresh_setup(config, phase)
    return setup, setup.initial_state(), step or setup.make_step()
