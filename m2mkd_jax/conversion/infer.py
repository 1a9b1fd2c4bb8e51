"""Infers a network's description from the names and shapes of its tensors.

Shapes decide what they can; a field that `--arch` states must agree with them. Fields that shapes
do not show (heads, eps) come from `--arch` or from the published variant of that size; a field that
is still unknown is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m2mkd_jax.conversion.infer_nac import infer_nac, infer_nac_students
from m2mkd_jax.conversion.infer_vit import infer_vit, infer_vmoe
from m2mkd_jax.conversion.torch_weights import TorchWeights
from m2mkd_jax.errors import UserError


def infer_description(
    weights: TorchWeights, given: Mapping[str, Any], where: str
) -> tuple[dict[str, Any], list[str]]:
    """Infers the description of a network.

    Args:
        weights: opened weights.
        given: the fields of `--arch`; {} for none.
        where: the path, for messages.

    Returns:
        The description (models/registry.py), and notes on fields that are not from the weights.

    Raises:
        UserError: `given` contradicts the weights, is of another kind, or a field is unknown.
    """
    kind = given.get("kind", weights.kind)
    if kind != weights.kind and (weights.kind, kind) != ("nac_student", "nac"):
        raise UserError(f"{where} holds a {weights.kind}; --arch describes a {kind}")
    by_kind = {
        "vit": infer_vit,
        "vmoe": infer_vmoe,
        "nac": infer_nac,
        "nac_student": infer_nac_students,
    }
    return by_kind[weights.kind](weights, given, where)
