"""The fields of a network that `--arch` states.

It names a variant, a JSON file, the original's YAML or a config. All become a flat dict; a field
that is not stated is left out, and inferred from the weights' names and shapes (infer.py).
"""

from __future__ import annotations

import dataclasses
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

from m2mkd_jax.arguments import at_home
from m2mkd_jax.config.defaults import meta_depths, teaching_data
from m2mkd_jax.config.networks import nac_spec, teacher_spec, vmoe_spec
from m2mkd_jax.conversion.arch_yaml import yaml_fields
from m2mkd_jax.errors import UserError, did_you_mean
from m2mkd_jax.files import strict_json
from m2mkd_jax.models import variants
from m2mkd_jax.models.moe.spec import VMoESpec
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.models.vit_spec import ViTSpec

Fields = dict[str, Any]

KINDS = ("vit", "vmoe", "nac", "nac_student")
# Patch, width and heads of the published V-MoE variants; all have qkv biases and eps 1e-6.
VMOE_VARIANTS = {"base": (16, 768, 12), "large": (16, 1024, 16), "huge": (14, 1280, 16)}

_INTEGERS = {"patch", "width", "heads", "image_size", "classes", "experts", "stitch_dim", "idx"}
_LISTS = {"depths", "moe_pos", "pre_stitch_pos", "post_stitch_pos"}
# Of a V-MoE, what neither names nor shapes show; types by the defaults of VMoESpec.
ROUTING = ("router", "top_k", "noise", "dispatch", "capacity_factor", "group_images")
_FIELDS = {"kind", "qkv_bias", "eps", *_INTEGERS, *_LISTS, *ROUTING}
# What the weights of a patch embedding alone tell, `channels`, is not stated.
_NAC_FIELDS = {field.name for field in dataclasses.fields(NACSpec)} - {"remat", "fused", "channels"}
_ASSEMBLY_FIELDS = {"student_type", "prior", "prior_options"}  # of a NAC made of students
_STUDENT_TYPES = ("imagenet", "tinyimnet", "tinynet")


def read_arch(text: str, kind: str, blocks: int | None) -> Fields:
    """The fields that `--arch=TEXT` states for a network.

    Args:
        text: VARIANT[:DEPTH,...], or a file: .json, .yml (the original's), .py[:ARGUMENT] (ours).
        kind: of the weights; a config of ours describes several networks.
        blocks: how many blocks the weights have, None if they are no transformer's; a config's
            meta model and teacher differ in it.

    Raises:
        UserError: there is no such variant or file, or a field makes no sense.
    """
    path = at_home(text.split(".py:")[0] + ".py" if ".py:" in text else text)
    if path.suffix == ".json":
        return check_fields(_parsed(path, strict_json.parse), str(path))
    if path.suffix in (".yml", ".yaml"):
        return _from_yaml(_parsed(path, yaml.safe_load), str(path))
    if path.suffix == ".py":
        return _from_config(path, text.partition(".py:")[2], kind, blocks)
    return _variant_fields(text)


def _parsed(path: Path, parse: Callable[[str], Any]) -> Fields:
    try:
        content = parse(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UserError(f"--arch: {path} cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--arch: {path} cannot be parsed: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"--arch: {path} holds no fields")
    return content


def _variant_fields(text: str) -> Fields:
    """The fields of VARIANT[:DEPTH,...]."""
    name, _, listed = text.partition(":")
    family, _, size = name.rpartition("_")
    if family in ("vmoe", "vmoe_student") and size in VMOE_VARIANTS:
        patch, width, heads = VMOE_VARIANTS[size]
        fields = {
            "kind": "vmoe",
            "patch": patch,
            "width": width,
            "heads": heads,
            "image_size": 224,
            "qkv_bias": True,
            "eps": 1e-6,
        }
    elif name in variants.NAMES:
        spec, _ = variants.vit_variant(name, classes=1)
        fields = vit_fields(spec, classes=False)
    else:
        hint = did_you_mean(name, [*variants.NAMES, *(f"vmoe_{size}" for size in VMOE_VARIANTS)])
        raise UserError(f'--arch: "{name}" is no variant and no .json, .yml or .py file; {hint}')
    if listed:
        try:
            fields["depths"] = [int(depth) for depth in listed.split(",")]
        except ValueError:
            raise UserError(f'--arch: "{listed}" is no list of depths like 6,6,6,6') from None
    return check_fields(fields, name)


def vit_fields(spec: ViTSpec, classes: bool = True) -> Fields:
    """The fields of a vision transformer; `classes`: with their number."""
    left_out = ("remat", "channels") if classes else ("remat", "channels", "classes")
    fields = {k: v for k, v in dataclasses.asdict(spec).items() if k not in left_out}
    return {"kind": "vit", **fields}


def vmoe_fields(spec: VMoESpec) -> Fields:
    """The fields of a V-MoE."""
    names = ("experts", "moe_pos", "pre_stitch_pos", "post_stitch_pos", *ROUTING)
    own = {k: getattr(spec, k) for k in names}
    stitch = {"stitch_dim": spec.stitch_dim} if spec.stitch_dim else {}
    return vit_fields(spec.vit) | own | stitch | {"kind": "vmoe"}


def nac_fields(spec: NACSpec) -> Fields:
    """The fields of a NAC."""
    return {k: v for k, v in dataclasses.asdict(spec).items() if k in _NAC_FIELDS} | {"kind": "nac"}


def check_fields(fields: Fields, where: str) -> Fields:
    """Checks fields that a user wrote.

    Args:
        fields: name -> value; None if not stated. A NAC's `width` is its `state_dim`.
        where: what the messages call them.

    Returns:
        The fields that are stated.

    Raises:
        UserError: a field is unknown, or its value of another type or out of range.
    """
    known = sorted(_FIELDS | _NAC_FIELDS | _ASSEMBLY_FIELDS)
    for name, value in fields.items():
        if name not in known:
            hint = did_you_mean(str(name), known, f"known: {', '.join(sorted(_FIELDS))}")
            raise UserError(f'--arch: {where} has an unknown field "{name}"; {hint}')
        # None means "not stated", except that a NAC may have no truncation.
        if (value is not None or name == "truncation") and not _is_valid(name, value):
            raise UserError(f"--arch: {where}: {name} cannot be {value!r}")
    fields = {k: v for k, v in fields.items() if v is not None or k == "truncation"}
    if str(fields.get("kind", "")).startswith("nac") and "width" in fields:
        fields["state_dim"] = fields.pop("width")
    return fields


def _is_integer(value: Any, least: int) -> bool:
    return type(value) is int and value >= least  # not True, which is an int, too


def _is_depths(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(_is_integer(n, 0) for n in value)


def _is_valid(name: str, value: Any) -> bool:
    """Whether a field of this name can have this value."""
    if name in _INTEGERS:
        return _is_integer(value, {"idx": -1, "stitch_dim": 0, "experts": 0}.get(name, 1))
    if name in _LISTS:
        return _is_depths(value)
    if name == "kind":
        return value in KINDS
    if name == "qkv_bias":
        return type(value) is bool
    if name == "eps":
        return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1
    if name == "student_type":
        return value in _STUDENT_TYPES
    if name == "prior_options":
        return isinstance(value, dict)
    if name in ROUTING:
        kind = type(getattr(VMoESpec, name))
        return type(value) is kind or (kind is float and type(value) is int)
    return _is_valid_nac(name, value)


def _is_valid_nac(name: str, value: Any) -> bool:
    """Whether a field of a NAC, or the prior's name, can have this value."""
    annotation = {f.name: f.type for f in dataclasses.fields(NACSpec)}.get(name, "str")
    types: dict[Any, tuple[type, ...]] = {
        "int": (int,),
        "float": (int, float),
        "float | None": (int, float, type(None)),
        "bool": (bool,),
        "str": (str,),
        "tuple[int, ...]": (list, tuple),
    }
    boolean = isinstance(value, bool)
    if not isinstance(value, types[annotation]) or boolean != (annotation == "bool"):
        return False
    if annotation == "int":
        return _is_integer(value, 1)
    return annotation != "tuple[int, ...]" or _is_depths(value)


def _from_config(path: Path, argument: str, kind: str, blocks: int | None) -> Fields:
    if not path.is_file():
        raise UserError(f"--arch: {path} does not exist")
    try:
        get_config = runpy.run_path(str(path))["get_config"]
        config = get_config(argument) if argument else get_config()
        return config_fields(config, kind, blocks)
    except UserError as error:
        raise UserError(f"--arch: {path}: {error}") from None
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        raise UserError(f"--arch: {path}: {type(error).__name__}: {error}") from None


def config_fields(config: ConfigDict, kind: str, blocks: int | None) -> Fields:
    """What a config of ours states about its network of this kind (see `read_arch`)."""
    if kind == "vit":
        teacher = job_fields(config, "ft")
        is_teacher = blocks is None or blocks == sum(teacher["depths"])
        return teacher if is_teacher else job_fields(config, "pt")
    return job_fields(config, "m2mkd" if kind == "nac_student" else "e2e")


def job_fields(config: ConfigDict, job: str) -> Fields:
    """What a config states about the network whose weights a job trains.

    Args:
        config: of a run.
        job: pt, ft, m2mkd, m2mkd/i or e2e.
    """
    phase = job.partition("/")[0]
    if phase in ("pt", "ft"):
        depths = meta_depths(config) if phase == "pt" else config.teacher.depths
        return vit_fields(teacher_spec(config)[0]) | {"depths": list(depths)}
    students = phase == "m2mkd"
    data = teaching_data(config) if students else config.data
    if config.family == "vmoe":
        stitched = students or config.vmoe.keep_stitches
        own = bool(config.teacher.family)  # whose width the weights tell
        stitch_dim = teacher_spec(config)[0].width if stitched and not own else 0
        fields = vmoe_fields(vmoe_spec(config, data, stitch_dim)[0])
        if stitched and own:
            fields = {k: v for k, v in fields.items() if not k.endswith("stitch_pos")}
        return fields | {"depths": list(config.vmoe.depths)}
    fields = nac_fields(nac_spec(config, data))
    if students:
        return fields | {"kind": "nac_student"}
    return fields | {"prior": config.nac.prior, "prior_options": dict(config.nac.options)}


def _from_yaml(content: Fields, where: str) -> Fields:
    try:
        fields = yaml_fields(content, where)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"--arch: {where} describes no NAC and no students: {reason}") from None
    return check_fields(fields, where)
