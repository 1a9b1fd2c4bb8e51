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

from m2mkd_jax.config import meta_depths, teaching_data
from m2mkd_jax.errors import UserError
from m2mkd_jax.models import variants
from m2mkd_jax.models.moe.vmoe import VMoESpec
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.models.vit import ViTSpec
from m2mkd_jax.specs import nac_spec, teacher_spec, vmoe_spec

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
        fields = {"kind": "vmoe", "patch": patch, "width": width, "heads": heads,
                  "image_size": 224, "qkv_bias": True, "eps": 1e-6}  # fmt: skip
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
            whole if name in _WHOLE else listed if name in _LISTS else
            value in KINDS if name == "kind" else type(value) is bool if name == "qkv_bias" else
            number if name == "eps" else _sensible(name, value)
        )  # fmt: skip
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
        "int": int, "float": (int, float), "float | None": (int, float, type(None)),
        "bool": bool, "str": str, "tuple[int, ...]": (list, tuple),
    }  # fmt: skip
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
    except Exception as error:
        raise UserError(f"--arch: {path}: {type(error).__name__}: {error}") from None
    return config_fields(config, kind, blocks)


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
        spec, _ = vmoe_spec(config, data, stitches=students or config.vmoe.keep_stitches)
        return vmoe_fields(spec) | {"depths": list(config.vmoe.depths)}
    fields = nac_fields(nac_spec(config, data))
    if students:
        return fields | {"kind": "nac_student"}
    return fields | {"prior": config.nac.prior, "prior_options": dict(config.nac.options)}


# The original's options of a NAC: (name there, name here, default there). Only what acts on the
# arithmetic; sizes without a default follow from the weights.
_GRAPH = (
    ("code_dim", "code_dim", None),
    ("signature_dim", "signature_dim", None),
    ("num_input_latents", "input_latents", None),
    ("num_mediator_latents", "mediator_latents", None),
    ("num_output_latents", "output_latents", None),
    ("num_iterations", "iterations", None),
    ("num_heads", "heads", 1),
    ("head_dim", "head_dim", 64),
    ("layer_scale_initial_value", "layer_scale", 1e-6),
    ("ffn_capacity_factor", "ffn_capacity", 1.0),
    ("code_noise_scale", "code_noise", 0.0),
    ("use_geglu", "geglu", False),
    ("qkv_bias_in_attention", "qkv_bias", True),
    ("use_latent_seeder", "seeder", True),
    ("share_propagator_weights", "share_propagators", True),
    ("share_ffn_between_propagators", "share_ffn", False),
    ("enable_input_output_communication", "input_output", True),
    ("enable_persistent_input_mediator_communication", "persistent_inputs", True),
)
_GRAPH_OTHERS = {
    "share_codes_between_iterations", "mod_fc_kwargs", "mediator_latent_kwargs", "read_in_kwargs",
    "propagator_kwargs", "input_latent_kwargs", "output_latent_kwargs", "read_out_kwargs",
    "path_drop_prob", "use_code_noise_in_latent_seeder",
}  # fmt: skip
_PRESETS = {"tiny": [3, 3, 9], "mini": [3, 3, 6], "micro": [3, 3, 3], "nano": [1, 1, 1],
            "pico": [1, 1, 0], "femto": [1, 0, 0], "atto": [0, 0, 0]}  # fmt: skip
_MODULATIONS = {
    "ln": "layer_norm",
    "l2": "l2",
    "none": "none",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}


def _from_yaml(content: dict, where: str) -> dict[str, Any]:
    try:
        if "share_kwargs" in content:
            return check_fields(_student_yaml(content), where)
        return check_fields(_nac_yaml(content["model"]["kwargs"], where), where)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"--arch: {where} describes no NAC and no students: {reason}") from None


def _modulation(kwargs: dict | None) -> dict[str, Any]:
    kwargs = kwargs or {}
    return {
        "modulation": _MODULATIONS[kwargs.get("scale_normalization_type", "ln")],
        "gain": kwargs.get("scale_gain", 1.0),
        "add_one": kwargs.get("add_one_to_scale", False),
    }


def _tokenizer(kwargs: dict) -> dict[str, Any]:
    depths = _PRESETS[kwargs.get("capacity_preset", "tiny")][: kwargs.get("num_stages", 3)]
    grid = kwargs["positional_grid_kwargs"]
    rows, columns = grid.get("grid_size", (8, 8))
    if rows != columns:
        raise ValueError(f"positional grid of {rows} x {columns}, not square")
    # data.input_size is what the data are made into; the grid is what the network was built for.
    size = rows * 4 * 2 ** (len(depths) - 1)
    return {"tokenizer_depths": depths, "position_dim": grid["dim"], "image_size": size}


def _nac_yaml(kwargs: dict, where: str) -> dict[str, Any]:
    graph = kwargs["latent_graph_kwargs"]
    unknown = set(graph) - {there for there, _, _ in _GRAPH} - _GRAPH_OTHERS
    if unknown:
        raise UserError(f"--arch: {where}: the option {sorted(unknown)[0]} is not built here")
    fields = {"kind": "nac", "state_dim": kwargs["state_dim"], "classes": kwargs["output_dim"]}
    for there, here, default in _GRAPH:
        value = graph.get(there, default)
        if value is not None:
            fields[here] = value
    fields["codes_per_iteration"] = not graph.get("share_codes_between_iterations", True)
    fields |= _modulation(graph.get("mod_fc_kwargs"))
    fields |= _tokenizer(kwargs["input_tokenizer_kwargs"])
    read_in = graph.get("read_in_kwargs") or {}
    fields["read_in_residual"] = read_in.get("include_residual_in_read_in_attention", False)
    attention = (graph.get("propagator_kwargs") or {}).get("latent_attention_kwargs") or {}
    kernel = attention.get("kernel_kwargs") or {}
    fields |= {
        "truncation": kernel.get("truncation"),
        "truncation_implementation": kernel.get("truncation_implementation", "direct"),
        "stochastic_kernel": kernel.get("stochastic_kernel", False),
        "kernel_temperature": kernel.get("stochastic_sampling_temperature", 1.0),
    }
    pooled = kwargs.get("output_tokenizer_type", "FirstSlotAsLogits") == "OutputLatentPooling"
    pooling = (kwargs.get("output_tokenizer_kwargs") or {}).get("softmax_type", "gumbel")
    fields |= {"output": "pooling" if pooled else "first_slot", "pooling": pooling}
    mediators = graph.get("mediator_latent_kwargs") or {}
    options = dict(mediators.get("graph_generator_kwargs") or {})
    if options.get("n") == fields.get("mediator_latents"):
        options.pop("n", None)  # the number of nodes, which is that of the mediators here
    fields |= {"prior": mediators.get("graph_preset") or "none", "prior_options": options}
    if kwargs.get("student_type"):
        fields["student_type"] = kwargs["student_type"]
    return fields


def _student_yaml(content: dict) -> dict[str, Any]:
    share, read_in, read_out = content["share_kwargs"], content["readin"], content["readout"]
    heads = {part["num_heads"] for part in (read_in, content["mediator"], read_out)}
    if len(heads) != 1:
        raise ValueError(f"students with {sorted(heads)} heads")
    return {
        "kind": "nac_student",
        "state_dim": share["state_dim"],
        "code_dim": share["code_dim"],
        "heads": heads.pop(),
        "head_dim": read_in["head_dim"],
        "ffn_capacity": share["ffn_capacity_factor"],
        "geglu": share["use_geglu"],
        "qkv_bias": share["qkv_bias_in_attention"],
        "layer_scale": share["layer_scale_initial_value"],
        "classes": read_out["output_dim"],
        "read_in_residual": read_in["include_residual_in_read_in_attention"],
        "pooling": read_out["tokenizer_kwargs"]["softmax_type"],
        **_modulation(share["mod_fc_kwargs"]),
        **_tokenizer(read_in["tokenizer_kwargs"]),
    }
