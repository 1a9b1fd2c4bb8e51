"""Batches of annotated images, the loss of a detector as a step takes it, and its schedule.

Axes: B images, H height, W width, G objects of an image (padded).

Source: docs/detection.md#optimizer, docs/detection.md#batching.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.data.annotations import Scene, bitmap
from m2mkd_jax.detection.rpn import Objects
from m2mkd_jax.errors import require
from m2mkd_jax.models import chain

# The state's name of the one stage.
STAGE = "detector"


def collate(scenes: Sequence[Scene], size: tuple[int, int], limit: int) -> dict[str, np.ndarray]:
    """A batch of one size: images padded with zeros after normalisation, objects padded to G.

    Args:
        scenes: annotated images, none larger than `size`.
        size: height and width of the batch (`BackboneSpec.padded`).
        limit: G; of an image with more objects the largest boxes are kept.

    Returns:
        'image' (B, H, W, 3) uint8, 'size' (B, 2) float32, 'boxes' (B, G, 4) float32, 'classes'
        (B, G) int32, 'valid' (B, G) bool and 'masks' (B, G, H, W) bool.
    """
    count, (height, width) = len(scenes), size
    batch: dict[str, np.ndarray] = {
        "image": np.zeros((count, height, width, 3), np.uint8),
        "size": np.array([scene.size for scene in scenes], np.float32),
        "boxes": np.zeros((count, limit, 4), np.float32),
        "classes": np.zeros((count, limit), np.int32),
        "valid": np.zeros((count, limit), bool),
        "masks": np.zeros((count, limit, height, width), bool),
    }
    for i, scene in enumerate(scenes):
        h, w = scene.size
        batch["image"][i, :h, :w] = scene.image
        sides = scene.boxes[:, 2:] - scene.boxes[:, :2]
        largest = np.argsort(-sides.prod(1), kind="stable")[:limit]
        for j, number in enumerate(sorted(largest)):
            batch["boxes"][i, j] = scene.boxes[number]
            batch["classes"][i, j] = scene.classes[number]
            batch["valid"][i, j] = True
            batch["masks"][i, j, :h, :w] = bitmap(scene.masks[number], h, w)
    return batch


def make_loss(graph: Any, mean: Sequence[float], std: Sequence[float]) -> Callable[..., Any]:
    """The loss as train/step.py takes it.

    Args:
        graph: structure of the detector.
        mean, std: of the pixels, 0 to 1.

    Returns:
        (trainable, frozen, batch, key) -> (scalar, metrics): `trainable` is {STAGE: params}, the
        batch is `collate`'s, and the metrics are 'loss' and its five parts.
    """
    scale = np.asarray(std, np.float32) * 255
    shift = np.asarray(mean, np.float32) * 255

    def loss(
        trainable: Mapping[str, Any], frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del frozen
        network = chain.merge(graph, trainable[STAGE], {})
        images = (batch["image"].astype(jnp.float32) - shift[None, None, None]) / scale[
            None, None, None
        ]
        images = jnp.where(inside(batch["size"], *images.shape[1:3])[..., None], images, 0.0)
        objects = Objects(*(batch[name] for name in ("boxes", "classes", "valid", "masks")))
        found, _ = network.losses(images, batch["size"], objects, key)
        total = sum(found.values(), jnp.zeros(()))
        return total, {"loss": total, **found}

    return loss


def inside(sizes: jax.Array, height: int, width: int) -> jax.Array:
    """Which pixels of a padded batch are in the image: sizes (B, 2) -> (B, H, W) bool."""
    rows = jnp.arange(height, dtype=jnp.float32)[None] < sizes[:, :1]
    columns = jnp.arange(width, dtype=jnp.float32)[None] < sizes[:, 1:]
    return rows[:, :, None] & columns[:, None, :]


def multi_step_rate(
    rate: float, warmup: int, milestones: Sequence[int], start: float = 0.001
) -> Callable[[jax.Array | int], jax.Array]:
    """Linear warmup from start * rate, then a tenth of the rate from each milestone on.

    Args:
        rate: learning rate.
        warmup: updates until the whole rate.
        milestones: numbers of updates, rising.
        start: factor of the first update.

    Returns:
        Number of the update, from 0 -> learning rate.

    Raises:
        UserError: the milestones do not rise, or lie in the warmup.

    Source: docs/detection.md#optimizer.
    """
    rising = all(a < b for a, b in zip([warmup, *milestones], milestones, strict=False))
    require(rising, f"milestones {tuple(milestones)} must rise, from above warmup {warmup} on")

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step)
        passed = sum((step >= m).astype(jnp.float32) for m in milestones)
        done = jnp.minimum(step.astype(jnp.float32) / max(warmup, 1), 1.0)
        factor = jnp.where(step < warmup, start + (1 - start) * done, 0.1**passed)
        return (rate * factor).astype(jnp.float32)

    return schedule
