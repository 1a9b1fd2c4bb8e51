"""From the names and shapes of a checkpoint, and what `--arch` says, to the network's description.

Shapes decide what they can; where `--arch` says it too, both must agree. Published variants decide
the rest (heads, eps), and what is still open is asked for.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m2mkd_jax.conversion.infer_nac import describe_nac, describe_students
from m2mkd_jax.conversion.infer_vit import describe_vit, describe_vmoe
from m2mkd_jax.conversion.torch_weights import TorchWeights
from m2mkd_jax.errors import UserError


def describe(source: TorchWeights, given: Mapping[str, Any], where: str) -> tuple[dict, list[str]]:
    """The description of the network in `source`, and notes on what was taken from elsewhere.

    Args:
        source: opened weights.
        given: fields of `--arch`; {} for none.
        where: the path, for messages.

    Raises:
        UserError: `given` contradicts the weights, is of another kind, or is not enough.
    """
    kind = given.get("kind", source.kind)
    if kind != source.kind and (source.kind, kind) != ("nac_student", "nac"):
        raise UserError(f"{where} holds a {source.kind}; --arch describes a {kind}")
    by_kind = {
        "vit": describe_vit,
        "vmoe": describe_vmoe,
        "nac": describe_nac,
        "nac_student": describe_students,
    }
    return by_kind[source.kind](source, given, where)
