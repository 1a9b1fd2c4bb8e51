"""Infers the description of a NAC, or of its students, from names and shapes."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from m2mkd_jax.conversion.infer_fields import FieldResolver, Shapes
from m2mkd_jax.conversion.torch_weights import TorchWeights
from m2mkd_jax.errors import UserError
from m2mkd_jax.models.nac.spec import STAGE_STRIDE, STEM_STRIDE, NACSpec

Description = dict[str, Any]

# What the published students are distilled on (docs/reference.md#nac-students); a middle student
# shows neither.
_STUDENT_INPUT = {"image_size": 224, "classes": 1000}
_ONE_LATENT = {"input_latents": 1, "mediator_latents": 1, "output_latents": 1}
# Fields in which a NAC may differ from the students that it is assembled from.
_OWN_FIELDS = (*_STUDENT_INPUT, *_ONE_LATENT, "signature_dim", "iterations")
_PUBLISHED_NACS = ((384, 384), (512, 512))  # state and inner width; heads of 64
_HEAD_DIM = 64
_FIELDS = frozenset(field.name for field in dataclasses.fields(NACSpec))
_MODULE = {"readin": 0, "mediator": 1, "readout": 2}


def infer_nac(
    weights: TorchWeights, given: Mapping[str, Any], where: str
) -> tuple[Description, list[str]]:
    """Infers the description of a NAC; see `infer.infer_description`."""
    shapes = Shapes({name: tensor.shape for name, tensor in weights.tensors.items()}, where)
    graph, logits = "latent_graphs.0.", "output_tokenizer.to_logits.weight"
    found = _layer_fields(shapes, f"{graph}read_out.", "latent_attention")
    found |= _tokenizer_fields(shapes, "input_tokenizer.")
    for group in ("input", "mediator", "output"):
        signatures = shapes.of(f"{graph}{group}_latents.signatures_", 2)
        found[f"{group}_latents"], found["signature_dim"] = signatures
    codes = f"{graph}mediator_latents.codes_"
    found["codes_per_iteration"] = len(shapes.shapes.get(codes, ())) == 3
    iterations = shapes.numbered(re.escape(f"{graph}propagators."), "propagator")
    found["iterations"] = len(iterations)
    found["seeder"] = f"{graph}latent_seeder.code_to_state_mu.weight" in shapes
    pooled = logits in shapes
    found["output"] = "pooling" if pooled else "first_slot"
    found["classes"] = shapes.of(logits, 2)[0] if pooled else found["state_dim"]
    spec, notes = _nac_spec(found, given, where)
    return {"kind": "nac", "spec": dataclasses.asdict(spec)}, notes


def infer_nac_students(
    weights: TorchWeights, given: Mapping[str, Any], where: str
) -> tuple[Description, list[str]]:
    """Infers the description of a set of students, or of a single one.

    If `given` describes a whole NAC, only the fields that its students have in common with it
    count. See `infer.infer_description`.
    """
    several = weights.from_directory
    found: dict[str, Any] = {}
    for i, part in enumerate(weights.parts):
        group = f"student_{i}/" if several else ""
        shapes = {
            name.removeprefix(group): tensor.shape
            for name, tensor in weights.tensors.items()
            if name.startswith(group)
        }
        for field, value in _student_fields(Shapes(shapes, where), part).items():
            if found.setdefault(field, value) != value:
                raise UserError(f"{where}: students of {field} {found[field]} and {value}")
    stitch = found.pop("stitch_dim")
    FieldResolver({"stitch_dim": stitch}, given, (), where)  # refuses another width in `given`
    own = _OWN_FIELDS if given.get("kind") == "nac" else tuple(_ONE_LATENT)
    common = {key: value for key, value in given.items() if key not in own}
    assumed = {key: value for key, value in _STUDENT_INPUT.items() if key not in common}
    spec, notes = _nac_spec({**assumed, **_ONE_LATENT, **found}, common, where)
    description = {
        "kind": "nac_student",
        "spec": dataclasses.asdict(spec),
        "modules": len(weights.parts) if several else len(_MODULE),
        "stitch_dim": stitch,
        "states": 1,
    }
    if several:
        return description, notes
    part, idx = weights.parts[0], given.get("idx")
    if idx is not None and part != {0: "readin", -1: "readout"}.get(idx, "mediator"):
        raise UserError(f"{where}: --arch says idx {idx}, but this is a {part} student")
    # A single file shows only what the student is: the first, a middle or the last one of three.
    return description | {"module": _MODULE[part]}, notes


def _layer_fields(shapes: Shapes, prefix: str, attention: str) -> dict[str, Any]:
    """Fields that a latent layer shows, made of `prefix`.ffn and `prefix`.`attention`."""
    inner, state = shapes.of(f"{prefix}{attention}.query_compiler.native_weight", 2)
    hidden = shapes.of(f"{prefix}ffn.ffn.2.native_weight", 2)[1]
    return {
        "state_dim": state,
        "code_dim": shapes.of(f"{prefix}{attention}.query_compiler.scale.weight", 2)[1],
        "inner": inner,
        "ffn_capacity": hidden / state,
        "geglu": shapes.of(f"{prefix}ffn.ffn.0.native_weight", 2)[0] == 2 * hidden,
        "qkv_bias": f"{prefix}{attention}.key_compiler.native_bias" in shapes,
    }


def _tokenizer_fields(shapes: Shapes, prefix: str) -> dict[str, Any]:
    """Fields that the tokenizer shows."""
    grid = shapes.of(f"{prefix}positional_grid.grid", 3)
    if grid[1] != grid[2]:
        raise UserError(f"{shapes.where}: a positional grid of {grid[1]} x {grid[2]}, not square")
    backbone = re.escape(f"{prefix}backbone.")
    stages = len(shapes.numbered(backbone + r"downsample_layers\.", "tokenizer stage"))
    depths = [
        len(shapes.numbered(rf"{backbone}stages\.{i}\.", f"block of tokenizer stage {i}:"))
        for i in range(stages)
    ]
    if not depths:
        raise UserError(f"{shapes.where}: the tokenizer has no stages")
    side = grid[1] * STEM_STRIDE * STAGE_STRIDE ** (stages - 1)
    channels = shapes.of(f"{prefix}backbone.downsample_layers.0.0.weight", 4)[1]
    found = {"position_dim": grid[0], "image_size": side, "channels": channels}
    return found | {"tokenizer_depths": depths}


def _student_fields(shapes: Shapes, part: str) -> dict[str, Any]:
    """Fields that one student shows; `part` is 'readin', 'mediator' or 'readout'."""
    if part == "readin":
        found = _layer_fields(shapes, "read_in.", "read_in_attention")
        found |= _tokenizer_fields(shapes, "tokenizer.")
        return found | {"stitch_dim": shapes.of("post_stitch.weight", 2)[0]}
    found = _layer_fields(shapes, "", "latent_attention")
    found["stitch_dim"] = shapes.of("pre_stitch.weight", 2)[1]
    if part == "readout":
        found["classes"] = shapes.of("tokenizer.to_logits.weight", 2)[0]
    return found


def _nac_spec(
    found: Mapping[str, Any], given: Mapping[str, Any], where: str
) -> tuple[NACSpec, list[str]]:
    """The fields of a NAC and notes on the assumed ones.

    Args:
        found: what the weights show; "inner" is the width of all heads together.
        given: the fields of `--arch`, among others.
        where: the path, for messages.

    Raises:
        UserError: `given` contradicts the weights, or the number of heads is unknown.
    """
    found, given = dict(found), {key: value for key, value in given.items() if key in _FIELDS}
    inner, state = found.pop("inner"), found["state_dim"]
    # A capacity that gives the same hidden width is the same: 2 / 3 is not 0.667.
    capacity = given.get("ffn_capacity", found["ffn_capacity"])
    if round(capacity * state) == round(found["ffn_capacity"] * state):
        found["ffn_capacity"] = capacity
    resolver = FieldResolver(found, given, (), where)
    if "head_dim" in given and "heads" not in given:
        resolver.assume({"heads": inner // given["head_dim"]}, "--arch's head_dim")
    elif (state, inner) in _PUBLISHED_NACS:
        resolver.assume({"heads": inner // _HEAD_DIM}, "the published NACs")
    heads = resolver.get("heads")["heads"]
    if not heads or given.get("head_dim", inner // heads) * heads != inner:
        raise UserError(f"{where}: {heads} heads do not make up the weights' {inner} channels")
    values = {**resolver.given, **found, "heads": heads, "head_dim": inner // heads}
    values["tokenizer_depths"] = tuple(values.get("tokenizer_depths", NACSpec.tokenizer_depths))
    return NACSpec(**values), resolver.notes


def assembled_spec(students: Description, given: Mapping[str, Any], where: str) -> NACSpec:
    """The fields of the NAC that is assembled from students: theirs and the network's own.

    Args:
        students: description of the set of students.
        given: the fields of `--arch`, of a whole NAC.
        where: the path, for messages.

    Raises:
        UserError: a field of the network is missing, or the number of students does not fit.
    """
    own = FieldResolver({}, given, (), where).get(*_STUDENT_INPUT, *_ONE_LATENT)
    stated = {key: value for key, value in given.items() if key in _FIELDS}
    fields = {**students["spec"], **stated, **own, "iterations": students["modules"] - 2}
    if stated.get("iterations", fields["iterations"]) != fields["iterations"]:
        raise UserError(
            f"{where}: --arch says {stated['iterations']} iterations; there are "
            f"{fields['iterations']} middle students"
        )
    return NACSpec(**{**fields, "tokenizer_depths": tuple(fields["tokenizer_depths"])})
