"""What of config.detection is refused before any work."""

from __future__ import annotations

import importlib.util
import itertools

from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import DETECTION_PHASES
from m2mkd_jax.data.scenes import NAMES
from m2mkd_jax.detection import optimizer
from m2mkd_jax.detection.spec import DIVISIBLE_BY
from m2mkd_jax.errors import did_you_mean, located, require
from m2mkd_jax.models.moe import dispatch
from m2mkd_jax.phases.build import END_TO_END
from m2mkd_jax.phases.detection import DENSE, detection_recipe, detector_spec

RESIZES = ("jitter", "plain", "none")
LIBRARIES = ("pycocotools", "shapely")


def check_detection(config: ConfigDict, devices: int) -> None:
    """Refuses a detector that cannot be built or trained; nothing where no phase is about one.

    Args:
        config: from a config file.
        devices: how many devices the batch is cut over.

    Raises:
        UserError: one line that names the key.
    """
    if not set(DETECTION_PHASES) & set(config.phases):
        return
    section = config.detection
    require(
        config.data.channels == 3,
        f"config.data.channels is {config.data.channels}: detectors take scenes in RGB, 3 channels",
    )
    for name in LIBRARIES:
        require(
            importlib.util.find_spec(name) is not None,
            f"config.phases: detection needs {name}: pip install 'm2mkd_jax[detection]'",
        )
    phase = section.network.partition("/")[0]
    known = [*END_TO_END, DENSE]
    require(
        phase in known,
        f'config.detection.network: "{section.network}" is no job with a '
        f"network; {did_you_mean(phase, known)}",
    )
    _check_data(section.data)
    _check_recipe(config, devices)
    _check_model(config, devices)


def _check_data(data: ConfigDict) -> None:
    where, augment = "config.detection.data", data.augment
    require(
        data.name in NAMES,
        f'{where}.name: "{data.name}" is unknown; {did_you_mean(data.name, NAMES)}',
    )
    side = data.image_size
    require(
        side > 0 and side % DIVISIBLE_BY == 0 and data.classes > 0,
        f"{where} needs classes, and image_size as a multiple of {DIVISIBLE_BY}; it is {side}",
    )
    require(
        augment.resize in RESIZES,
        f'{where}.augment.resize: "{augment.resize}" is unknown; '
        f"{did_you_mean(augment.resize, RESIZES)}",
    )
    low, high = augment.scale
    require(low <= high, f"{where}.augment.scale is {augment.scale}; the smallest comes first")
    edges = (*augment.edges, augment.test_edge)
    require(
        augment.resize != "plain" or (augment.edges and max(edges) <= side),
        f"{where}.image_size is {side}; it must hold the edges {edges} of augment",
    )
    require(
        data.name != "digits_scene" or min(data.train_images, data.test_images) > 0,
        f"{where}: digits_scene makes as many scenes as train_images and test_images say; they "
        f"are {data.train_images} and {data.test_images}",
    )


def _check_recipe(config: ConfigDict, devices: int) -> None:
    where, recipe = "config.detection.recipe", detection_recipe(config)
    require(recipe.optimizer == "adamw", f'{where}.optimizer is "{recipe.optimizer}"; only adamw')
    require(recipe.epochs > 0, f"{where}.epochs is {recipe.epochs}; it must be above 0")
    require(
        0 <= recipe.warmup_epochs <= recipe.epochs,
        f"{where}.warmup_epochs is {recipe.warmup_epochs} of {recipe.epochs} epochs",
    )
    steps = (recipe.warmup_epochs, *recipe.milestones)
    require(
        all(a < b for a, b in itertools.pairwise(steps)),
        f"{where}.milestones are {recipe.milestones}; they must rise, from above warmup_epochs "
        f"{recipe.warmup_epochs:g}",
    )
    parts = recipe.accumulate * devices
    require(
        recipe.batch > 0 and recipe.batch % parts == 0,
        f"{where}.batch is {recipe.batch}; it must be above 0 and a multiple of {parts} "
        f"(accumulate {recipe.accumulate} x devices {devices})",
    )
    for key, rules in (
        ("layer_rule", optimizer.LAYER_RULES),
        ("decay_rule", optimizer.DECAY_RULES),
    ):
        require(
            recipe[key] in rules,
            f'{where}.{key}: "{recipe[key]}" is unknown; known: {", ".join(rules)}',
        )
    require(
        recipe.drop_path < 1 and recipe.ema < 1,
        f"{where}: drop_path {recipe.drop_path} and ema {recipe.ema} must be below 1",
    )


def _check_model(config: ConfigDict, devices: int) -> None:
    spec, model = detector_spec(config), config.detection.model
    window = model.window
    require(
        window > 0 or not model.global_blocks,
        f"config.detection.model.global_blocks is {model.global_blocks} and window is 0: every "
        "block is global",
    )
    vmoe, recipe = spec.backbone.vmoe, detection_recipe(config)
    if vmoe.moe_pos:
        with located("config.detection.recipe"):
            dispatch.count_groups(recipe.batch // recipe.accumulate, vmoe.group, devices)
