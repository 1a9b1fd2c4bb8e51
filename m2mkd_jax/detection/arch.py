"""The hyperparameters of a detector in a file, from its tensors and the fields of --arch.

Shapes decide what they can, and a field that is stated must agree with them; the rest has the
published value unless it is stated.

Source: docs/detection.md#checkpoints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from m2mkd_jax.detection.names import HEADS
from m2mkd_jax.detection.spec import KINDS, BackboneSpec, DetectorSpec, Spec
from m2mkd_jax.errors import UserError, did_you_mean
from m2mkd_jax.models.moe.spec import VMoESpec
from m2mkd_jax.models.vit_spec import ViTSpec

Fields = dict[str, Any]
Shapes = Mapping[str, tuple[int, ...]]

# The published names of our fields.
_PUBLISHED = {
    "img_size": "image_size",
    "patch_size": "patch",
    "embed_dim": "width",
    "num_heads": "heads",
    "layernorm_eps": "eps",
    "divided_depths": "depths",
    "num_expert": "experts",
    "drop_path_rate": "drop_path",
    "out_channels": "channels",
    "square_pad": "square",
    "window_size": "window",
    "window_block_indexes": "window_blocks",
    "use_rel_pos": "relative_positions",
    "pretrain_img_size": "position_image_size",
    "pretrain_use_cls_token": "class_position",
    "num_classes": "classes",
    "rpn_batch_size_per_image": "rpn_budget",
    "rpn_positive_fraction": "rpn_positive",
    "rpn_matcher": "rpn_thresholds",
    "rpn_nms_thresh": "rpn_nms",
    "pre_nms_topk": "pre_nms",
    "post_nms_topk": "post_nms",
    "roi_batch_size_per_image": "roi_budget",
    "roi_positive_fraction": "roi_positive",
    "roi_matcher": "roi_threshold",
    "roi_box_weights": "roi_weights",
    "fc_dim": "fc_width",
    "test_score_thresh": "score_threshold",
    "test_nms_thresh": "nms",
    "test_topk_per_image": "detections",
    "pixel_mean_rgb": "pixel_mean",
    "pixel_std_rgb": "pixel_std",
}
# Options that have one value here.
_FIXED: dict[str, Any] = {
    "mlp_ratio": 4,
    "in_chans": 3,
    "scale_factors": [4.0, 2.0, 1.0, 0.5],
    "top_block": "LastLevelMaxPool",
    "rpn_box_weights": [1, 1, 1, 1],
    "residual_block_indexes": [],
    "use_abs_pos": True,
    "rel_pos_zero_init": True,
    "top_k": 2,
}
# Of training, of how the fixtures were drawn, or said by the names of the tensors.
_UNUSED = {
    *("kind", "images", "lr", "weight_decay", "lr_decay_rate", "need_p5", "image_sizes"),
    *("objects", "output_sizes", "betas", "adam_eps", "norm", "use_act_checkpoint", "cls_gain"),
    *("drop_rate", "attn_drop_rate", "proj_drop_rate", "pos_drop_rate", "patch_drop_rate"),
    *("min_level_boxes", "proposals", "padded", "idx", "gate", "norm_layer", "act_layer"),
    *("out_feature", "last_norm", "use_moe", "conv_norm", "seed", "init_values"),
}


def _integers(least: int, length: int = 0) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        proper = isinstance(value, list) and all(type(n) is int and n >= least for n in value)
        return proper and (not length or len(value) == length)

    return check


def _numbers(length: int, most: float = math.inf) -> Callable[[Any], bool]:
    def check(value: Any) -> bool:
        return (
            isinstance(value, list)
            and len(value) == length
            and all(_number(most)(n) for n in value)
        )

    return check


def _integer(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _number(most: float) -> Callable[[Any], bool]:
    return lambda value: type(value) in (int, float) and 0 <= value <= most


def _ratios(value: Any) -> bool:
    return _numbers(len(value) if isinstance(value, list) else 0)(value) and bool(value)


def _boolean(value: Any) -> bool:
    return type(value) is bool


_CHECKS: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("image_size", "patch", "width", "heads", "channels", "fc_width"), _integer(1)),
    **dict.fromkeys(("classes", "detections", "depth", "position_image_size"), _integer(1)),
    **dict.fromkeys(("rpn_budget", "roi_budget"), _integer(1)),
    **dict.fromkeys(("experts", "square", "window", "stitch_dim"), _integer(0)),
    **dict.fromkeys(("qkv_bias", "relative_positions", "class_position"), _boolean),
    **dict.fromkeys(("drop_path", "rpn_positive", "rpn_nms", "roi_positive", "nms"), _number(1)),
    **dict.fromkeys(("eps", "score_threshold"), _number(1)),
    **dict.fromkeys(("depths", "moe_pos", "pre_stitch_pos", "post_stitch_pos"), _integers(0)),
    **dict.fromkeys(("window_blocks", "global_blocks"), _integers(0)),
    **dict.fromkeys(("pre_nms", "post_nms"), _integers(1, 2)),
    "anchor_sizes": _integers(1, 5),
    "aspect_ratios": _ratios,
    "rpn_thresholds": _numbers(2, 1),
    "roi_threshold": _numbers(1, 1),
    "roi_weights": _numbers(4),
    **dict.fromkeys(("pixel_mean", "pixel_std"), _numbers(3, 255)),
}


def read_fields(content: Mapping[str, Any], where: str) -> Fields:
    """Checks the fields of an --arch file.

    Args:
        content: of the file; its kind is one of `spec.KINDS`.
        where: the file, for messages.

    Returns:
        The fields that are stated, under our names; the kind aside.

    Raises:
        UserError: a field is unknown, or its value makes no sense.
    """
    fields: Fields = {}
    for name, value in content.items():
        ours = _PUBLISHED.get(name, name)
        if name in _UNUSED or value is None:
            continue
        if name in _FIXED:
            if value != _FIXED[name]:
                raise UserError(f"--arch: {where}: {name} is {_FIXED[name]!r} here, not {value!r}")
            continue
        if ours not in _CHECKS:
            known = sorted({*_PUBLISHED, *_CHECKS})
            hint = did_you_mean(str(name), known, "docs/detection.md lists them")
            raise UserError(f'--arch: {where} has an unknown field "{name}"; {hint}')
        if ours == "roi_threshold" and not isinstance(value, list):
            value = [value]
        if not _CHECKS[ours](value):
            raise UserError(f"--arch: {where}: {name} cannot be {value!r}")
        if ours in fields and fields[ours] != value:
            raise UserError(f"--arch: {where}: {name} is there twice")
        fields[ours] = value
    if not all(fields.get("pixel_std", [1])):
        raise UserError(f"--arch: {where}: pixel_std must be above 0")
    return fields


class _Facts:
    """What the shapes of tensors show, held against what is stated."""

    def __init__(self, given: Fields, where: str):
        self.given, self.where = given, where

    def field(self, name: str, shown: Any) -> Any:
        """A field that the tensors show; raises UserError if another value is stated."""
        stated = self.given.get(name, shown)
        if stated != shown:
            raise UserError(f"{self.where}: --arch says {name} {stated}; the tensors show {shown}")
        return shown

    def stated(self, name: str, otherwise: Any) -> Any:
        """A field that the tensors do not show; None asks for it."""
        value = self.given.get(name, otherwise)
        if value is None:
            raise UserError(f'{self.where}: the tensors do not show "{name}"; say it with --arch')
        return value


def infer_spec(kind: str, shapes: Shapes, given: Fields, where: str) -> Spec:
    """Infers the hyperparameters.

    Args:
        kind: one of `spec.KINDS`.
        shapes: of the tensors, under the names of names.py; without those of heads and pyramid if
            the file is a classifier's.
        given: fields, from `read_fields`.
        where: the file, for messages.

    Raises:
        UserError: the tensors are not those of such a network, contradict the fields, or a field
            is missing.
    """
    assert kind in KINDS
    facts = _Facts(given, where)
    backbone = _infer_backbone(facts, shapes)
    if kind == "detector_backbone":
        return backbone
    score = shapes.get(f"{HEADS[1]}box_predictor.cls_score.weight")
    fresh = score is None and not any(name.startswith(HEADS) for name in shapes)
    if not fresh and (score is None or len(score) != 2 or score[0] < 2):
        raise UserError(f"{where}: no detector: its box predictor's cls_score is missing or odd")
    fields = {
        name: given[name]
        for name in DetectorSpec.__dataclass_fields__
        if name in given and name not in ("classes", "fc_width")
    }
    if score is None:
        fields |= {name: given[name] for name in ("classes", "fc_width") if name in given}
    else:
        fields["classes"] = facts.field("classes", score[0] - 1)
        fields["fc_width"] = facts.field("fc_width", score[1])
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
    if "roi_threshold" in fields:
        fields["roi_threshold"] = fields["roi_threshold"][0]
    return DetectorSpec(backbone, **fields)


def _infer_backbone(facts: _Facts, shapes: Shapes) -> BackboneSpec:
    blocks = _blocks(shapes, facts.where)
    depth = len(blocks)
    positions, proj = shapes.get("net.pos_embed"), shapes.get("net.patch_embed.proj.weight")
    if positions is None or proj is None or len(positions) != 3 or len(proj) != 4:
        raise UserError(f"{facts.where}: pos_embed or patch_embed.proj is missing or odd")
    width, patch = facts.field("width", proj[0]), facts.field("patch", proj[2])
    vmoe = _infer_transformer(facts, blocks, width, patch, positions[1])
    depths = facts.stated("depths", [facts.stated("depth", depth)])
    if sum(depths) != depth:
        raise UserError(f"{facts.where} has {depth} blocks; --arch says {depths}")
    table = any("attn.rel_pos_h" in names for names in blocks)
    window = facts.stated("window", 0)
    if "window_blocks" in facts.given:
        windowed = facts.given["window_blocks"]
        globally = [block for block in range(depth) if block not in windowed]
    else:
        globally = facts.stated("global_blocks", [])
    smooth = shapes.get("simfp_4.0.weight")
    return BackboneSpec(
        vmoe,
        tuple(depths),
        class_position=math.isqrt(positions[1]) ** 2 != positions[1],
        window=window,
        global_blocks=tuple(globally) if window else (),
        relative_positions=facts.stated("relative_positions", table),
        table_image_size=facts.stated("image_size", vmoe.vit.image_size),
        drop_path=facts.stated("drop_path", 0.0),
        channels=facts.field("channels", smooth[0]) if smooth else facts.stated("channels", 256),
        square=facts.stated("square", 0),
    )


def _blocks(shapes: Shapes, where: str) -> list[dict[str, tuple[int, ...]]]:
    """The tensors of each block by their names in it."""
    found: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        if match := re.match(r"net\.blocks\.(\d{1,6})\.(.+)", name):
            found.setdefault(int(match[1]), {})[match[2]] = shape
    if not found or sorted(found) != list(range(len(found))):
        raise UserError(f"{where}: blocks {sorted(found)[:20]} are not all from 0 on")
    return [found[i] for i in range(len(found))]


def _infer_transformer(
    facts: _Facts, blocks: list[dict[str, tuple[int, ...]]], width: int, patch: int, rows: int
) -> VMoESpec:
    """The transformer; `rows`: of its position embedding."""
    size = math.isqrt(rows) * patch
    facts.field("position_image_size", size)

    def having(part: str) -> tuple[int, ...]:
        return tuple(i for i, names in enumerate(blocks) if any(n.startswith(part) for n in names))

    def single(part: str, axis: int) -> int:
        return next((names[part][axis] for names in blocks if part in names), 0)

    pre, post = (
        tuple(facts.field(f"{word}_stitch_pos", list(having(f"{word}_stitch."))))
        for word in ("pre", "post")
    )
    moe = tuple(facts.field("moe_pos", list(having("moe."))))
    if moe:
        facts.field("image_size", size)
    stitch_dim = single("pre_stitch.fc.weight", 1) or single("post_stitch.fc.weight", 0)
    experts = single("moe.gate.gate.weight", 0)
    vit = ViTSpec(
        size,
        patch,
        width,
        heads=facts.stated("heads", None),
        classes=0,
        qkv_bias=facts.field("qkv_bias", "attn.qkv.bias" in blocks[0]),
        eps=facts.stated("eps", 1e-6),
    )
    return VMoESpec(
        vit,
        moe_pos=moe,
        experts=facts.field("experts", experts) if moe else 1,
        top_k=2 if moe else 1,
        stitch_dim=stitch_dim,
        pre_stitch_pos=pre,
        post_stitch_pos=post,
    )
