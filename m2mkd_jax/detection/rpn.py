"""The region proposal network: head, losses and proposals.

Axes: B images, H height, W width, C channels, R ratios, A anchors of all levels, G objects of an
image (padded), P proposals of an image.

Source: Ren et al. 2015 (arXiv 1506.01497), section 3; docs/detection.md#rpn.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from m2mkd_jax.detection import boxes as box_ops
from m2mkd_jax.detection.convolution import Conv
from m2mkd_jax.detection.matching import Sample, match, sample
from m2mkd_jax.detection.spec import STRIDES, DetectorSpec
from m2mkd_jax.detection.suppression import nms

# Of the RPN's deltas.
WEIGHTS = (1.0, 1.0, 1.0, 1.0)
_init = nnx.initializers.normal(0.01)


class RPNHead(nnx.Module):
    """Two 3x3 convolutions, then objectness and deltas of each anchor; the same on all levels."""

    def __init__(self, channels: int, ratios: int, *, rngs: nnx.Rngs):
        for name, d, size in (
            ("conv0", channels, 3),
            ("conv1", channels, 3),
            ("objectness", ratios, 1),
            ("deltas", 4 * ratios, 1),
        ):
            setattr(self, name, Conv(channels, d, size, kernel_init=_init, rngs=rngs))

    def __call__(self, features: Sequence[jax.Array]) -> tuple[list[jax.Array], list[jax.Array]]:
        """Predicts for every anchor of each level.

        Args:
            features: p2 to p6, (B, H, W, C) each.

        Returns:
            Per level the logits (B, H W R) and the deltas (B, H W R, 4), float32, in the order of
            `boxes.anchors`.
        """
        logits, deltas = [], []
        for x in features:
            hidden = jax.nn.relu(self.conv1(jax.nn.relu(self.conv0(x))))
            logits.append(self.objectness(hidden).reshape(len(x), -1).astype(jnp.float32))
            deltas.append(self.deltas(hidden).reshape(len(x), -1, 4).astype(jnp.float32))
        return logits, deltas


def level_anchors(spec: DetectorSpec, shapes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """The anchors of each level, for maps of these (height, width)."""
    return [
        box_ops.anchors(h, w, stride, size, spec.aspect_ratios)
        for (h, w), stride, size in zip(shapes, STRIDES, spec.anchor_sizes, strict=True)
    ]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Objects:
    """The annotated objects of a batch, padded to G an image.

    Attributes:
        boxes: (B, G, 4) in pixels.
        classes: (B, G) int32.
        valid: (B, G) bool.
        masks: (B, G, H, W) bool on the padded image; None where masks are given otherwise.
    """

    boxes: jax.Array
    classes: jax.Array
    valid: jax.Array
    masks: jax.Array | None = None


def losses(
    spec: DetectorSpec,
    logits: jax.Array,
    deltas: jax.Array,
    anchors: jax.Array,
    objects: Objects,
    priority: jax.Array,
) -> dict[str, jax.Array]:
    """Binary cross-entropy of sampled anchors, and L1 distance of the positive ones' deltas.

    Both are divided by the budget, not by the number of anchors that were drawn.

    Args:
        spec: of the detector.
        logits: (B, A).
        deltas: (B, A, 4).
        anchors: (A, 4).
        objects: of the batch.
        priority: (B, A), see `matching.sample`.

    Returns:
        'loss_rpn_cls' and 'loss_rpn_loc', scalars.

    Source: docs/detection.md#rpn.
    """

    def of_image(
        logits: jax.Array,
        deltas: jax.Array,
        boxes: jax.Array,
        valid: jax.Array,
        priority: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        object_of, drawn = assign(spec, anchors, boxes, valid, priority)
        own = drawn.index
        cross = optax.sigmoid_binary_cross_entropy(logits[own], drawn.positive.astype(jnp.float32))
        # An anchor without an object has itself for a target, so that no number is undefined.
        target = jnp.where(drawn.positive[:, None], boxes[object_of[own]], anchors[own])
        error = jnp.abs(deltas[own] - box_ops.encode(anchors[own], target, WEIGHTS)).sum(-1)
        return (
            jnp.sum(jnp.where(drawn.valid, cross, 0.0)),
            jnp.sum(jnp.where(drawn.positive, error, 0.0)),
        )

    cls, loc = jax.vmap(of_image)(logits, deltas, objects.boxes, objects.valid, priority)
    count = spec.rpn_budget * len(logits)
    return {"loss_rpn_cls": cls.sum() / count, "loss_rpn_loc": loc.sum() / count}


def assign(
    spec: DetectorSpec, anchors: jax.Array, boxes: jax.Array, valid: jax.Array, priority: jax.Array
) -> tuple[jax.Array, Sample]:
    """Matches the anchors of one image, and samples some.

    Args:
        spec: of the detector.
        anchors: (A, 4).
        boxes: (G, 4).
        valid: (G).
        priority: (A).

    Returns:
        The number of each anchor's object (A), and the sample.
    """
    low, high = spec.rpn_thresholds
    overlap = box_ops.iou(boxes, anchors)
    object_of, labels = match(overlap, valid, low, high, low_quality=True)
    return object_of, sample(labels, priority, spec.rpn_budget, spec.rpn_positive)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Proposals:
    """Proposed boxes by falling score.

    Attributes:
        boxes: (B, P, 4), within the image.
        logits: (B, P).
        valid: (B, P) bool.
    """

    boxes: jax.Array
    logits: jax.Array
    valid: jax.Array


def propose(
    spec: DetectorSpec,
    logits: Sequence[jax.Array],
    deltas: Sequence[jax.Array],
    anchors: Sequence[np.ndarray],
    sizes: jax.Array,
    *,
    train: bool,
) -> Proposals:
    """The best boxes of each image; no gradient flows through them.

    Args:
        spec: of the detector.
        logits, deltas: of each level, as `RPNHead` gives them.
        anchors: of each level.
        sizes: (B, 2) float32, height and width of the images before padding.
        train: more are kept in training.

    Source: docs/detection.md#rpn.
    """
    before, after = (pair[not train] for pair in (spec.pre_nms, spec.post_nms))
    most = min(before, max(len(a) for a in anchors))

    # All levels are padded to the same length, so that one loop suppresses in all.
    def best_of_level(
        logits: jax.Array, deltas: jax.Array, anchors: jax.Array, size: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        values, index = jax.lax.top_k(logits, min(before, len(logits)))
        boxes = box_ops.decode(deltas[index], anchors[index], WEIGHTS)
        finite = jnp.all(jnp.isfinite(boxes), -1) & jnp.isfinite(values)
        boxes = box_ops.clip(boxes, size)
        valid = finite & box_ops.nonempty(boxes)
        boxes = jnp.where(valid[:, None], boxes, 0.0)
        pad = most - len(values)
        values = jnp.pad(values, (0, pad), constant_values=-jnp.inf)
        return jnp.pad(boxes, ((0, pad), (0, 0))), values, jnp.pad(valid, (0, pad))

    def of_image(
        logits: list[jax.Array], deltas: list[jax.Array], size: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        levels = [
            best_of_level(one, two, jnp.asarray(three), size)
            for one, two, three in zip(logits, deltas, anchors, strict=True)
        ]
        boxes, values, valid = (jnp.stack(part) for part in zip(*levels, strict=True))
        suppress = functools.partial(nms, threshold=spec.rpn_nms)
        keep = jax.vmap(suppress)(boxes, values, valid)
        values = jnp.where(keep, values, -jnp.inf).reshape(-1)
        values, index = jax.lax.top_k(values, min(after, len(values)))
        return boxes.reshape(-1, 4)[index], values, keep.reshape(-1)[index]

    stopped = jax.lax.stop_gradient((list(logits), list(deltas)))
    boxes, values, valid = jax.vmap(of_image)(*stopped, sizes)
    return Proposals(boxes, jnp.where(valid, values, 0.0), valid)
