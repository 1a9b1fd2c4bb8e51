"""A batch from the host as a loss takes it.

Axes: B batch, H height, W width, C channels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from m2mkd_jax.train import erasing, mixing


def normalise(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Normalises pixels: (x / 255 - mean) / std per channel.

    Args:
        images: uint8 (B, H, W, C).
        mean: (C,).
        std: (C,).

    Returns:
        float32 (B, H, W, C).

    Source: docs/reference.md#normalisation.
    """
    mean_array, std_array = (jnp.asarray(v, jnp.float32)[None, None, None] for v in (mean, std))
    return (images.astype(jnp.float32) / 255.0 - mean_array) / std_array


def prepare(
    keys: tuple[jax.Array, jax.Array], batch: dict, recipe: Any, data: Any
) -> tuple[jax.Array, jax.Array]:
    """Normalises, erases and mixes a batch from the host.

    Args:
        keys: for erasing and for mixing.
        batch: "image" uint8 (B, H, W, C) and "label" int32 (B,).
        recipe: see train/mixing.py.
        data: mean, std, classes and augment.erase.

    Returns:
        Images, float32 (B, H, W, C), and targets, float32 (B, K).
    """
    images = normalise(batch["image"], data.mean, data.std)
    images = erasing.erase(keys[0], images, data.augment.erase)
    return mixing.mix(keys[1], images, batch["label"], data.classes, recipe)


def prepared(
    keys: tuple[jax.Array, jax.Array], batch: dict, recipe: Any, data: Any
) -> dict[str, jax.Array]:
    """A batch as the loss takes it: "target", "image" where there are images, and all others.

    Without images there is nothing to erase or mix; a batch without labels goes to the loss as it
    is.
    """
    if "label" not in batch:
        return batch
    batch = dict(batch)
    label = batch.pop("label")
    if "image" not in batch:
        return batch | {"target": mixing.smooth_one_hot(label, data.classes, recipe.smoothing)}
    images, targets = prepare(keys, {"image": batch["image"], "label": label}, recipe, data)
    return batch | {"image": images, "target": targets}
