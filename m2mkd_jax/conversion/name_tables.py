"""The table of names of each tree that a description lists (see names.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from m2mkd_jax.conversion.names import Entry, vit_stage_names
from m2mkd_jax.conversion.names_nac import nac_names, nac_student_names
from m2mkd_jax.conversion.names_vmoe import vmoe_stage_names
from m2mkd_jax.models import registry
from m2mkd_jax.models.moe.spec import VMoESpec
from m2mkd_jax.models.nac.spec import NACSpec


def name_table(description: Mapping[str, Any], tree: str) -> list[Entry]:
    """Which tensor of the published network is which array of one tree.

    Args:
        description: of the network, as saved with weights (models/registry.py).
        tree: name of the tree.

    Returns:
        Entries whose tensors are called as in the whole network; of a NAC's students, as in the
        student.
    """
    spec, index = registry.spec_of(description), registry.index_of(tree)
    first, last = registry.ends(description, index)
    if isinstance(spec, NACSpec):
        if description["kind"] == "nac":
            return nac_names(spec)
        return nac_student_names(spec, "readin" if first else "readout" if last else "mediator")
    depths = description["depths"]
    depth, start = depths[index], sum(depths[:index])
    if isinstance(spec, VMoESpec):
        return vmoe_stage_names(spec, start, depth, first=first, last=last, offset=start)
    return vit_stage_names(depth, first=first, last=last, qkv_bias=spec.qkv_bias, offset=start)
