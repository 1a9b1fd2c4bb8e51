"""From the description that is saved with weights to the stages that compute with them.

A description (JSON, checkpoint/store.py) names the kind of network and its fields; its trees are
named by stage:

    vit           meta_i, module_i         spec, depths [, module: the only stage there is]
    vmoe          vmoe_i, student_i        spec, depths [, module] [, first, last: a lone student]
    nac           nac                      spec
    nac_student   student_i                spec, modules, stitch_dim, states [, module]
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx

from m2mkd_jax.errors import UserError
from m2mkd_jax.models import chain
from m2mkd_jax.models.moe.spec import VMoESpec
from m2mkd_jax.models.moe.vmoe import VMoEStage
from m2mkd_jax.models.nac.circuit import NAC
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.models.nac.students import build_student
from m2mkd_jax.models.vit import ViTStage
from m2mkd_jax.models.vit_spec import ViTSpec

KINDS = ("vit", "vmoe", "nac", "nac_student")
Spec = ViTSpec | VMoESpec | NACSpec
Builder = Callable[[nnx.Rngs], chain.Stage]


def spec_of(description: Mapping[str, Any]) -> Spec:
    """The network's fields.

    Raises:
        UserError: the description is of no kind known here, or lacks fields.
    """
    try:
        kind, fields = description["kind"], _tuples(description["spec"])
        if kind == "vmoe":
            return VMoESpec(**{**fields, "vit": ViTSpec(**fields["vit"])})
        types = {"vit": ViTSpec, "nac": NACSpec, "nac_student": NACSpec}
        return types[kind](**fields)
    except (KeyError, TypeError) as error:
        raise UserError(f"these weights do not describe their network ({error})") from None


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def index_of(name: str) -> int:
    """The number of the stage that a tree of this name holds."""
    last = name.rpartition("_")[2]
    return int(last) if last.isdecimal() else 0


def ends(description: Mapping[str, Any], index: int) -> tuple[bool, bool]:
    """Whether stage `index` takes images, and whether it gives logits."""
    if description["kind"] == "nac":
        return True, True
    count = description.get("modules") or len(description["depths"])
    first, last = index == 0, index == count - 1
    return description.get("first", first), description.get("last", last)


def builder(description: Mapping[str, Any], name: str) -> Builder:
    """How the stage in tree `name` is built. Raises UserError as `spec_of` does."""
    spec, index = spec_of(description), index_of(name)
    first, last = ends(description, index)
    kind = description["kind"]
    if kind == "nac":
        return nac_builder(spec)
    if kind == "nac_student":
        # All middle ones are alike.
        like, modules = (index if first or last else 1), description["modules"]
        return nac_student_builder(
            spec, like, modules, description["stitch_dim"], description["states"]
        )
    depths = description["depths"]
    if kind == "vit":
        return vit_builder(spec, depths[index], first, last)
    return vmoe_builder(spec, sum(depths[:index]), depths[index], first, last)


# Cached, so that chain.abstract traces equal stages once.
@functools.cache
def vit_builder(spec: ViTSpec, depth: int, first: bool, last: bool) -> Builder:
    return lambda rngs: ViTStage(spec, depth, first=first, last=last, rngs=rngs)


@functools.cache
def vmoe_builder(spec: VMoESpec, start: int, depth: int, first: bool, last: bool) -> Builder:
    return lambda rngs: VMoEStage(spec, start, depth, first=first, last=last, rngs=rngs)


@functools.cache
def nac_builder(spec: NACSpec) -> Builder:
    return lambda rngs: NAC(spec, rngs=rngs)


@functools.cache
def nac_student_builder(
    spec: NACSpec, index: int, modules: int, width: int, states: int
) -> Builder:
    return lambda rngs: build_student(spec, index, modules, width, states, rngs=rngs)


def tree_names(description: Mapping[str, Any]) -> list[str]:
    """The trees of converted weights, in the order of the network."""
    kind = description["kind"]
    if kind == "nac":
        return ["nac"]
    prefix = {"vit": "module", "vmoe": "vmoe", "nac_student": "student"}[kind]
    count = description.get("modules") or len(description["depths"])
    if "first" in description:  # a lone student of a V-MoE
        prefix = "student"
    numbers = [description["module"]] if "module" in description else range(count)
    return [f"{prefix}_{i}" for i in numbers]


def in_order(names: Sequence[str]) -> list[str]:
    """Trees in the order of their stages."""
    return sorted(names, key=index_of)
