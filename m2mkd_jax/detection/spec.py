"""Hyperparameters of a detector and of its backbone.

Source: Li et al. 2022 (arXiv 2203.16527); docs/detection.md#backbone, docs/detection.md#sizes.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from m2mkd_jax.errors import UserError
from m2mkd_jax.models.moe.spec import BlockKind, VMoESpec
from m2mkd_jax.models.vit_spec import ViTSpec

# Strides of the pyramid's levels p2 to p6.
STRIDES = (4, 8, 16, 32, 64)
# Padded images have sides that are multiples of this.
DIVISIBLE_BY = 32


@dataclass(frozen=True)
class MapBlockKind:
    """Structure of a block on a feature map; neighbouring blocks of one kind are stacked.

    Attributes:
        block: experts and stitches.
        windowed: it attends within windows, not over the whole map.
    """

    block: BlockKind
    windowed: bool


@dataclass(frozen=True)
class BackboneSpec:
    """Hyperparameters of a backbone: a V-MoE or a plain ViT, and its feature pyramid.

    Attributes:
        vmoe: the transformer; a plain ViT is one without experts (`moe_pos` is empty). Its image
            size is the one whose patches have a position embedding each; images of other sizes
            get interpolated ones.
        depths: blocks of every stage.
        class_position: the position embedding has a first row of a class token, which is not used.
        window: side of the attention windows in tokens; 0: all blocks attend globally.
        global_blocks: blocks that attend globally although there are windows.
        relative_positions: attention has decomposed relative position tables.
        table_image_size: image size that the tables of global blocks are made for; others are
            interpolated.
        drop_path: rate of the last block; grows linearly from 0.
        channels: of the pyramid's levels.
        square: side that images are padded to; 0: to the largest of the batch.
    """

    vmoe: VMoESpec
    depths: tuple[int, ...]
    class_position: bool = False
    window: int = 0
    global_blocks: tuple[int, ...] = ()
    relative_positions: bool = False
    table_image_size: int = 0
    drop_path: float = 0.0
    channels: int = 256
    square: int = 0

    def __post_init__(self) -> None:
        named = ("moe_pos", "pre_stitch_pos", "post_stitch_pos")
        lists = {name: getattr(self.vmoe, name) for name in named}
        for name, blocks in (lists | {"global_blocks": self.global_blocks}).items():
            if any(block >= self.depth for block in blocks):
                raise UserError(f"backbone: {name} {blocks}: there are {self.depth} blocks, from 0")
        if self.vmoe.vit.patch != 16:
            raise UserError(
                f"backbone: a patch of {self.vmoe.vit.patch} pixels; the pyramid's strides are "
                "those of patches of 16"
            )
        if self.vmoe.vit.width % 4:
            raise UserError(f"backbone: width {self.vmoe.vit.width} is not a multiple of 4")
        pre, post = self.vmoe.pre_stitch_pos, self.vmoe.post_stitch_pos
        if self.vmoe.stitch_dim != self.vmoe.vit.width and {b + 1 for b in post} != set(pre):
            raise UserError(
                f"backbone: stitches after blocks {post} and before blocks {pre} do not meet; a "
                "stitch after block i needs one before block i + 1"
            )

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return sum(self.depths)

    @property
    def positions(self) -> int:
        """Rows of the position embedding."""
        return self.vmoe.vit.tokens - 1 + self.class_position

    def kind(self, block: int) -> MapBlockKind:
        """Structure of a block, by its number."""
        windowed = bool(self.window) and block not in self.global_blocks
        return MapBlockKind(self.vmoe.kind(block), windowed)

    def segments(self) -> list[tuple[MapBlockKind, int]]:
        """Kind and length of every run of neighbouring blocks of one kind."""
        kinds = [self.kind(block) for block in range(self.depth)]
        return [(kind, len(list(run))) for kind, run in itertools.groupby(kinds)]

    def padded(self, height: int, width: int) -> tuple[int, int]:
        """The size to which a batch is padded whose largest sides are `height` and `width`.

        Raises:
            UserError: an image is larger than the square that it would be padded to.

        Source: docs/detection.md#batching.
        """
        if self.square:
            if max(height, width) > self.square:
                raise UserError(
                    f"an image has {height} x {width} pixels; this detector pads to a square of "
                    f"{self.square}: make it smaller"
                )
            height = width = self.square
        up = DIVISIBLE_BY
        return -(-height // up) * up, -(-width // up) * up


@dataclass(frozen=True)
class DetectorSpec:
    """Hyperparameters of Mask R-CNN on such a backbone.

    Pairs are (in training, in evaluation).

    Attributes:
        backbone: which see.
        classes: K, without the background.
        anchor_sizes: side of the anchors of each level.
        aspect_ratios: height over width of the anchors of a position.
        rpn_budget: anchors of an image that the RPN's losses sample.
        rpn_positive: largest share of positive ones among them.
        rpn_thresholds: IoU below which an anchor is negative, from which on it is positive.
        rpn_nms: IoU above which a proposal is suppressed.
        pre_nms: proposals of a level before the suppression.
        post_nms: proposals of an image after it.
        roi_budget: regions of an image that the heads' losses sample.
        roi_positive: largest share of foreground among them.
        roi_threshold: IoU from which on a region is foreground.
        roi_weights: of the box head's deltas.
        fc_width: channels of the box head's linear layer.
        score_threshold: detections need a higher score.
        nms: IoU above which a detection is suppressed by a better one of its class.
        detections: at most, of an image.

    Source: He et al. 2017 (arXiv 1703.06870); docs/detection.md#rpn, docs/detection.md#roi-heads.
    """

    backbone: BackboneSpec
    classes: int = 80
    anchor_sizes: tuple[int, ...] = (32, 64, 128, 256, 512)
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    rpn_budget: int = 256
    rpn_positive: float = 0.5
    rpn_thresholds: tuple[float, float] = (0.3, 0.7)
    rpn_nms: float = 0.7
    pre_nms: tuple[int, int] = (2000, 1000)
    post_nms: tuple[int, int] = (1000, 1000)
    roi_budget: int = 512
    roi_positive: float = 0.25
    roi_threshold: float = 0.5
    roi_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    fc_width: int = 1024
    score_threshold: float = 0.05
    nms: float = 0.5
    detections: int = 100

    def __post_init__(self) -> None:
        if len(self.anchor_sizes) != len(STRIDES):
            raise UserError(
                f"detector: {len(self.anchor_sizes)} anchor sizes for {len(STRIDES)} levels"
            )


Spec = BackboneSpec | DetectorSpec
KINDS = ("detector", "detector_backbone")


def is_detection(description: Any) -> bool:
    """Whether a description of weights, or the fields of an --arch file, is of these networks.

    Args:
        description: as read from a file, of any type.
    """
    return isinstance(description, Mapping) and description.get("kind") in KINDS


def spec_of(description: Mapping[str, Any]) -> Spec:
    """The hyperparameters in a description: {"kind": one of KINDS, "spec": the fields}.

    Raises:
        UserError: it lacks fields, or has others.
    """
    try:
        fields = dict(description["spec"])
        if description["kind"] == "detector_backbone":
            return _backbone(fields)
        return DetectorSpec(**{**_tuples(fields), "backbone": _backbone(fields["backbone"])})
    except (KeyError, TypeError) as error:
        raise UserError(f"these weights do not describe their network ({error})") from None


def _backbone(fields: Mapping[str, Any]) -> BackboneSpec:
    vmoe = _tuples(fields["vmoe"])
    vmoe["vit"] = ViTSpec(**vmoe["vit"])
    return BackboneSpec(**{**_tuples(fields), "vmoe": VMoESpec(**vmoe)})


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def describe(spec: Spec) -> dict[str, Any]:
    """The description of a network, as JSON: the inverse of `spec_of`."""
    kind = "detector" if isinstance(spec, DetectorSpec) else "detector_backbone"
    return {"kind": kind, "spec": dataclasses.asdict(spec)}


def backbone_of(spec: Spec) -> BackboneSpec:
    """The backbone's part of either."""
    return spec.backbone if isinstance(spec, DetectorSpec) else spec
