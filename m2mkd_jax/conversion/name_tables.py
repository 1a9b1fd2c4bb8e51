"""From a description to the tables of names of its trees (names.py)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from m2mkd_jax.conversion.names import Entry, nac_names, nac_student_names, vit_stage_names
from m2mkd_jax.conversion.names_vmoe import vmoe_stage_names
from m2mkd_jax.models import registry

_PARTS = ("readin", "mediator", "readout")


def table(description: Mapping[str, Any], name: str) -> list[Entry]:
    """Which tensor of the published network is which array of the tree `name`.

    Names are those of the whole network; of students, those of the student.
    """
    spec, index = registry.spec_of(description), registry.index_of(name)
    first, last = registry.ends(description, index)
    kind = description["kind"]
    if kind == "nac":
        return nac_names(spec)
    if kind == "nac_student":
        return nac_student_names(spec, _part(first, last))
    depths = description["depths"]
    start, ends = sum(depths[:index]), {"first": first, "last": last}
    if kind == "vit":
        return vit_stage_names(depths[index], **ends, qkv_bias=spec.qkv_bias, offset=start)
    return vmoe_stage_names(spec, start, depths[index], **ends, offset=start)


def _part(first: bool, last: bool) -> str:
    return _PARTS[0] if first else _PARTS[2] if last else _PARTS[1]


def leaf(tree: Mapping, path: Sequence[str]) -> Any:
    """The array at a path of a nested dict."""
    for name in path:
        tree = tree[name]
    return tree


def place(index: Any) -> tuple:
    """An entry's index as a tuple; () selects all of an array."""
    return () if index is None else index if isinstance(index, tuple) else (index,)
