"""The original's YAML of a NAC or of its students, as fields of `--arch` (arch_flag.py).

Names and shapes do not show every option that changes what the network computes. Such an option
that is implemented here for one value only must have that value.

The options are explained in docs/reference.md#nac-options and in the sections around it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m2mkd_jax.errors import UserError
from m2mkd_jax.models.nac.spec import STAGE_STRIDE, STEM_STRIDE

# The original's options of a NAC: (its name, our name, its default). Only those that change what is
# computed; sizes without a default follow from the weights.
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
_GRAPH_OTHER_OPTIONS = {
    "share_codes_between_iterations",
    "mod_fc_kwargs",
    "mediator_latent_kwargs",
    "read_in_kwargs",
    "propagator_kwargs",
    "input_latent_kwargs",
    "output_latent_kwargs",
    "read_out_kwargs",
    "path_drop_prob",
    "use_code_noise_in_latent_seeder",
    "learnable_signatures",
    "learnable_codes",
}
# Options that are implemented for one value only, with that value.
_LAYER: dict[str, Any] = {"mod_fc_cls": "ModFC", "ffn_mod_fc_cls": None, "ffn_mod_fc_kwargs": None}
_GRAPH_ONE_VALUE: dict[str, Any] = _LAYER | {
    "disable_input_mediator_communication": False,
    "latent_seeder_kwargs": None,
    "propagator_layerwise_kwargs": None,
    "read_in_cls": "AttentiveReadIn",
    "use_input_states_as_mediator_states": False,
}
_MODULATION: dict[str, Any] = {"activation": None, "scale_times_input_normalization_type": "none"}
_PART: dict[str, Any] = _LAYER | {
    "mod_fc_kwargs": None,
    "ffn_kwargs": None,
    "read_in_attention_kwargs": None,
}
_ATTENTION: dict[str, Any] = {
    "kernel_type": "DotProductKernel",
    "mask_attn_scores_with_affinities": True,
    "mod_fc_cls": "ModFC",
    "mod_fc_kwargs": None,
    "normalize_kernel_along_keys": True,
    "scale_attention_by_affinities_after_softmax": False,
}
_KERNEL: dict[str, Any] = {"stochastic_eval_behaviour": "no_sample"}
_TOKENIZER: dict[str, Any] = {"convnext_kwargs": None}
_POOLING: dict[str, Any] = {"softmax_temperature": 1.0}
_PRESETS = {
    "tiny": [3, 3, 9],
    "mini": [3, 3, 6],
    "micro": [3, 3, 3],
    "nano": [1, 1, 1],
    "pico": [1, 1, 0],
    "femto": [1, 0, 0],
    "atto": [0, 0, 0],
}
_MODULATIONS = {
    "ln": "layer_norm",
    "l2": "l2",
    "none": "none",
    "sigmoid": "sigmoid",
    "tanh": "tanh",
}


def yaml_fields(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields that the original's YAML states, not yet checked.

    Args:
        content: the parsed file.
        where: its path, for messages.

    Raises:
        UserError: an option has a value that is not implemented here.
        KeyError, TypeError, AttributeError, ValueError: it describes neither NAC nor students.
    """
    return _students(content, where) if "share_kwargs" in content else _nac(content, where)


def _check_section(
    section: Mapping[str, Any] | None, implemented: Mapping[str, Any], where: str, name: str
) -> None:
    """Raises UserError for an option of another value than the implemented one.

    Args:
        section: of the file; None if it is left out.
        implemented: option -> value. Empty values are equal to None.
        where: the path, for messages.
        name: of the section, for messages.
    """
    for option, value in implemented.items():
        stated = (section or {}).get(option, value)
        if (stated or None) != (value or None):
            raise UserError(
                f"--arch: {where}: {name}.{option} {stated!r} is not built here, only {value!r}"
            )


def _check_parts(
    network: Mapping[str, Any], parts: Sequence[str], heads: Mapping[str, Any], where: str
) -> None:
    """Checks the sections of read-in, propagator and read-out.

    Args:
        network: the section that has them.
        parts: their names in it, in this order.
        heads: number and width of the heads, which all parts must have.
        where: the path, for messages.

    Raises:
        UserError: an option has a value that is not implemented here.
    """
    for part, residual in zip(parts, (None, True, False), strict=True):
        section = network.get(part) or {}
        attention = section.get("latent_attention_kwargs") or {}
        kernel = _KERNEL if residual else _KERNEL | {"truncation": None}
        # A read-in has one attention only, whose residual is an option of the read-in itself.
        own = {} if residual is None else {"include_residual_in_latent_attention": residual}
        inside = {**heads, **_ATTENTION}
        inside |= {} if residual is None else {"include_residual": residual}
        _check_section(section, {**heads, **_PART, **own}, where, part)
        _check_section(attention, inside, where, f"{part}.latent_attention_kwargs")
        _check_section(
            attention.get("kernel_kwargs"),
            kernel,
            where,
            f"{part}.latent_attention_kwargs.kernel_kwargs",
        )


def _check_graph(graph: Mapping[str, Any], where: str) -> None:
    """Raises UserError for an option of the graph that is unknown or not implemented here."""
    known = {name for name, _, _ in _GRAPH} | _GRAPH_OTHER_OPTIONS | set(_GRAPH_ONE_VALUE)
    if unknown := sorted(set(graph) - known):
        raise UserError(f"--arch: {where}: the option {unknown[0]} is not built here")
    _check_section(graph, _GRAPH_ONE_VALUE, where, "latent_graph_kwargs")
    heads = {name: graph.get(name, default) for name, _, default in _GRAPH if "head" in name}
    # The default of the original's read-out is a residual, which is not implemented here.
    read_out = {"include_residual_in_latent_attention": True} | (graph.get("read_out_kwargs") or {})
    parts = ("read_in_kwargs", "propagator_kwargs", "read_out_kwargs")
    _check_parts(dict(graph) | {"read_out_kwargs": read_out}, parts, heads, where)


def _modulation(kwargs: Mapping[str, Any] | None, where: str) -> dict[str, Any]:
    """Fields of the modulated linear layers."""
    kwargs = kwargs or {}
    _check_section(kwargs, _MODULATION, where, "mod_fc_kwargs")
    return {
        "modulation": _MODULATIONS[kwargs.get("scale_normalization_type", "ln")],
        "gain": kwargs.get("scale_gain", 1.0),
        "add_one": kwargs.get("add_one_to_scale", False),
    }


def _tokenizer(kwargs: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of the tokenizer."""
    _check_section(kwargs, _TOKENIZER, where, "tokenizer_kwargs")
    depths = _PRESETS[kwargs.get("capacity_preset", "tiny")][: kwargs.get("num_stages", 3)]
    grid = kwargs["positional_grid_kwargs"]
    rows, columns = grid.get("grid_size", (8, 8))
    if rows != columns:
        raise ValueError(f"positional grid of {rows} x {columns}, not square")
    # The network's image size is that of its grid, whatever data.input_size says.
    size = rows * STEM_STRIDE * STAGE_STRIDE ** (len(depths) - 1)
    return {"tokenizer_depths": depths, "position_dim": grid["dim"], "image_size": size}


def _nac(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of a NAC."""
    kwargs = content["model"]["kwargs"]
    graph = kwargs["latent_graph_kwargs"]
    _check_graph(graph, where)
    fields = {"kind": "nac", "state_dim": kwargs["state_dim"], "classes": kwargs["output_dim"]}
    for name, ours, default in _GRAPH:
        value = graph.get(name, default)
        if value is not None:
            fields[ours] = value
    fields["codes_per_iteration"] = not graph.get("share_codes_between_iterations", True)
    fields |= _modulation(graph.get("mod_fc_kwargs"), where)
    fields |= _tokenizer(kwargs["input_tokenizer_kwargs"], where)
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
    pooling_kwargs = kwargs.get("output_tokenizer_kwargs") or {}
    _check_section(pooling_kwargs, _POOLING, where, "output_tokenizer_kwargs")
    pooling = pooling_kwargs.get("softmax_type", "gumbel")
    fields |= {"output": "pooling" if pooled else "first_slot", "pooling": pooling}
    mediators = graph.get("mediator_latent_kwargs") or {}
    options = dict(mediators.get("graph_generator_kwargs") or {})
    if options.get("n") == fields.get("mediator_latents"):
        options.pop("n", None)  # nodes of the graph: here always the mediators
    fields |= {"prior": mediators.get("graph_preset") or "none", "prior_options": options}
    if kwargs.get("student_type"):
        fields["student_type"] = kwargs["student_type"]
    return fields


def _students(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Fields of a NAC's students."""
    share, read_in, read_out = content["share_kwargs"], content["readin"], content["readout"]
    heads = {option: read_in[option] for option in ("num_heads", "head_dim")}
    _check_section(share, _LAYER, where, "share_kwargs")
    _check_parts(content, ("readin", "mediator", "readout"), heads, where)
    _check_section(read_out["tokenizer_kwargs"], _POOLING, where, "readout.tokenizer_kwargs")
    return {
        "kind": "nac_student",
        "state_dim": share["state_dim"],
        "code_dim": share["code_dim"],
        "heads": heads["num_heads"],
        "head_dim": heads["head_dim"],
        "ffn_capacity": share["ffn_capacity_factor"],
        "geglu": share["use_geglu"],
        "qkv_bias": share["qkv_bias_in_attention"],
        "layer_scale": share["layer_scale_initial_value"],
        "classes": read_out["output_dim"],
        "read_in_residual": read_in["include_residual_in_read_in_attention"],
        "pooling": read_out["tokenizer_kwargs"]["softmax_type"],
        **_modulation(share["mod_fc_kwargs"], where),
        **_tokenizer(read_in["tokenizer_kwargs"], where),
    }
