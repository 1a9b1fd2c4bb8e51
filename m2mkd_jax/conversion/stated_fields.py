"""Fields of a network that a torch file of ours states beside its tensors.

Names and shapes do not show them, and who reads the file would take them for the published ones: a
V-MoE's routing, a NAC's options, mean and std of the pixels where they are not ImageNet's. They are
one entry of the file, JSON, which other programs ignore.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.conversion.arch_flag import ROUTING, check_fields
from m2mkd_jax.conversion.converted import IMAGENET
from m2mkd_jax.conversion.infer_vit import assumed_routing
from m2mkd_jax.errors import UserError
from m2mkd_jax.models import registry
from m2mkd_jax.models.moe.spec import VMoESpec
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.models.vit_spec import ViTSpec

STATED = "m2mkd_jax"  # name of the entry
NORMALISATION = "normalisation"  # of its fields
# The weights show them, or they do not matter.
_NOT_STATED = ("remat", "fused", "channels", "image_size", "classes")


def unseen_fields(description: Mapping[str, Any], fresh: bool) -> dict[str, Any]:
    """The fields of a network that whoever reads its tensors would get wrong, or has to ask for.

    Args:
        description: of the weights.
        fresh: whether they never were in a torch file; one that came from there was read without
            heads and eps, or with `--arch`, and becomes what it was.
    """
    spec = registry.spec_of(description)
    vit = spec.vit if isinstance(spec, VMoESpec) else spec
    fields: dict[str, Any] = {}
    if isinstance(vit, ViTSpec) and fresh:
        fields |= {"heads": vit.heads, "eps": vit.eps}
    if isinstance(spec, VMoESpec):
        usual = {name: getattr(VMoESpec, name) for name in ROUTING}
        usual |= assumed_routing(spec.experts)
        fields |= {k: v for k in ROUTING if (v := getattr(spec, k)) != usual[k]}
    if isinstance(spec, NACSpec):
        own = {f.name: f.default for f in dataclasses.fields(NACSpec)}
        known = {k: v for k, v in own.items() if k not in _NOT_STATED}
        known = {k: v for k, v in known.items() if v is not dataclasses.MISSING}
        fields |= {k: v for k, d in known.items() if (v := getattr(spec, k)) != d}
        fields |= {"heads": spec.heads} if fresh else {}
    return fields


def unseen_normalisation(description: Mapping[str, Any]) -> dict[str, list[float]]:
    """Mean and std of the pixels that are not ImageNet's, which whoever reads a file assumes."""
    known = {key: list(value) for key, value in registry.normalisation(description).items()}
    same = all(
        len(known.get(key, usual)) == len(usual) and np.allclose(known.get(key, usual), usual)
        for key, usual in IMAGENET.items()
    )
    return {} if same else known


def stated_fields(entries: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The fields that a file states, but for the normalisation; {}: none.

    Args:
        entries: of the file.
        path: of it, for messages.

    Raises:
        UserError: the entry is not what `unseen_fields` gives.
    """
    fields = _entry(entries, path)
    fields.pop(NORMALISATION, None)
    return check_fields(fields, str(path))


def stated_normalisation(entries: Mapping[str, Any], path: Path) -> dict[str, list[float]]:
    """Mean and std of the pixels that a file states; {}: none. Raises UserError as above."""
    known = _entry(entries, path).get(NORMALISATION, {})
    try:
        found = registry.normalisation({"normalisation": known})
    except (AttributeError, TypeError, ValueError):
        found = {}
    if known and set(found) != {"mean", "std"}:
        raise UserError(f"{path}: its entry {STATED} has no mean and std: convert it again")
    return {key: list(value) for key, value in found.items()}


def _entry(entries: Mapping[str, Any], path: Path) -> dict[str, Any]:
    if STATED not in entries:
        return {}
    try:
        fields = json.loads(entries[STATED])
    except (TypeError, ValueError, RecursionError):
        fields = None
    if not isinstance(fields, dict):
        raise UserError(f"{path}: its entry {STATED} cannot be parsed: convert it again")
    return fields
