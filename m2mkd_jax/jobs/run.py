"""A run: its config, directory and devices, and the data that its jobs read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from m2mkd_jax.data.pipeline import batch_indices
from m2mkd_jax.data.scenes import is_scenes, load_scenes
from m2mkd_jax.data.sources import has_test, load_source
from m2mkd_jax.errors import UserError, located
from m2mkd_jax.parallel import partition
from m2mkd_jax.phases.phase import Phase
from m2mkd_jax.phases.weight_files import job_directory

_IMAGES: dict[str, Any] = {}


@dataclass(frozen=True)
class Run:
    """A run: its config, directory and devices."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh

    def directory(self, job: str) -> Path:
        """Where a job keeps what it makes."""
        return job_directory(self.workdir, job)

    def shardings(self, tree: Any) -> Any:
        """Where the arrays (or shapes) of a tree lie on the mesh."""
        return partition.shardings(self.mesh, tree, self.config.mesh.fsdp)


def image_source(data: ConfigDict, split: str) -> Any:
    """A data set's images or scenes, opened once per process however many jobs read them."""
    if split == "validation" and not data.get("validation"):
        split = "test"
    key = f"{split} {data.to_json()}"
    if key not in _IMAGES:
        load = load_scenes if is_scenes(data) else load_source
        _IMAGES[key] = load(data, split)
    return _IMAGES[key]


def has_test_images(data: ConfigDict) -> bool:
    """Whether a data set, which is there, has test images, or scenes, of its own."""
    return is_scenes(data) or has_test(data)


def total_steps(phase: Phase, updates: int) -> int:
    """Steps of a whole job, given the optimizer updates in an epoch."""
    return round(phase.recipe.epochs * updates) * phase.recipe.accumulate


def count_updates(phase: Phase) -> int:
    """Optimizer updates in an epoch of a phase; opens its training data.

    Raises:
        UserError: the data cannot be read, are fewer than a batch, or the epochs too short for one.
    """
    recipe, data, key = phase.recipe, phase.data, f"config.{phase.recipe_key}"
    micro = recipe.batch // recipe.accumulate
    with located(f"config.{phase.data_key}"):
        images = image_source(data, "train")
    with located(f"{key}.batch"):
        indices = batch_indices(images, data, micro, phase.seed)
    steps = indices.steps_per_epoch
    if steps < recipe.accumulate:
        raise UserError(
            f"{phase.job}: an epoch has fewer images than one batch of {recipe.batch}; lower "
            f"{key}.batch"
        )
    updates = steps // recipe.accumulate
    if not round(recipe.epochs * updates):
        raise UserError(
            f"{phase.job}: {recipe.epochs:g} epochs of {updates} batches are none; raise "
            f"{key}.epochs"
        )
    return updates
