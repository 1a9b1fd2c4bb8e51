"""Infers the description of a vision transformer, dense or with experts, from names and shapes."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from m2mkd_jax.conversion.arch_flag import ROUTING, VMOE_VARIANTS, vit_fields
from m2mkd_jax.conversion.infer_fields import FieldResolver, Shapes
from m2mkd_jax.conversion.torch_layouts import assembled_name
from m2mkd_jax.conversion.torch_weights import TorchWeights
from m2mkd_jax.errors import UserError
from m2mkd_jax.models import variants
from m2mkd_jax.models.moe.spec import VMoESpec
from m2mkd_jax.models.vit_spec import ViTSpec

Description = dict[str, Any]
Variants = list[tuple[str, dict[str, Any]]]  # name and fields

_VIT_FIELDS = ("image_size", "patch", "width", "heads", "classes", "qkv_bias", "eps", "channels")
_STITCHES = ("pre_stitch_pos", "post_stitch_pos")


def infer_vit(
    weights: TorchWeights, given: Mapping[str, Any], where: str
) -> tuple[Description, list[str]]:
    """Infers the description of a dense transformer; see `infer.infer_description`."""
    shapes = Shapes({name: tensor.shape for name, tensor in weights.tensors.items()}, where)
    known = [(name, vit_fields(variants.vit_variant(name, 1)[0])) for name in variants.NAMES]
    for field in ("moe_pos", *_STITCHES):
        if given.get(field):
            raise UserError(f"{where}: --arch says {field} {given[field]}, the weights have none")
    resolver = _resolver(weights, shapes, given, known, {})
    spec = dataclasses.asdict(_vit_spec(resolver))
    depths = _depths(weights, resolver, shapes)
    description: Description = {"kind": "vit", "spec": spec, "depths": depths}
    if weights.module is not None:
        description["module"] = weights.module
    return description, resolver.notes


def infer_vmoe(
    weights: TorchWeights, given: Mapping[str, Any], where: str
) -> tuple[Description, list[str]]:
    """Infers the description of a V-MoE; see `infer.infer_description`."""
    several = weights.from_directory
    shapes = _network_shapes(weights, where)
    found = _expert_fields(shapes)
    first, last = _has_embedding(shapes), _has_head(shapes)
    if not several and not (first and last):
        given = _student_fields(given, shapes, found["moe_pos"], first, last)
    # If --arch does not say where stitches stay: as in the file; students of a directory are
    # assembled without them, as published.
    kept = {f: given.get(f, [] if several else found[f]) for f in _STITCHES}
    for field, positions in kept.items():
        if not set(positions) <= set(found[field]):
            raise UserError(f"{where}: --arch says {field} {positions}, there are {found[field]}")
    if not any(kept.values()) and given.get("stitch_dim") == 0:
        given = {field: value for field, value in given.items() if field != "stitch_dim"}
    resolver = _resolver(weights, shapes, given, _vmoe_variants(), found)
    experts = found.get("experts", 1)
    spec = VMoESpec(
        vit=_vit_spec(resolver),
        moe_pos=tuple(found["moe_pos"]),
        experts=experts,
        **(assumed_routing(experts) | {k: given[k] for k in ROUTING if k in given}),
        stitch_dim=found.get("stitch_dim", 0) if any(kept.values()) else 0,
        pre_stitch_pos=tuple(kept["pre_stitch_pos"]),
        post_stitch_pos=tuple(kept["post_stitch_pos"]),
    )
    depths = _depths(weights, resolver, shapes)
    description = {"kind": "vmoe", "spec": dataclasses.asdict(spec), "depths": depths}
    if first and last:
        return description, resolver.notes
    if several or len(depths) != 1:
        end = "head" if first else "embedding"
        raise UserError(f"{where}: a network of {len(depths)} stages without its {end}")
    expected, idx = 0 if first else -1 if last else 1, given.get("idx")
    if idx is not None and max(idx, -1) != expected and not (expected == 1 and idx > 1):
        raise UserError(f"{where}: --arch says idx {idx}, but this is student {expected}")
    return description | {"first": first, "last": last}, resolver.notes


def assumed_routing(experts: int) -> dict[str, Any]:
    """What a V-MoE's routing is taken to be where nothing says it: the published one.

    With a single expert the published router's weight is always 1, as is the other one's.
    """
    return {"router": "published" if experts > 1 else "vmoe", "top_k": min(2, experts)}


def _network_shapes(weights: TorchWeights, where: str) -> Shapes:
    """Shapes by the names of the whole network; students of a directory count blocks from 0."""
    shapes = {name: tensor.shape for name, tensor in weights.tensors.items()}
    if weights.from_directory:
        depths = weights.depths or []
        shapes = {assembled_name(name, depths): shape for name, shape in shapes.items()}
    return Shapes(shapes, where)


def _vmoe_variants() -> Variants:
    common = {"qkv_bias": True, "eps": 1e-6, "image_size": 224}
    return [
        (f"vmoe_{size}", {"patch": patch, "width": width, "heads": heads, **common})
        for size, (patch, width, heads) in VMOE_VARIANTS.items()
    ]


def _student_fields(
    given: Mapping[str, Any], shapes: Shapes, moe_pos: list[int], first: bool, last: bool
) -> Mapping[str, Any]:
    """The fields of a single student, where `given` describes its whole network.

    Args:
        given: the fields of `--arch`.
        shapes: of the student.
        moe_pos: the student's blocks with experts.
        first: whether the student has the embedding.
        last: whether it has the head.

    Returns:
        `given` itself if it does not describe several stages, or contradicts the weights (which
        is refused later).
    """
    depths, blocks = given.get("depths", []), len(shapes.numbered(r"blocks\.", "block"))
    if len(depths) < 2:
        return given
    end, idx = len(depths) - 1, given.get("idx")
    possible: Iterable[int] = range(1, end)
    if first or last:
        possible = [0 if first else end]
    elif idx is not None and idx in range(1, end):
        possible = [idx]
    for i in possible:
        start = sum(depths[:i])
        inside = range(start, start + depths[i])
        local = [b - start for b in given.get("moe_pos", []) if b in inside]
        if depths[i] == blocks and ("moe_pos" not in given or local == moe_pos):
            # A student has its stitches whether or not the network keeps them.
            own = {k: v for k, v in given.items() if k not in _STITCHES}
            own |= {"moe_pos": local} if "moe_pos" in given else {}
            return own | {"depths": [blocks]} | ({"idx": -1} if last and idx == end else {})
    return given


def _expert_fields(shapes: Shapes) -> dict[str, Any]:
    """Positions of experts and stitches, the number of experts, and the stitches' width."""
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


def _shape_fields(shapes: Shapes) -> dict[str, Any]:
    """Fields that the tensors of a vision transformer, or of one of its modules, show."""
    widths = shapes.ending(".norm1.weight", 1)
    if not widths:
        raise UserError(f"{shapes.where}: no block has a norm1.weight")
    qkv_bias = bool(shapes.ending("attn.qkv.bias", 1))
    found: dict[str, Any] = {"width": widths[0][0], "qkv_bias": qkv_bias}
    if _has_embedding(shapes):
        kernel = shapes.of("patch_embed.proj.weight", 4)
        patch, channels = kernel[-1], kernel[1]
        positions = shapes.of("pos_embed", 3)[1] - 1
        side = math.isqrt(positions)
        if side * side != positions or not side:
            no_class = math.isqrt(positions + 1) ** 2 == positions + 1
            why = (
                "none for a class token, which is needed here"
                if no_class
                else "not a square and one"
            )
            raise UserError(f"{shapes.where}: pos_embed has {positions + 1} positions, {why}")
        found |= {"patch": patch, "image_size": side * patch, "channels": channels}
    if _has_head(shapes):
        found["classes"] = shapes.of("head.weight", 2)[0]
    return found


def _has_embedding(shapes: Shapes) -> bool:
    return any(name in shapes for name in ("cls_token", "pos_embed", "patch_embed.proj.weight"))


def _has_head(shapes: Shapes) -> bool:
    return any(name in shapes for name in ("head.weight", "head.bias"))


def _resolver(
    weights: TorchWeights,
    shapes: Shapes,
    given: Mapping[str, Any],
    known: Variants,
    found: Mapping[str, Any],
) -> FieldResolver:
    """Resolves the fields of a transformer.

    Args:
        weights: opened weights.
        shapes: their shapes, by the names of the network.
        given: the fields of `--arch`.
        known: published variants.
        found: fields that the weights show besides those of a dense transformer.

    Raises:
        UserError: `given` contradicts the weights.
    """
    overridable = ("image_size", "depths", *_STITCHES)
    resolver = FieldResolver({**_shape_fields(shapes), **found}, given, overridable, shapes.where)
    named = [(name, fields) for name, fields in known if name == weights.entries.get("model_name")]
    for name, fields in named or known:
        if all(
            resolver.found.get(key, fields[key]) == fields[key]
            for key in ("patch", "width", "qkv_bias")
        ):
            shown = _has_embedding(shapes)
            own = ("heads", "eps") if shown else ("heads", "eps", "patch", "image_size")
            resolver.assume({key: fields[key] for key in own}, name)
            break
    # Without biases it is 1e-5 in the published ViT-Huge and 1e-6 in timm's others: asked for.
    if resolver.found["qkv_bias"]:
        resolver.assume({"eps": 1e-6}, "the published variants with biases")
    # A module without embedding, or without head, does not depend on these.
    unused = {} if _has_embedding(shapes) else {"patch": 1, "image_size": 1, "channels": 3}
    unused |= {} if _has_head(shapes) else {"classes": 1}
    resolver.published = unused | resolver.published
    return resolver


def _vit_spec(resolver: FieldResolver) -> ViTSpec:
    """A given image size wins: the position embedding is resized to it."""
    fields = resolver.get(*_VIT_FIELDS)
    return ViTSpec(
        **fields | {"image_size": resolver.given.get("image_size", fields["image_size"])}
    )


def _depths(weights: TorchWeights, resolver: FieldResolver, shapes: Shapes) -> list[int]:
    """Blocks of each stage: as given, else as in the files, else all in one stage.

    Raises:
        UserError: they are not those of the weights.
    """
    in_files = weights.depths or []
    # The names of a single module are those of its own blocks.
    blocks = sum(in_files)
    if weights.module is None:
        blocks = len(shapes.numbered(r"blocks\.", "block"))
    depths = list(resolver.given.get("depths") or in_files or [blocks])
    if sum(depths) != blocks:
        raise UserError(
            f"{resolver.where}: --arch says depths {depths}, {sum(depths)} blocks; the weights "
            f"have {blocks}"
        )
    if weights.module is not None and depths != weights.depths:
        raise UserError(
            f"{resolver.where}: a module of depths {weights.depths} cannot be cut into {depths}"
        )
    return depths
