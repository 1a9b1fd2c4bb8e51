"""The table of names of a detector or of its backbone (see conversion/names.py).

Names are those of a whole detector without "backbone." at the start; the published files of a
V-MoE have the tensors of its blocks once more, by stage.

Source: docs/detection.md#checkpoints.
"""

from __future__ import annotations

from collections.abc import Iterator

from m2mkd_jax.conversion.names import ArrayPath, Entry, linear, norm, patches
from m2mkd_jax.conversion.names_vmoe import vmoe_block_names
from m2mkd_jax.detection.heads import CONVOLUTIONS
from m2mkd_jax.detection.spec import BackboneSpec, DetectorSpec, Spec, backbone_of

BACKBONE = "backbone."
# Names of the parts that a backbone does not have.
HEADS = ("proposal_generator.", "roi_heads.")
# Our name and the published one of the pyramid's layers.
_PYRAMID_CONVOLUTIONS = (
    ("p2_reduce", "simfp_2.4"),
    ("p2_smooth", "simfp_2.5"),
    ("p3_reduce", "simfp_3.1"),
    ("p3_smooth", "simfp_3.2"),
    ("p4_reduce", "simfp_4.0"),
    ("p4_smooth", "simfp_4.1"),
    ("p5_reduce", "simfp_5.1"),
    ("p5_smooth", "simfp_5.2"),
)
_UPSAMPLES = (("p2_up1", "simfp_2.0"), ("p2_up2", "simfp_2.3"), ("p3_up", "simfp_3.0"))
_RPN = (
    ("conv0", "conv.conv0"),
    ("conv1", "conv.conv1"),
    ("objectness", "objectness_logits"),
    ("deltas", "anchor_deltas"),
)


def names(spec: Spec) -> list[Entry]:
    """The table of a detector or a backbone."""
    backbone = backbone_of(spec)
    table = [*net_names(backbone), *_pyramid_names()]
    return table + (_head_names() if isinstance(spec, DetectorSpec) else [])


def net_names(spec: BackboneSpec) -> list[Entry]:
    """The table of the transformer, whose tensors are called net.NAME."""
    table = [Entry("net.pos_embed", ("net", "pos_embed"))]
    table += patches("net.patch_embed.proj", ("net", "patch_embed"))
    number = 0
    for i, (kind, count) in enumerate(spec.segments()):
        ours = ("net", f"segment_{i}", "blocks")
        for j in range(count):
            torch = f"net.blocks.{number}"
            table += vmoe_block_names(torch, ours, j, kind.block, spec.vmoe)
            if spec.relative_positions:
                for name in ("rel_pos_h", "rel_pos_w"):
                    table.append(Entry(f"{torch}.attn.{name}", (*ours, "attn", name), "same", j))
            number += 1
    return table


def _pyramid_names() -> list[Entry]:
    table = list(norm("simfp_2.1", ("pyramid", "p2_norm")))
    for ours, theirs in _UPSAMPLES:
        table += _convolution(theirs, ("pyramid", ours), layout="deconv")
    for ours, theirs in _PYRAMID_CONVOLUTIONS:
        table += _normed(theirs, ("pyramid", ours))
    return table


def _head_names() -> list[Entry]:
    table: list[Entry] = []
    for ours, theirs in _RPN:
        table += _convolution(f"{HEADS[0]}rpn_head.{theirs}", ("rpn", ours))
    roi = HEADS[1]
    for i in range(1, CONVOLUTIONS + 1):
        table += _normed(f"{roi}box_head.conv{i}", ("heads", "box_head", f"conv{i}"))
        table += _normed(f"{roi}mask_head.mask_fcn{i}", ("heads", "mask_head", f"conv{i}"))
    fc1 = ("heads", "box_head", "fc1")
    table.append(Entry(f"{roi}box_head.fc1.weight", (*fc1, "kernel"), "pooled"))
    table.append(Entry(f"{roi}box_head.fc1.bias", (*fc1, "bias")))
    for name in ("cls_score", "bbox_pred"):
        table += linear(f"{roi}box_predictor.{name}", ("heads", "box_predictor", name))
    mask = ("heads", "mask_head")
    table += _convolution(f"{roi}mask_head.deconv", (*mask, "deconv"), layout="deconv")
    return table + list(_convolution(f"{roi}mask_head.predictor", (*mask, "predictor")))


def _convolution(torch: str, path: ArrayPath, layout: str = "conv") -> Iterator[Entry]:
    yield Entry(f"{torch}.weight", (*path, "kernel"), layout)
    yield Entry(f"{torch}.bias", (*path, "bias"))


def _normed(torch: str, path: ArrayPath) -> Iterator[Entry]:
    """A convolution without bias, and its norm."""
    yield Entry(f"{torch}.weight", (*path, "conv", "kernel"), "conv")
    yield from norm(f"{torch}.norm", (*path, "norm"))
