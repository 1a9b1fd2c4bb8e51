"""The phases detect and detect_scratch: a detector on the transformer of a finished network.

Axes: B images, H height, W width.

Source: docs/detection.md#backbone, docs/detection.md#checkpoints.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import scaled_lr
from m2mkd_jax.conversion.name_tables import name_table
from m2mkd_jax.conversion.names import array_at, as_tuple
from m2mkd_jax.detection.detector import Detections, builder
from m2mkd_jax.detection.names import net_names
from m2mkd_jax.detection.spec import BackboneSpec, DetectorSpec, describe
from m2mkd_jax.detection.training import STAGE, make_detection, make_loss
from m2mkd_jax.errors import UserError, located
from m2mkd_jax.models import chain, registry
from m2mkd_jax.models.moe.spec import VMoESpec
from m2mkd_jax.models.vit_spec import ViTSpec
from m2mkd_jax.phases.families import students, teacher
from m2mkd_jax.phases.phase import FRESH, Phase, Regulariser, StageSpec, WeightsFrom
from m2mkd_jax.phases.program import Program, batch_of

# Names of the job whose network is the dense teacher.
DENSE = "ft"
BACKBONE_FIELDS = ("window", "global_blocks", "relative_positions", "channels")


@dataclass(frozen=True)
class DetectionProgram(Program):
    """What a detection phase computes: the losses of a batch of scenes, and detections.

    Attributes:
        mean, std: of the pixels, 0 to 1.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def loss(
        self, trainable: dict, frozen: dict, batch: dict, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """The sum of the five losses, and each; the batch is that of data/scene_batches.py."""
        key = jax.random.key(0) if key is None else key
        loss = make_loss(self.graphs[STAGE], self.mean, self.std, self.dtype)
        return loss(trainable, frozen, batch, key)

    def detect(self, params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> Detections:
        """The detections of {'image' (B, H, W, 3) uint8, 'size' (B, 2)}, in its pixels."""
        return make_detection(self.graphs[STAGE], self.mean, self.std, self.dtype)(params, batch)


@dataclass(frozen=True)
class SingleProgram:
    """A program as one of several by job, for a job that trains alone.

    Attributes:
        job: its name.
        program: what it computes.
    """

    job: str
    program: Program

    def loss(
        self, trainable: dict, frozen: dict, batch: dict, key: jax.Array | None
    ) -> tuple[jax.Array, dict[str, dict[str, jax.Array]]]:
        """As `JointProgram.loss`: parameters and metrics by job."""
        value, metrics = self.program.loss(
            trainable[self.job], frozen, batch_of(batch, self.job), key
        )
        return value, {self.job: metrics}


@dataclass(frozen=True)
class DetectionPhase(Phase):
    """A job that trains a detector on scenes.

    Attributes:
        spec: of the detector.
    """

    spec: DetectorSpec | None = None

    @property
    def detector(self) -> DetectorSpec:
        """The spec, which there always is."""
        assert self.spec is not None
        return self.spec

    def program(
        self,
        regulariser: Regulariser | None,
        dtype: jnp.dtype,
        sampled_evaluation: bool,
        updates: int = 1,
    ) -> DetectionProgram:
        """What is computed in this phase; of the arguments it depends on `dtype` alone."""
        del regulariser, sampled_evaluation, updates
        return DetectionProgram(
            graphs={STAGE: chain.abstract(self.stages[STAGE].build).graph},
            student=self.student,
            trainable=self.trainable,
            dtype=dtype,
            mean=tuple(self.data.mean),
            std=tuple(self.data.std),
        )


def detection_recipe(config: ConfigDict) -> ConfigDict:
    """config.detection.recipe with its learning rate scaled to the batch."""
    recipe = ConfigDict(config.detection.recipe.to_dict())
    if recipe.lr_per:
        recipe.lr = scaled_lr(recipe.lr, recipe.batch, recipe.lr_per)
    return recipe


def detection_phase(config: ConfigDict, job: str) -> DetectionPhase:
    """The phase of a job detect, detect/1, ..., or detect_scratch, ...

    Raises:
        UserError: the config describes no such detector.
    """
    name, _, index = job.partition("/")
    spec, section = detector_spec(config), config.detection
    taught = name == "detect"
    weights = WeightsFrom("backbone", section.network) if taught else FRESH
    kind = "V-MoE" if spec.backbone.vmoe.moe_pos else "ViT"
    seed = config.seed + int(index or 0)
    measured = ("evaluation_batch", "pictures", "seeds", "network")
    own = {key: value for key, value in section.items() if key not in measured}
    network = {"network": section.network} if taught else {}
    return DetectionPhase(
        job=job,
        data=section.data,
        data_key="detection.data",
        recipe=detection_recipe(config),
        recipe_key="detection.recipe",
        stages={STAGE: StageSpec(builder(spec), weights, f"Mask R-CNN on a {kind}")},
        student=(STAGE,),
        trainable=(STAGE,),
        seed=seed,
        describe=describe(spec),
        depends_on={
            "seed": seed,
            "precision": config.precision,
            "detection": own | network,
            **_network_fields(config),
        },
        spec=spec,
    )


def _network_fields(config: ConfigDict) -> dict[str, Any]:
    """What of a config the structure of the backbone depends on."""
    if config.detection.network == DENSE:
        return {"teacher": config.teacher}
    section = students(config).section
    return {"family": config.family} | ({section: config[section]} if section else {})


def backbone_network(config: ConfigDict) -> tuple[dict[str, StageSpec], dict[str, Any]]:
    """The stages of the network that becomes the backbone, and its description."""
    job = config.detection.network
    weights = WeightsFrom("job", job)
    if job == DENSE:
        whole = teacher(config)
        stages = {f"module_{i}": whole.module(i, weights) for i in range(whole.modules)}
        return stages, whole.describe(whole.depths)
    network = students(config).network(weights)
    return network.stages, network.describe


def detector_spec(config: ConfigDict) -> DetectorSpec:
    """The hyperparameters of the config's detector.

    Raises:
        UserError: its network is no vision transformer, or the fields do not fit together.
    """
    section, (_, description) = config.detection, backbone_network(config)
    kind = description.get("kind")
    if kind not in ("vmoe", "vit"):
        raise UserError(
            f'config.detection.network: "{section.network}" is a network of kind {kind}; a '
            "backbone is a V-MoE or a vision transformer"
        )
    found = registry.spec_of(description)
    if isinstance(found, ViTSpec):
        found = VMoESpec(found, moe_pos=(), experts=1, top_k=1)
    assert isinstance(found, VMoESpec)
    fields: dict[str, Any] = {
        key: tuple(value) if isinstance(value, tuple | list) else value
        for key, value in section.model.items()
    }
    own: dict[str, Any] = {key: fields.pop(key) for key in BACKBONE_FIELDS}
    with located("config.detection.model"):
        backbone = BackboneSpec(
            dataclasses.replace(found, vit=dataclasses.replace(found.vit, classes=0)),
            tuple(description["depths"]),
            # A dense network keeps the class token's row, which a V-MoE's backbone has not.
            class_position=kind == "vit",
            table_image_size=section.data.image_size,
            drop_path=section.recipe.drop_path,
            square=section.data.image_size,
            **own,
        )
        return DetectorSpec(backbone, section.data.classes, **fields)


def with_backbone(
    spec: BackboneSpec,
    params: Mapping[str, Any],
    description: Mapping[str, Any],
    trees: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """The parameters of a detector with the transformer of a trained network.

    Class token, final norm and head have no place in it; relative positions stay as they are.

    Args:
        spec: of the detector's backbone.
        params: of a fresh detector.
        description: of the network.
        trees: its parameters by stage.

    Raises:
        UserError: the network lacks a part of the transformer, or has one of another shape.
    """
    values = {}
    for name, tree in trees.items():
        for entry in name_table(description, name):
            values[f"net.{entry.torch}"] = array_at(tree, entry.path)[as_tuple(entry.index)]
    rows = values.get("net.pos_embed")
    if rows is not None and not spec.class_position:
        values["net.pos_embed"] = rows[:, 1:]
    whole = {"net": jax.tree.map(lambda leaf: leaf, params["net"])}
    for entry in net_names(spec):
        if ".attn.rel_pos_" in entry.torch:
            continue
        node, value = array_at(whole, entry.path[:-1]), values.get(entry.torch)
        last, at = entry.path[-1], as_tuple(entry.index)
        if not isinstance(node[last], np.ndarray):
            node[last] = np.empty(node[last].shape, node[last].dtype)
        wanted, name = node[last][at].shape, entry.torch.removeprefix("net.")
        if value is None or value.shape != wanted:
            shape = "missing" if value is None else f"of shape {value.shape}"
            raise UserError(f"{name} of the network is {shape}; the backbone has {wanted}")
        node[last][at] = np.asarray(value)
    return {**params, **whole}
