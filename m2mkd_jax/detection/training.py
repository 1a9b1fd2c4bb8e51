"""The loss of a detector as a step takes it, and its schedule.

Axes: B images, H height, W width.

Source: docs/detection.md#optimizer, docs/detection.md#batching.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.detection.detector import Detections
from m2mkd_jax.detection.rpn import Objects
from m2mkd_jax.errors import require
from m2mkd_jax.models import chain

# The state's name of the one stage.
STAGE = "detector"


def make_loss(
    graph: Any, mean: Sequence[float], std: Sequence[float], dtype: Any = jnp.float32
) -> Callable[..., Any]:
    """The loss as train/step.py takes it.

    Args:
        graph: structure of the detector.
        mean, std: of the pixels, 0 to 1.
        dtype: compute type of the transformer; pyramid and heads are float32.

    Returns:
        (trainable, frozen, batch, key) -> (scalar, metrics): `trainable` is {STAGE: params}, the
        batch is that of `data.scene_batches.collate`, and the metrics are 'loss' and its five
        parts.
    """

    def loss(
        trainable: Mapping[str, Any], frozen: Any, batch: Mapping[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        del frozen
        network = chain.merge(graph, in_compute_type(trainable[STAGE], dtype), {})
        images = normalised(batch["image"], batch["size"], mean, std).astype(dtype)
        masks = jnp.unpackbits(batch["masks"], axis=-1).astype(bool)
        objects = Objects(batch["boxes"], batch["classes"], batch["valid"], masks)
        found, _ = network.losses(images, batch["size"], objects, key)
        total = sum(found.values(), jnp.zeros(()))
        return total, {"loss": total, **found}

    return loss


def make_detection(
    graph: Any, mean: Sequence[float], std: Sequence[float], dtype: Any = jnp.float32
) -> Callable[[Mapping[str, Any], Mapping[str, jax.Array]], Detections]:
    """(params, {'image', 'size'}) -> the detections of a batch; arguments as for `make_loss`."""

    def detect(params: Mapping[str, Any], batch: Mapping[str, jax.Array]) -> Detections:
        network = chain.merge(graph, in_compute_type(params, dtype), {})
        images = normalised(batch["image"], batch["size"], mean, std).astype(dtype)
        return network.detect(images, batch["size"])

    return detect


def in_compute_type(params: Mapping[str, Any], dtype: Any) -> dict[str, Any]:
    """The parameters with the transformer's in the compute type."""
    return {**params, "net": chain.cast_compute(params["net"], dtype)}


def normalised(
    pixels: jax.Array, sizes: jax.Array, mean: Sequence[float], std: Sequence[float]
) -> jax.Array:
    """uint8 (B, H, W, 3) -> float32, normalised, zero outside the images of sizes (B, 2)."""
    shift, scale = (np.asarray(v, np.float32)[None, None, None] * 255 for v in (mean, std))
    images = (pixels.astype(jnp.float32) - shift) / scale
    return jnp.where(inside(sizes, *images.shape[1:3])[..., None], images, 0.0)


def batch_shapes(data: Any, images: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of a training batch; `data`: fields image_size and objects."""
    side, objects = data.image_size, data.objects
    shapes: dict[str, tuple[tuple[int, ...], Any]] = {
        "image": ((side, side, 3), jnp.uint8),
        "size": ((2,), jnp.float32),
        "boxes": ((objects, 4), jnp.float32),
        "classes": ((objects,), jnp.int32),
        "valid": ((objects,), jnp.bool_),
        "masks": ((objects, side, side // 8), jnp.uint8),
    }
    return {
        name: jax.ShapeDtypeStruct((images, *shape), dtype)
        for name, (shape, dtype) in shapes.items()
    }


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
