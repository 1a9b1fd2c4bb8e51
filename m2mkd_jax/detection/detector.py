"""Mask R-CNN: the five losses of a batch, and the detections of one.

Axes: B images, H height, W width, G objects of an image (padded), P proposals, S sampled regions,
F foreground regions, N detections, K classes.

Source: He et al. 2017 (arXiv 1703.06870); docs/detection.md#roi-heads, docs/detection.md#inference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from m2mkd_jax.detection import boxes as box_ops
from m2mkd_jax.detection import rpn
from m2mkd_jax.detection.backbone import LEVELS, Backbone
from m2mkd_jax.detection.heads import (
    BOX_BINS,
    MASK_BINS,
    MASK_SIDE,
    BoxHead,
    BoxPredictor,
    MaskHead,
)
from m2mkd_jax.detection.matching import POSITIVE, Sample, match, sample
from m2mkd_jax.detection.roi_align import crop_masks, pool
from m2mkd_jax.detection.rpn import Objects, Proposals, RPNHead
from m2mkd_jax.detection.spec import BackboneSpec, DetectorSpec, Spec
from m2mkd_jax.detection.suppression import nms

Features = dict[str, jax.Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Regions:
    """The regions that the heads' losses look at, foreground first.

    Attributes:
        boxes: (B, S, 4).
        classes: (B, S) int32; K for the background.
        objects: (B, S) int32, the number of each foreground region's object.
        foreground: (B, S) bool.
        valid: (B, S) bool.
    """

    boxes: jax.Array
    classes: jax.Array
    objects: jax.Array
    foreground: jax.Array
    valid: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Detections:
    """Detected objects by falling score.

    Attributes:
        boxes: (B, N, 4) in pixels of the images before padding.
        scores: (B, N); 0 where not valid.
        classes: (B, N) int32.
        masks: (B, N, 28, 28), probabilities within the boxes.
        valid: (B, N) bool.
    """

    boxes: jax.Array
    scores: jax.Array
    classes: jax.Array
    masks: jax.Array
    valid: jax.Array


class Heads(nnx.Module):
    """Box and mask heads on the pyramid's features."""

    def __init__(self, spec: DetectorSpec, *, rngs: nnx.Rngs):
        self.spec = spec
        channels = spec.backbone.channels
        self.box_head = BoxHead(channels, spec.fc_width, rngs=rngs)
        self.box_predictor = BoxPredictor(spec.fc_width, spec.classes, rngs=rngs)
        self.mask_head = MaskHead(channels, spec.classes, rngs=rngs)

    def predict_boxes(self, features: Features, boxes: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Class logits (B, R, K + 1) and deltas (B, R, K, 4) of boxes (B, R, 4)."""
        pooled = _pool(features, boxes, BOX_BINS)
        logits, deltas = self.box_predictor(self.box_head(pooled.reshape(-1, *pooled.shape[2:])))
        shape = boxes.shape[:2]
        return logits.reshape(*shape, -1), deltas.reshape(*shape, -1, 4)

    def predict_masks(self, features: Features, boxes: jax.Array, classes: jax.Array) -> jax.Array:
        """Logits (B, R, 28, 28) of boxes (B, R, 4), in the maps of their classes (B, R)."""
        pooled = _pool(features, boxes, MASK_BINS)
        logits = self.mask_head(pooled.reshape(-1, *pooled.shape[2:]))
        own = jnp.clip(classes.reshape(-1), 0, self.spec.classes - 1)
        logits = jnp.take_along_axis(logits, own[:, None, None, None], axis=-1)[..., 0]
        return logits.reshape(*boxes.shape[:2], MASK_SIDE, MASK_SIDE)

    def sample(self, proposals: Proposals, objects: Objects, priority: jax.Array) -> Regions:
        """Samples regions among the proposals and the objects' own boxes.

        Args:
            proposals: of the batch.
            objects: of the batch.
            priority: (B, P + G), see `matching.sample`.
        """
        boxes = jnp.concatenate([proposals.boxes, objects.boxes], axis=1)
        present = jnp.concatenate([proposals.valid, objects.valid], axis=1)
        draw = functools.partial(_sample_image, self.spec)
        return jax.vmap(draw)(
            boxes, present, objects.boxes, objects.classes, objects.valid, priority
        )

    def losses(
        self, features: Features, regions: Regions, objects: Objects, masks: jax.Array | None = None
    ) -> dict[str, jax.Array]:
        """Losses of classes, boxes and masks.

        Args:
            features: p2 to p5.
            regions: sampled ones.
            objects: of the batch.
            masks: (B, F, 28, 28), targets of the first F regions of each image; None: cropped from
                the objects' masks.

        Returns:
            'loss_cls', 'loss_box_reg' and 'loss_mask', scalars.

        Source: docs/detection.md#roi-heads.
        """
        spec = self.spec
        logits, deltas = self.predict_boxes(features, regions.boxes)
        cross = optax.softmax_cross_entropy_with_integer_labels(logits, regions.classes)
        count = jnp.maximum(jnp.sum(regions.valid, dtype=jnp.float32), 1.0)
        own = jnp.clip(regions.classes, 0, spec.classes - 1)
        deltas = jnp.take_along_axis(deltas, own[..., None, None], axis=2)[:, :, 0]
        errors = jax.vmap(functools.partial(_delta_errors, spec))(deltas, regions, objects.boxes)
        return {
            "loss_cls": jnp.sum(jnp.where(regions.valid, cross, 0.0)) / count,
            "loss_box_reg": jnp.sum(errors) / count,
            "loss_mask": self._mask_loss(features, regions, objects, masks),
        }

    def _mask_loss(
        self, features: Features, regions: Regions, objects: Objects, masks: jax.Array | None
    ) -> jax.Array:
        most = max(1, int(self.spec.roi_budget * self.spec.roi_positive))
        first = jax.tree.map(lambda a: a[:, :most], regions)
        if masks is None:
            assert objects.masks is not None
            own = jax.vmap(lambda masks, index: masks[index])(objects.masks, first.objects)
            masks = jax.vmap(functools.partial(crop_masks, side=MASK_SIDE))(own, first.boxes)
        logits = self.predict_masks(features, first.boxes, first.classes)
        cross = optax.sigmoid_binary_cross_entropy(logits, masks.astype(jnp.float32))
        cross = jnp.where(first.foreground[..., None, None], cross, 0.0)
        count = jnp.maximum(jnp.sum(first.foreground, dtype=jnp.float32), 1.0)
        return jnp.sum(cross) / (count * MASK_SIDE**2)

    def detect(self, features: Features, proposals: Proposals, sizes: jax.Array) -> Detections:
        """The detections among the proposals.

        Args:
            features: p2 to p5.
            proposals: of the batch.
            sizes: (B, 2) float32, height and width of the images before padding.
        """
        logits, deltas = self.predict_boxes(features, proposals.boxes)
        best = functools.partial(_best_detections, self.spec)
        boxes, scores, classes = jax.vmap(best)(logits, deltas, proposals, sizes)
        masks = jax.nn.sigmoid(self.predict_masks(features, boxes, classes))
        return Detections(boxes, scores, classes, masks, scores > 0)


def _pool(features: Features, boxes: jax.Array, bins: int) -> jax.Array:
    maps = [features[name] for name in LEVELS[:4]]
    return jax.vmap(lambda maps, boxes: pool(maps, boxes, bins))(maps, boxes)


def _sample_image(
    spec: DetectorSpec,
    boxes: jax.Array,
    present: jax.Array,
    gt_boxes: jax.Array,
    gt_classes: jax.Array,
    gt_valid: jax.Array,
    priority: jax.Array,
) -> Regions:
    """The sampled regions of one image: candidates (A, 4), which of them there are, its objects."""
    overlap, threshold = box_ops.iou(gt_boxes, boxes), spec.roi_threshold
    objects, labels = match(overlap, gt_valid, threshold, threshold, low_quality=False)
    labels = jnp.where(present, labels, -1)
    drawn: Sample = sample(labels, priority, spec.roi_budget, spec.roi_positive)
    own, positive = objects[drawn.index], labels[drawn.index] == POSITIVE
    background = jnp.asarray(spec.classes, gt_classes.dtype)
    classes = jnp.where(positive & drawn.valid, gt_classes[own], background)
    return Regions(boxes[drawn.index], classes, own, drawn.positive, drawn.valid)


def _delta_errors(
    spec: DetectorSpec, deltas: jax.Array, regions: Regions, gt_boxes: jax.Array
) -> jax.Array:
    """L1 distance of each foreground region's deltas (S, 4) from the target, 0 elsewhere: (S)."""
    foreground = regions.foreground[:, None]
    # Elsewhere a box whose coding is finite, so that no gradient is undefined.
    unit = jnp.asarray([[0.0, 0.0, 1.0, 1.0]])
    boxes = jnp.where(foreground, regions.boxes, unit)
    target = jnp.where(foreground, gt_boxes[regions.objects], unit)
    error = jnp.abs(deltas - box_ops.encode(boxes, target, spec.roi_weights)).sum(-1)
    return jnp.where(regions.foreground, error, 0.0)


def _best_detections(
    spec: DetectorSpec, logits: jax.Array, deltas: jax.Array, proposals: Proposals, size: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Boxes (N, 4), scores (N) and classes (N) of one image; a score of 0 means none.

    Args:
        spec: of the detector.
        logits: (P, K + 1).
        deltas: (P, K, 4).
        proposals: of the image.
        size: (2).
    """
    scores = jax.nn.softmax(logits, axis=-1)[:, :-1]

    def of_class(scores: jax.Array, deltas: jax.Array) -> tuple[jax.Array, jax.Array]:
        boxes = box_ops.decode(deltas, proposals.boxes, spec.roi_weights)
        finite = jnp.all(jnp.isfinite(boxes), -1) & jnp.isfinite(scores)
        valid = proposals.valid & finite & (scores > spec.score_threshold)
        boxes = jnp.where(finite[:, None], box_ops.clip(boxes, size), 0.0)
        return boxes, jnp.where(nms(boxes, scores, valid, spec.nms), scores, 0.0)

    # Class by class: the overlaps of all classes at once would not fit at 80 classes.
    boxes, kept = jax.lax.map(lambda a: of_class(*a), (scores.T, jnp.swapaxes(deltas, 0, 1)))
    count = min(spec.detections, kept.size)
    best, index = jax.lax.top_k(kept.reshape(-1), count)
    classes = (index // kept.shape[1]).astype(jnp.int32)
    return boxes.reshape(-1, 4)[index], best, classes


class Detector(Backbone):
    """Backbone, region proposal network and heads."""

    def __init__(self, spec: DetectorSpec, *, rngs: nnx.Rngs):
        super().__init__(spec.backbone, rngs=rngs)
        self.spec = spec
        self.rpn = RPNHead(spec.backbone.channels, len(spec.aspect_ratios), rngs=rngs)
        self.heads = Heads(spec, rngs=rngs)

    def losses(
        self, images: jax.Array, sizes: jax.Array, objects: Objects, key: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, Any]]:
        """The losses of a batch, to be summed.

        Args:
            images: (B, H, W, 3), normalised and padded.
            sizes: (B, 2) float32, height and width before padding.
            objects: with masks.
            key: of sampling, drop-path and the routers' noise.

        Returns:
            'loss_cls', 'loss_box_reg', 'loss_mask', 'loss_rpn_cls' and 'loss_rpn_loc', and the
            auxiliary outputs of the backbone.
        """
        keys = jax.random.split(key, 3)
        features, aux = self.features(images, keys[0])
        logits, deltas = self.rpn([features[name] for name in LEVELS])
        anchors = self.anchors(features)
        count = sum(len(a) for a in anchors)
        rpn_losses = rpn.losses(
            self.spec,
            jnp.concatenate(logits, 1),
            jnp.concatenate(deltas, 1),
            jnp.concatenate([jnp.asarray(a) for a in anchors]),
            objects,
            jax.random.uniform(keys[1], (len(images), count)),
        )
        proposals = rpn.propose(self.spec, logits, deltas, anchors, sizes, train=True)
        candidates = proposals.boxes.shape[1] + objects.boxes.shape[1]
        priority = jax.random.uniform(keys[2], (len(images), candidates))
        regions = self.heads.sample(proposals, objects, priority)
        return self.heads.losses(features, regions, objects) | rpn_losses, aux

    def anchors(self, features: Features) -> list[Any]:
        """The anchors of each level (numpy), by the sizes of the maps."""
        shapes = [(features[name].shape[1], features[name].shape[2]) for name in LEVELS]
        return rpn.level_anchors(self.spec, shapes)

    def detect(self, images: jax.Array, sizes: jax.Array) -> Detections:
        """The detections of a batch.

        Args:
            images: (B, H, W, 3), normalised and padded.
            sizes: (B, 2) float32, height and width before padding.
        """
        features, _ = self.features(images)
        logits, deltas = self.rpn([features[name] for name in LEVELS])
        anchors = self.anchors(features)
        proposals = rpn.propose(self.spec, logits, deltas, anchors, sizes, train=False)
        return self.heads.detect(features, proposals, sizes)


# Cached, so that chain.abstract traces equal networks once.
@functools.cache
def builder(spec: Spec) -> Callable[[nnx.Rngs], nnx.Module]:
    """How the network of a spec is built."""
    if isinstance(spec, BackboneSpec):
        return lambda rngs: Backbone(spec, rngs=rngs)
    return lambda rngs: Detector(spec, rngs=rngs)
