"""What the names and shapes of a NAC, or of its students, say about it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from m2mkd_jax.conversion.infer_fields import Decision, Shapes
from m2mkd_jax.conversion.torch_weights import TorchWeights
from m2mkd_jax.errors import UserError
from m2mkd_jax.models.nac.spec import STAGE_STRIDE, STEM_STRIDE, NACSpec

# What the published students are taught on; a middle one shows neither.
_STUDENT_INPUT = {"image_size": 224, "classes": 1000}
_ONE_LATENT = {"input_latents": 1, "mediator_latents": 1, "output_latents": 1}
# What a NAC need not have in common with the students that it is assembled from.
_NETWORKS_OWN = (*_STUDENT_INPUT, *_ONE_LATENT, "signature_dim", "iterations")
_PUBLISHED_NACS = ((384, 384), (512, 512))  # state and inner width; heads of 64
_HEAD_DIM = 64
_FIELDS = frozenset(field.name for field in dataclasses.fields(NACSpec))
_MODULE = {"readin": 0, "mediator": 1, "readout": 2}


def describe_nac(source: TorchWeights, given: Mapping, where: str) -> tuple[dict, list[str]]:
    """Description and notes; see architecture.describe."""
    shapes = Shapes({name: tensor.shape for name, tensor in source.tensors.items()}, where)
    graph, logits = "latent_graphs.0.", "output_tokenizer.to_logits.weight"
    found = _layer(shapes, f"{graph}read_out.", "latent_attention")
    found |= _tokenizer(shapes, "input_tokenizer.")
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
    spec, notes = _spec(found, given, where)
    return {"kind": "nac", "spec": dataclasses.asdict(spec)}, notes


def describe_students(source: TorchWeights, given: Mapping, where: str) -> tuple[dict, list[str]]:
    """A set of students, or a single one; where a whole NAC is given, what its students are."""
    several = "" not in source.layout["files"]
    found: dict[str, Any] = {}
    for i, part in enumerate(source.parts):
        group = f"student_{i}/" if several else ""
        shapes = {
            name.removeprefix(group): tensor.shape
            for name, tensor in source.tensors.items()
            if name.startswith(group)
        }
        for field, value in _student(Shapes(shapes, where), part).items():
            if found.setdefault(field, value) != value:
                raise UserError(f"{where}: students of {field} {found[field]} and {value}")
    stitch = found.pop("stitch_dim")
    Decision({"stitch_dim": stitch}, given, (), where)
    own = _NETWORKS_OWN if given.get("kind") == "nac" else tuple(_ONE_LATENT)
    told = {key: value for key, value in given.items() if key not in own}
    unseen = {key: value for key, value in _STUDENT_INPUT.items() if key not in told}
    spec, notes = _spec({**unseen, **_ONE_LATENT, **found}, told, where)
    description = {
        "kind": "nac_student",
        "spec": dataclasses.asdict(spec),
        "modules": len(source.parts) if several else len(_MODULE),
        "stitch_dim": stitch,
        "states": 1,
    }
    if several:
        return description, notes
    part, idx = source.parts[0], given.get("idx")
    if idx is not None and part != {0: "readin", -1: "readout"}.get(idx, "mediator"):
        raise UserError(f"{where}: --arch says idx {idx}, but this is a {part} student")
    # Of a single one only its kind is known: the first, a middle or the last of three.
    return description | {"module": _MODULE[part]}, notes


def _layer(shapes: Shapes, prefix: str, attention: str) -> dict[str, Any]:
    """Fields that a latent layer shows: `prefix`.ffn and `prefix`.`attention`."""
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


def _tokenizer(shapes: Shapes, prefix: str) -> dict[str, Any]:
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
    return {"position_dim": grid[0], "image_size": side, "tokenizer_depths": depths}


def _student(shapes: Shapes, part: str) -> dict[str, Any]:
    if part == "readin":
        found = _layer(shapes, "read_in.", "read_in_attention") | _tokenizer(shapes, "tokenizer.")
        return found | {"stitch_dim": shapes.of("post_stitch.weight", 2)[0]}
    found = _layer(shapes, "", "latent_attention")
    found["stitch_dim"] = shapes.of("pre_stitch.weight", 2)[1]
    if part == "readout":
        found["classes"] = shapes.of("tokenizer.to_logits.weight", 2)[0]
    return found


def _spec(found: dict, given: Mapping, where: str) -> tuple[NACSpec, list[str]]:
    """The fields of a NAC, and notes; `found` has the inner width in place of the heads."""
    found, told = dict(found), {key: value for key, value in given.items() if key in _FIELDS}
    inner, state = found.pop("inner"), found["state_dim"]
    # A capacity that gives the same width is the same: 2 / 3 is not 0.667.
    capacity = told.get("ffn_capacity", found["ffn_capacity"])
    if round(capacity * state) == round(found["ffn_capacity"] * state):
        found["ffn_capacity"] = capacity
    decision = Decision(found, told, (), where)
    if "head_dim" in told and "heads" not in told:
        decision.assume({"heads": inner // told["head_dim"]}, "--arch's head_dim")
    elif (state, inner) in _PUBLISHED_NACS:
        decision.assume({"heads": inner // _HEAD_DIM}, "the published NACs")
    heads = decision.get("heads")["heads"]
    if not heads or told.get("head_dim", inner // heads) * heads != inner:
        raise UserError(f"{where}: {heads} heads do not make up the weights' {inner} channels")
    values = {**decision.given, **found, "heads": heads, "head_dim": inner // heads}
    values["tokenizer_depths"] = tuple(values.get("tokenizer_depths", NACSpec.tokenizer_depths))
    return NACSpec(**values), decision.notes


def assembled_spec(students: dict, given: Mapping[str, Any], where: str) -> NACSpec:
    """The fields of the NAC that is assembled from students: theirs, and the network's own."""
    own = Decision({}, given, (), where).get(*_STUDENT_INPUT, *_ONE_LATENT)
    told = {key: value for key, value in given.items() if key in _FIELDS}
    fields = {**students["spec"], **told, **own, "iterations": students["modules"] - 2}
    if told.get("iterations", fields["iterations"]) != fields["iterations"]:
        raise UserError(
            f"{where}: --arch says {told['iterations']} iterations; there are "
            f"{fields['iterations']} middle students"
        )
    return NACSpec(**{**fields, "tokenizer_depths": tuple(fields["tokenizer_depths"])})
