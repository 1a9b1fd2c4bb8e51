"""What a job leaves of its inputs: a list of trained parameters, a picture of its first images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from ml_collections import ConfigDict

from m2mkd_jax.data.pipeline import first_images
from m2mkd_jax.data.preview import caption, draw_grid
from m2mkd_jax.files.paths import write_bytes
from m2mkd_jax.jobs.detection import draw_scenes
from m2mkd_jax.jobs.run import image_source
from m2mkd_jax.jobs.setup import Setup
from m2mkd_jax.parallel.process import is_main
from m2mkd_jax.phases.detection import DetectionPhase
from m2mkd_jax.train.batch import prepare


def draw_images(
    path: Path,
    train: Any,
    data: ConfigDict,
    recipe: ConfigDict,
    micro: int,
    seed: int,
    views: int = 0,
) -> None:
    """Draws 16 images as the first step sees them, erased and mixed (among the 16), with labels."""
    batch = first_images(train, data, batch_size=micro, seed=seed, views=views)
    keys = tuple(jax.random.split(jax.random.key(seed)))
    images, targets = jax.jit(lambda keys, batch: prepare(keys, batch, recipe, data))(keys, batch)
    pixels = 255 * (np.asarray(images) * np.array(data.std) + np.array(data.mean))
    shares = (np.asarray(targets) - recipe.smoothing / data.classes) / (1 - recipe.smoothing)
    captions = [caption(share, train.class_names) for share in shares]
    content = io.BytesIO()
    draw_grid(pixels.round().clip(0, 255).astype(np.uint8), captions).save(content, "png")
    write_bytes(path, content.getvalue())


def describe_inputs(setup: Setup, directory: Path) -> None:
    """Leaves the list of trained parameters and a picture of the first images."""
    if not is_main():
        return
    shapes = jax.eval_shape(setup.joined.split, setup.params)
    overview = parameter_overview.get_parameter_overview(shapes, include_stats=False)
    write_bytes(directory / "parameters.txt", f"{overview}\n".encode())
    phase, picture = setup.phase, directory / "images.png"
    if picture.is_file():
        return
    if isinstance(phase, DetectionPhase):
        draw_scenes(picture, phase)
    else:
        recipe = phase.recipe
        micro, train = recipe.batch // recipe.accumulate, image_source(phase.data, "train")
        draw_images(picture, train, phase.data, recipe, micro, phase.seed, phase.views)
