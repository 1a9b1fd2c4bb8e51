"""Checkpoints of other vision transformers (timm, DeiT, DINO), made into plain ones or refused.

What has the same function in a plain transformer is rewritten into it; what has not is refused by
its name, before any value is read.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from m2mkd_jax.conversion.lazy_tensor import Tensor
from m2mkd_jax.conversion.report import Report
from m2mkd_jax.conversion.torch_layouts import published_layout
from m2mkd_jax.conversion.torch_weights import TorchWeights
from m2mkd_jax.errors import UserError

_SCALE = re.compile(r"(blocks\.\d+)\.ls([12])\.gamma$")
_SCALED = {"1": "attn.proj", "2": "mlp.fc2"}
# Patterns of names, and what has them.
_REFUSED = {
    r"(reg_token|register_tokens)$": "register tokens",
    r"(dist_token$|head_dist\.)": "a distillation token (DeiT)",
    r"pre_logits\.": "a layer between the class token and the head (pre-logits)",
    r"fc_norm\.": "average pooling (its norm is fc_norm)",
    r"attn_pool\.": "attention pooling",
    r"norm_pre\.": "a norm before the first block (norm_pre)",
    r"blocks\.\d+\.attn\.[qk]_norm\.": "normalised queries and keys (q_norm, k_norm)",
    r"blocks\.\d+\.attn\.(relative_position|rel_pos)": "relative positions",
    r"blocks\.\d+\.(attns|ffns|in_proj|in_norm)\.": "parallel layers in its blocks",
    r"blocks\.\d+\.mlp\.(w12|w3|fc1_g|fc1_x)\.": "gated MLPs (SwiGLU)",
    r"blocks\.\d+\.gamma_[12]$": "BEiT's layer scale, and biases of queries and values alone",
    r"(rope|rotary)": "rotary positions",
}


def adapt_foreign_vit(
    weights: TorchWeights, given: Mapping[str, Any], seed: int, report: Report
) -> None:
    """Makes the weights of a dense transformer plain.

    Args:
        weights: changed in place.
        given: the fields of `--arch`; with `classes`, a missing head is drawn.
        seed: of that head.
        report: gets notes on what was done.

    Raises:
        UserError: a part has no place in a plain transformer; the message names it.
    """
    for pattern, what in _REFUSED.items():
        found = next((name for name in weights.tensors if re.match(pattern, name)), "")
        if found:
            raise UserError(
                f'{report.source}: tensor "{report.shown(found)}": this network has {what}, which '
                "the transformers here have no place for"
            )
    before = list(weights.tensors)
    if weights.tensors.pop("mask_token", None) is not None:
        report.ignore("mask_token", "used in pretraining alone")
    _fold_layer_scale(weights, report)
    _draw_head(weights, given, seed, report)
    if list(weights.tensors) != before:  # converted back, it is a plain ViT
        weights.layout = published_layout(list(weights.tensors), None)


def _fold_layer_scale(weights: TorchWeights, report: Report) -> None:
    """Multiplies layer scales into the layers before them: g * (W x + b) = (g * W) x + g * b."""
    scales = {n: t for n, t in weights.tensors.items() if _SCALE.match(n)}
    for name, scale in scales.items():
        match = _SCALE.match(name)
        assert match
        layer = f"{match[1]}.{_SCALED[match[2]]}"
        for leaf in ("weight", "bias"):
            tensor = weights.tensors.get(f"{layer}.{leaf}")
            if tensor is None or len(scale.shape) != 1 or tensor.shape[:1] != scale.shape:
                raise UserError(
                    f'{report.source}: tensor "{report.shown(name)}" does not fit {layer}.{leaf}'
                )
            weights.tensors[f"{layer}.{leaf}"] = _scaled(tensor, scale)
        del weights.tensors[name]
        report.ignore(name, f"layer scale: multiplied into {layer}")
    if scales:
        report.notes.append(
            f"{len(scales)} layer scales are multiplied into the layers before them"
        )


def _scaled(tensor: Tensor, scale: Tensor) -> Tensor:
    """The tensor with its first axis multiplied by a scale, float32."""

    def read() -> np.ndarray:
        array, factors = (t.array().astype(np.float32) for t in (tensor, scale))
        return array * factors.reshape(-1, *[1] * (array.ndim - 1))

    return dataclasses.replace(
        tensor, dtype="float32", place=(*tensor.place, "scaled"), read=read, mapped=False
    )


def _draw_head(weights: TorchWeights, given: Mapping[str, Any], seed: int, report: Report) -> None:
    """Gives a whole network without a head, such as DINO's, a fresh one.

    Raises:
        UserError: nobody said of how many classes.
    """
    norm = weights.tensors.get("norm.weight")
    whole = norm is not None and "patch_embed.proj.weight" in weights.tensors
    if not whole or "head.weight" in weights.tensors or weights.module is not None:
        return
    classes = given.get("classes")
    if not classes:
        raise UserError(
            f'{report.source}: this network has no head (tensor "head.weight"); give its number of '
            'classes, {"classes": K} in --arch, and a fresh one is drawn'
        )
    assert norm is not None
    width = norm.shape[0]
    kernel = lambda: (
        0.02 * np.random.default_rng(seed).standard_normal((classes, width), np.float32)
    )
    bias = lambda: np.zeros(classes, np.float32)
    for leaf, shape, read in (("weight", (classes, width), kernel), ("bias", (classes,), bias)):
        name = f"head.{leaf}"
        weights.tensors[name] = Tensor(name, shape, "float32", (name, seed), read, False)
        weights.aliases[name] = [f"{name} (fresh)"]
    report.notes.append(f"head: not in the file; {classes} classes, drawn from seed {seed}")
