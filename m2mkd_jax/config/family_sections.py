"""The config's sections for families of students: config.nac, config.vmoe, and one's own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Collection
from typing import Any

from m2mkd_jax.config.keys import ABOVE_0, COUNTS, FROM_0, INDICES, REMAT, Key, Keys
from m2mkd_jax.errors import UserError, closest

NAC: Keys = {
    "state_dim": Key(0, "channels of a latent's state; must be given"),
    "code_dim": Key(0, "channels of a latent's code, which modulates its layers; must be given"),
    "signature_dim": Key(
        64, "channels of a latent's signature, which says whom it listens to", ABOVE_0
    ),
    "heads": Key(0, "attention heads; must be given"),
    "head_dim": Key(64, "channels of an attention head", ABOVE_0),
    "input_latents": Key(0, "latents that read the image; must be given"),
    "mediator_latents": Key(0, "latents that exchange messages; must be given"),
    "output_latents": Key(0, "latents that the logits are read from; must be given"),
    "iterations": Key(8, "propagators: how often the mediators exchange messages"),
    "ffn_capacity": Key(2.0, "hidden channels of the feed-forward networks / state_dim", ABOVE_0),
    "geglu": Key(True, "GEGLU in the feed-forward networks; False: GELU"),
    "layer_scale": Key(0.1, "initial value of the layer scales in propagators and read-out"),
    "qkv_bias": Key(False, "biases in the query, key and value projections"),
    "modulation": Key(
        "layer_norm",
        "how the scale that a code gives is normalised: layer_norm, l2, none, sigmoid, tanh",
    ),
    "gain": Key(0.1, "initial value of the learned factor of that scale"),
    "add_one": Key(True, "add 1 to the scale, so that a small one leaves the input as it is"),
    "code_noise": Key(
        0.05,
        "noise of the codes in training: uniform, in units of the code's absolute value",
        FROM_0,
    ),
    "truncation": Key(
        0.9,
        "cosine distance of two signatures beyond which their link is cut; None: no link is",
        ABOVE_0,
        optional=True,
    ),
    "truncation_implementation": Key(
        "direct",
        "which of the two published truncations: direct, masked; they differ in the gradient",
    ),
    "stochastic_kernel": Key(
        True, "sample links in training (relaxed Bernoulli); False: use their probabilities"
    ),
    "kernel_temperature": Key(0.5, "temperature of that sample", ABOVE_0),
    "seeder": Key(
        True,
        "draw initial states per image around a mean that depends on the code; False: initial "
        "states are parameters",
    ),
    "read_in_residual": Key(True, "residual connection around the read-in's attention"),
    "share_propagators": Key(False, "one propagator's weights for all iterations"),
    "share_ffn": Key(False, "one feed-forward network for all propagators"),
    "codes_per_iteration": Key(False, "codes of their own for every iteration"),
    "input_output": Key(True, "the output latents listen to the input latents too"),
    "persistent_inputs": Key(
        True, "mediators listen to the input latents in every iteration; False: in the first"
    ),
    "tokenizer_depths": Key(
        (3, 3), "ConvNeXt blocks of each stage of the tokenizer, 1 to 3 stages", INDICES
    ),
    "position_dim": Key(64, "channels of the learned position grid beside the tokens", ABOVE_0),
    "output": Key(
        "pooling", "logits from: pooling (over the output latents), first_slot (the first's state)"
    ),
    "pooling": Key("gumbel", "weights of the pooling: gumbel (Gumbel softmax), vanilla (softmax)"),
    "remat": Key(
        "auto",
        "recompute activations of the propagators in the backward pass; auto: if memory is short",
        REMAT,
    ),
    "fused": Key(
        "auto",
        "train propagators by fused kernels on an NVIDIA GPU; auto: where they agree with XLA's on "
        "the GPU at hand, in one process; they are made for 16-bit numbers, GEGLU, sampled "
        "kernels, and multiples of 64 mediators and input latents",
        REMAT,
    ),
    "stitch_dim": Key(
        0,
        "channels outside a student's stitches; 0: the meta model's width, which it must be",
        FROM_0,
    ),
    "prior": Key(
        "none",
        "graph that the mediators' signatures are fitted to at the start: none, barabasi-albert, "
        "erdos-renyi, planted-partition, ring-of-cliques, watts-strogatz, grid, balanced-tree, "
        "barbell, hypercube, complete",
    ),
    "options": Key(
        {},
        "of the prior: barabasi-albert m; erdos-renyi p; planted-partition l, k, p_in, p_out; "
        "ring-of-cliques num_cliques, clique_size; watts-strogatz k, p; grid dim, periodic; "
        "balanced-tree r, h; barbell m1, m2",
    ),
}

VMOE: Keys = {
    "variant": Key(
        "", 'a published transformer (models/variants.py); "": patch, width, heads, qkv_bias, eps'
    ),
    "patch": Key(0, "side of a patch in pixels"),
    "width": Key(0, "channels of a token"),
    "heads": Key(0, "attention heads"),
    "qkv_bias": Key(True, "biases in the query, key and value projections"),
    "eps": Key(1e-6, "epsilon of the layer norms", ABOVE_0),
    "depths": Key((), "blocks of each student module", COUNTS),
    "moe_pos": Key((), "blocks with experts in place of the MLP, counted from 0; (): all", INDICES),
    "experts": Key(8, "experts of a block", ABOVE_0),
    "top_k": Key(2, "experts that each token goes to", ABOVE_0),
    "router": Key(
        "published", "who goes where: published, vmoe, expert_choice; models/moe/router.py"
    ),
    "noise": Key(
        1.0,
        "standard deviation of the vmoe router's noise in training, in units of 1 / experts",
        FROM_0,
    ),
    "dispatch": Key(
        "dropless",
        "dropless: every token is served; capacity: each expert has a fixed number of slots in "
        "training (evaluation is dropless)",
    ),
    "capacity_factor": Key(
        1.25, "slots of an expert over its even share; for capacity and expert_choice", ABOVE_0
    ),
    "group_images": Key(
        0,
        "images whose tokens compete for the same slots in training; 0: those of one device",
        FROM_0,
    ),
    "keep_stitches": Key(False, "keep the students' stitches in the network trained end to end"),
    "remat": Key(
        "auto",
        "recompute activations of the blocks in the backward pass; auto: if memory is short",
        REMAT,
    ),
}

# Name of a section: what gives its keys.
SECTIONS: dict[str, Callable[[], Keys]] = {"nac": lambda: NAC, "vmoe": lambda: VMOE}


def import_class(name: str, key: str) -> Any:
    """The class that a value "package.module:Class" names.

    Args:
        name: the value; modules in the working directory are found too.
        key: of the config, for messages.

    Raises:
        UserError: no such module, an error in it, or nothing of that name there.
    """
    module, _, attribute = name.partition(":")
    if not {"", os.getcwd()} & set(sys.path):  # `python -m` has it, installed commands do not
        sys.path.append(os.getcwd())
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever a module of one's own raises
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f'config.{key}: cannot import "{module}" ({reason})') from None
    if not hasattr(found, attribute):
        near = closest(attribute, vars(found))
        hint = f'did you mean "{near}"?' if near else 'it is given as "package.module:Class"'
        raise UserError(f'config.{key}: module {module} has no class "{attribute}"; {hint}')
    return getattr(found, attribute)


def own_section(family: str, taken: Collection[str]) -> dict[str, Keys]:
    """The section that a family "package.module:Class" brings, by its name.

    Args:
        family: config.family.
        taken: names that other groups of keys have.

    Raises:
        UserError: there is no such class, or its section has the name of another group.
    """
    students = import_class(family, "family")
    section = getattr(students, "section", "")
    if not section or SECTIONS.get(section) == students.defaults:
        return {}
    if section in taken and section not in SECTIONS:
        raise UserError(
            f'config.family: the section of "{family}" is called "{section}", as other keys are'
        )
    return {section: students.defaults()}
