"""What `--arch` says about a network: a variant's name, a JSON file, the original's YAML, a config.

Everything becomes a flat dict of fields; whatever is not said is left out, and the weights' own
names and shapes decide it (checkpoint/architecture.py).
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import runpy
from pathlib import Path
from typing import Any

import yaml
from ml_collections import ConfigDict

from m2mkd_jax.config.defaults import meta_depths, teaching_data
from m2mkd_jax.config.networks import nac_spec, teacher_spec, vmoe_spec
from m2mkd_jax.conversion.arch_yaml import yaml_fields
from m2mkd_jax.errors import UserError
from m2mkd_jax.models import variants
from m2mkd_jax.models.moe.spec import VMoESpec
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.models.vit_spec import ViTSpec

KINDS = ("vit", "vmoe", "nac", "nac_student")
# Patch, width and heads of the published V-MoE variants; all have qkv biases and eps 1e-6.
VMOE_VARIANTS = {"base": (16, 768, 12), "large": (16, 1024, 16), "huge": (14, 1280, 16)}

_WHOLE = {"patch", "width", "heads", "image_size", "classes", "experts", "stitch_dim", "idx"}
_LISTS = {"depths", "moe_pos", "pre_stitch_pos", "post_stitch_pos"}
_FIELDS = {"kind", "qkv_bias", "eps", *_WHOLE, *_LISTS}
_NAC_FIELDS = {field.name for field in dataclasses.fields(NACSpec)} - {"remat"}
_EXTRA = {"student_type", "prior", "prior_options"}
_STUDENT_TYPES = ("imagenet", "tinyimnet", "tinynet")


def read_arch(text: str, kind: str, blocks: int | None) -> dict[str, Any]:
    """The fields that `--arch=TEXT` gives for a network of this kind.

    Args:
        text: VARIANT[:DEPTH,...], or a file: .json, .yml (the original's), .py[:ARGUMENT] (ours).
        kind: what the weights are; a config of ours describes several networks.
        blocks: how many blocks the weights have, if any; a config's meta model and teacher differ.

    Raises:
        UserError: no such variant or file, or something in it that makes no sense.
    """
    path = Path(text.split(".py:")[0] + ".py" if ".py:" in text else text).expanduser()
    if path.suffix == ".json":
        return check_fields(_parsed(path, json.loads), str(path))
    if path.suffix in (".yml", ".yaml"):
        return _from_yaml(_parsed(path, yaml.safe_load), str(path))
    if path.suffix == ".py":
        return _from_config(path, text.partition(".py:")[2], kind, blocks)
    return _variant(text)


def _parsed(path: Path, parse: Any) -> dict:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--arch: {path} cannot be read: {error.strerror}") from None
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--arch: {path} cannot be parsed: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"--arch: {path} holds no fields")
    return content


def _variant(text: str) -> dict[str, Any]:
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
        known = [*variants.NAMES, *(f"vmoe_{size}" for size in VMOE_VARIANTS)]
        close = difflib.get_close_matches(name, known, 1)
        hint = f'did you mean "{close[0]}"?' if close else f"known: {', '.join(known)}"
        raise UserError(f'--arch: "{name}" is no variant and no .json, .yml or .py file; {hint}')
    if listed:
        try:
            fields["depths"] = [int(depth) for depth in listed.split(",")]
        except ValueError:
            raise UserError(f'--arch: "{listed}" is no list of depths like 6,6,6,6') from None
    return check_fields(fields, name)


def vit_fields(spec: ViTSpec, classes: bool = True) -> dict[str, Any]:
    left_out = ("remat",) if classes else ("remat", "classes")
    fields = {k: v for k, v in dataclasses.asdict(spec).items() if k not in left_out}
    return {"kind": "vit", **fields}


def vmoe_fields(spec: VMoESpec) -> dict[str, Any]:
    own = {k: getattr(spec, k) for k in ("experts", "moe_pos", "pre_stitch_pos", "post_stitch_pos")}
    stitch = {"stitch_dim": spec.stitch_dim} if spec.stitch_dim else {}
    return vit_fields(spec.vit) | own | stitch | {"kind": "vmoe"}


def nac_fields(spec: NACSpec) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(spec).items() if k != "remat"} | {"kind": "nac"}


def check_fields(fields: dict[str, Any], where: str) -> dict[str, Any]:
    """The fields, if all are known and of a sensible type; a NAC's width is its state_dim.

    Raises:
        UserError: one is not.
    """
    known = sorted(_FIELDS | _NAC_FIELDS | _EXTRA)
    for name, value in fields.items():
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            some = ", ".join(sorted(_FIELDS))
            hint = f'did you mean "{close[0]}"?' if close else f"known: {some}"
            raise UserError(f'--arch: {where} has an unknown field "{name}"; {hint}')
        if value is None and name != "truncation":
            continue
        least = {"idx": -1, "stitch_dim": 0, "experts": 0}.get(name, 1)
        whole = type(value) is int and value >= least
        listed = isinstance(value, list | tuple) and all(type(n) is int and n >= 0 for n in value)
        number = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1
        good = (
            whole
            if name in _WHOLE
            else listed
            if name in _LISTS
            else value in KINDS
            if name == "kind"
            else type(value) is bool
            if name == "qkv_bias"
            else number
            if name == "eps"
            else _sensible(name, value)
        )
        if not good:
            raise UserError(f"--arch: {where}: {name} cannot be {value!r}")
    # null is "not said", except where it says that there is none.
    fields = {k: v for k, v in fields.items() if v is not None or k == "truncation"}
    if str(fields.get("kind", "")).startswith("nac") and "width" in fields:
        fields["state_dim"] = fields.pop("width")
    return fields


def _sensible(name: str, value: Any) -> bool:
    if name == "student_type":
        return value in _STUDENT_TYPES
    if name == "prior_options":
        return isinstance(value, dict)
    default = {f.name: f.type for f in dataclasses.fields(NACSpec)}.get(name, "str")
    types = {
        "int": int,
        "float": (int, float),
        "float | None": (int, float, type(None)),
        "bool": bool,
        "str": str,
        "tuple[int, ...]": (list, tuple),
    }
    boolean = isinstance(value, bool)
    if not isinstance(value, types[default]) or boolean != (default == "bool"):
        return False
    if default == "int":
        return value > 0
    return default != "tuple[int, ...]" or all(type(n) is int and n >= 0 for n in value)


def _from_config(path: Path, argument: str, kind: str, blocks: int | None) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"--arch: {path} does not exist")
    try:
        get_config = runpy.run_path(str(path))["get_config"]
        config = get_config(argument) if argument else get_config()
        return config_fields(config, kind, blocks)
    except UserError as error:
        raise UserError(f"--arch: {path}: {error}") from None
    except (Exception, SystemExit) as error:  # whatever the file does, or lacks
        raise UserError(f"--arch: {path}: {type(error).__name__}: {error}") from None


def config_fields(config: ConfigDict, kind: str, blocks: int | None) -> dict[str, Any]:
    """What a config of ours says about its network of this kind."""
    if kind == "vit":
        teacher = job_fields(config, "ft")
        deep = blocks is None or blocks == sum(teacher["depths"])
        return teacher if deep else job_fields(config, "pt")
    return job_fields(config, "m2mkd" if kind == "nac_student" else "e2e")


def job_fields(config: ConfigDict, job: str) -> dict[str, Any]:
    """What a config says about the network whose weights `job` makes: pt, ft, m2mkd/i or e2e."""
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


def _from_yaml(content: dict, where: str) -> dict[str, Any]:
    try:
        fields = yaml_fields(content, where)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"--arch: {where} describes no NAC and no students: {reason}") from None
    return check_fields(fields, where)
