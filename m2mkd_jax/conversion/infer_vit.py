"""What the names and shapes of a vision transformer, dense or with experts, say about it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from m2mkd_jax.conversion.arch_flag import VMOE_VARIANTS, vit_fields
from m2mkd_jax.conversion.infer_fields import Decision, Shapes
from m2mkd_jax.conversion.torch_layouts import whole_name
from m2mkd_jax.conversion.torch_weights import TorchWeights
from m2mkd_jax.errors import UserError
from m2mkd_jax.models import variants
from m2mkd_jax.models.moe.spec import VMoESpec
from m2mkd_jax.models.vit_spec import ViTSpec

_SPEC = ("image_size", "patch", "width", "heads", "classes", "qkv_bias", "eps")
_STITCHES = ("pre_stitch_pos", "post_stitch_pos")


def describe_vit(source: TorchWeights, given: Mapping, where: str) -> tuple[dict, list[str]]:
    """Description and notes; see architecture.describe."""
    shapes = Shapes({name: tensor.shape for name, tensor in source.tensors.items()}, where)
    known = [(name, vit_fields(variants.vit_variant(name, 1)[0])) for name in variants.NAMES]
    for field in ("moe_pos", *_STITCHES):
        if given.get(field):
            raise UserError(f"{where}: --arch says {field} {given[field]}, the weights have none")
    decision = _decide(source, shapes, given, known, {})
    spec = dataclasses.asdict(_spec(decision))
    description = {"kind": "vit", "spec": spec, "depths": _cut(source, decision, shapes)}
    if source.module is not None:
        description["module"] = source.module
    return description, decision.notes


def describe_vmoe(source: TorchWeights, given: Mapping, where: str) -> tuple[dict, list[str]]:
    """Description and notes; see architecture.describe."""
    several = "" not in source.layout["files"]
    # Students of a directory count their blocks from 0, the network counts on.
    name_of = (lambda name: whole_name(name, source.depths)) if several else str
    shapes = Shapes({name_of(n): tensor.shape for n, tensor in source.tensors.items()}, where)
    common = {"qkv_bias": True, "eps": 1e-6, "image_size": 224}
    known = [
        (f"vmoe_{size}", {"patch": patch, "width": width, "heads": heads, **common})
        for size, (patch, width, heads) in VMOE_VARIANTS.items()
    ]
    found = _expert_fields(shapes)
    first, last = _embeds(shapes), _classifies(shapes)
    if not several and not (first and last):
        given = _of_student(given, shapes, found["moe_pos"], first, last)
    # Left out of --arch: of one file, as they are; of students, dropped as published.
    kept = {f: given.get(f, [] if several else found[f]) for f in _STITCHES}
    for field, positions in kept.items():
        if not set(positions) <= set(found[field]):
            raise UserError(f"{where}: --arch says {field} {positions}, there are {found[field]}")
    if not any(kept.values()) and given.get("stitch_dim") == 0:
        given = {field: value for field, value in given.items() if field != "stitch_dim"}
    decision = _decide(source, shapes, given, known, found)
    experts = found.get("experts", 1)
    spec = VMoESpec(
        vit=_spec(decision),
        moe_pos=tuple(found["moe_pos"]),
        experts=experts,
        top_k=min(2, experts),
        # The published router's weight of a single expert is always 1, as is this one's.
        router="published" if experts > 1 else "vmoe",
        stitch_dim=found.get("stitch_dim", 0) if any(kept.values()) else 0,
        **{field: tuple(positions) for field, positions in kept.items()},
    )
    depths = _cut(source, decision, shapes)
    description = {"kind": "vmoe", "spec": dataclasses.asdict(spec), "depths": depths}
    if first and last:
        return description, decision.notes
    if several or len(depths) != 1:
        end = "head" if first else "embedding"
        raise UserError(f"{where}: a network of {len(depths)} stages without its {end}")
    expected, idx = 0 if first else -1 if last else 1, given.get("idx")
    if idx is not None and max(idx, -1) != expected and not (expected == 1 and idx > 1):
        raise UserError(f"{where}: --arch says idx {idx}, but this is student {expected}")
    return description | {"first": first, "last": last}, decision.notes


def _of_student(
    given: Mapping, shapes: Shapes, moe_pos: list[int], first: bool, last: bool
) -> Mapping:
    """What `given` says about this student, where it describes the whole network."""
    depths, blocks = given.get("depths", []), len(shapes.numbered(r"blocks\.", "block"))
    if len(depths) < 2:
        return given
    end, idx = len(depths) - 1, given.get("idx")
    if first or last:
        possible = [0 if first else end]
    else:
        possible = [idx] if idx in range(1, end) else range(1, end)
    for i in possible:
        start = sum(depths[:i])
        inside = range(start, start + depths[i])
        local = [b - start for b in given.get("moe_pos", []) if b in inside]
        if depths[i] == blocks and ("moe_pos" not in given or local == moe_pos):
            # A student has its stitches whether or not the network keeps them.
            own = {k: v for k, v in given.items() if k not in _STITCHES}
            own |= {"moe_pos": local} if "moe_pos" in given else {}
            return own | {"depths": [blocks]} | ({"idx": -1} if last and idx == end else {})
    return given  # it contradicts the weights, which is said below


def _expert_fields(shapes: Shapes) -> dict[str, Any]:
    """Where experts and stitches are, how many experts, and how wide stitches."""
    blocks = shapes.numbered(r"blocks\.", "block")

    def having(word: str) -> list[int]:
        return [b for b, names in enumerate(blocks) if any(name.startswith(word) for name in names)]

    found: dict[str, Any] = {
        "moe_pos": having("moe."),
        "pre_stitch_pos": having("pre_stitch."),
        "post_stitch_pos": having("post_stitch."),
    }
    single = r"moe\.experts\.(\d+)\."
    counts = {
        len({m[1] for name in blocks[b] if (m := re.match(single, name))}) for b in found["moe_pos"]
    }
    if len(counts) > 1 or 0 in counts:
        raise UserError(f"{shapes.where}: blocks of {sorted(counts)} experts")
    if counts:
        found["experts"] = counts.pop()
    widths = {shape[0] for shape in shapes.ending(".post_stitch.fc.weight", 2)}
    widths |= {shape[1] for shape in shapes.ending(".pre_stitch.fc.weight", 2)}
    if len(widths) > 1:
        raise UserError(f"{shapes.where}: stitches of widths {sorted(widths)}")
    return found | ({"stitch_dim": widths.pop()} if widths else {})


def _fields(shapes: Shapes) -> dict[str, Any]:
    """Fields that the tensors of a vision transformer, or of a module of one, show."""
    widths = shapes.ending(".norm1.weight", 1)
    if not widths:
        raise UserError(f"{shapes.where}: no block has a norm1.weight")
    qkv_bias = bool(shapes.ending("attn.qkv.bias", 1))
    found: dict[str, Any] = {"width": widths[0][0], "qkv_bias": qkv_bias}
    if _embeds(shapes):
        patch = shapes.of("patch_embed.proj.weight", 4)[-1]
        positions = shapes.of("pos_embed", 3)[1] - 1
        side = math.isqrt(positions)
        if side * side != positions or not side:
            raise UserError(
                f"{shapes.where}: pos_embed has {positions + 1} positions, not a square and one"
            )
        found |= {"patch": patch, "image_size": side * patch}
    if _classifies(shapes):
        found["classes"] = shapes.of("head.weight", 2)[0]
    return found


def _embeds(shapes: Shapes) -> bool:
    return any(name in shapes for name in ("cls_token", "pos_embed", "patch_embed.proj.weight"))


def _classifies(shapes: Shapes) -> bool:
    return any(name in shapes for name in ("head.weight", "head.bias"))


def _decide(
    source: TorchWeights, shapes: Shapes, given: Mapping, known: list[tuple[str, dict]], more: dict
) -> Decision:
    """`known`: published variants, as (name, fields); `more`: found besides the transformer's."""
    free = ("image_size", "depths", *_STITCHES)
    decision = Decision(_fields(shapes) | more, given, free, shapes.where)
    named = [(name, fields) for name, fields in known if name == source.words.get("model_name")]
    for name, fields in named or known:
        if all(
            decision.found.get(key, fields[key]) == fields[key]
            for key in ("patch", "width", "qkv_bias")
        ):
            own = ("heads", "eps") if _embeds(shapes) else ("heads", "eps", "patch", "image_size")
            decision.assume({key: fields[key] for key in own}, name)
            break
    # Not visible, and the same wherever there are biases (reference section 1).
    eps = 1e-6 if decision.found["qkv_bias"] else 1e-5
    decision.assume({"eps": eps}, "the published variants")
    # Nothing in a module without embedding, or without head, depends on these.
    unused = {} if _embeds(shapes) else {"patch": 1, "image_size": 1}
    unused |= {} if _classifies(shapes) else {"classes": 1}
    decision.published = unused | decision.published
    return decision


def _spec(decision: Decision) -> ViTSpec:
    """A given image size wins: the position embedding is resized to it."""
    fields = decision.get(*_SPEC)
    return ViTSpec(
        **fields | {"image_size": decision.given.get("image_size", fields["image_size"])}
    )


def _cut(source: TorchWeights, decision: Decision, shapes: Shapes) -> list[int]:
    """Blocks of each stage: as given, else as in the files, else all in one."""
    if source.module is None:
        blocks = len(shapes.numbered(r"blocks\.", "block"))
    else:  # of a lone module, the names are those of its own blocks
        blocks = sum(source.depths)
    depths = list(decision.given.get("depths") or source.depths or [blocks])
    if sum(depths) != blocks:
        raise UserError(
            f"{decision.where}: --arch says depths {depths}, {sum(depths)} blocks; the weights "
            f"have {blocks}"
        )
    if source.module is not None and depths != source.depths:
        raise UserError(
            f"{decision.where}: a module of depths {source.depths} cannot be cut into {depths}"
        )
    return depths
