"""All stage builders, and how a network is rebuilt from the description saved with its weights.

A description (JSON, see checkpoint/store.py) names the kind of network and its fields. The trees of
weights beside it are named by stage, PREFIX_INDEX:

    kind          trees                 further keys of the description
    vit           meta_i, module_i      spec, depths [, module: the only stage there is]
    vmoe          vmoe_i, student_i     spec, depths [, module] [, first, last: a single student]
    nac           nac                   spec
    nac_student   student_i             spec, modules, stitch_dim, states [, module]

Weights that a job has trained also have `job`, `normalisation` (mean and std of the pixels),
`orientation` if images were turned upright, and where they give logits `class_names`, in their
order; those of a detector `category_ids`, the ids of its classes in its data, and `test_edges`, to
which evaluation resizes images. `register_kind` adds kinds of one's own.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flax import nnx

from m2mkd_jax.errors import UserError, did_you_mean, is_finite
from m2mkd_jax.models import chain
from m2mkd_jax.models.moe.spec import VMoESpec
from m2mkd_jax.models.moe.vmoe import VMoEStage
from m2mkd_jax.models.nac.circuit import NAC
from m2mkd_jax.models.nac.spec import NACSpec
from m2mkd_jax.models.nac.students import build_student
from m2mkd_jax.models.vit import ViTStage
from m2mkd_jax.models.vit_spec import ViTSpec

Spec = ViTSpec | VMoESpec | NACSpec
Builder = Callable[[nnx.Rngs], chain.Stage]
Description = Mapping[str, Any]


@dataclass(frozen=True)
class Interface:
    """What a stage takes and gives.

    Attributes:
        image_size: side of the images that it takes; 0 if it takes tokens.
        width: channels of the tokens that it takes; 0 if it takes images.
        classes: number of logits that it gives; 0 if it gives tokens.
        channels: of the images that it takes.
    """

    image_size: int = 0
    width: int = 0
    classes: int = 0
    channels: int = 3


@dataclass(frozen=True)
class Kind:
    """A kind of network; see `register_kind`."""

    builder: Callable[[Description, int], Builder]
    interface: Callable[[Description, int], Interface]


def register_kind(
    kind: str,
    builder: Callable[[Description, int], Builder],
    interface: Callable[[Description, int], Interface],
) -> None:
    """Makes a kind of network known, so that `m2mkd_jax.load` can rebuild it from its weights.

    Call it where the stages are defined, and import that module before loading: a file of weights
    names its kind but never code to run.

        registry.register_kind(
            "my_student",
            lambda description, index: my_builder(MySpec(**description["spec"]), index),
            lambda description, index: registry.Interface(width=description["width"]),
        )

    Args:
        kind: value of the description's key "kind".
        builder: (description, index of a stage) -> function from nnx.Rngs to that stage. It should
            return an equal function for equal stages (functools.cache), so that they are traced
            once.
        interface: (description, index of a stage) -> what that stage takes and gives.

    The file that calls it may run more than once, as a config and as a module.

    Raises:
        ValueError: another kind has this name.
    """
    new = Kind(builder, interface)
    if kind in _KINDS and _defined_at(_KINDS[kind]) != _defined_at(new):
        raise ValueError(f"there is a kind of network {kind!r} already")
    _KINDS[kind] = new


def _defined_at(kind: Kind) -> list[tuple[str, int]]:
    """Files and lines of a kind's functions."""
    codes = [inspect.unwrap(function).__code__ for function in (kind.builder, kind.interface)]
    return [(os.path.realpath(code.co_filename), code.co_firstlineno) for code in codes]


def kind_of(description: Description) -> Kind:
    """The registered kind that a description names.

    Raises:
        UserError: it names none.
    """
    kind = description.get("kind")
    if kind not in _KINDS:
        raise UserError(
            f'these weights do not describe their network: no kind "{kind}" is registered; '
            + did_you_mean(str(kind), _KINDS)
        )
    return _KINDS[kind]


def spec_of(description: Description) -> Spec:
    """The hyperparameters of a network of the kinds in this package.

    Raises:
        UserError: the description is of another kind, or lacks fields.
    """
    try:
        kind, fields = description["kind"], _tuples(description["spec"])
        if kind == "vmoe":
            return VMoESpec(**{**fields, "vit": ViTSpec(**fields["vit"])})
        if kind == "vit":
            return ViTSpec(**fields)
        return {"nac": NACSpec, "nac_student": NACSpec}[kind](**fields)
    except (KeyError, TypeError) as error:
        raise UserError(f"these weights do not describe their network ({error})") from None


def _tuples(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}


def index_of(name: str) -> int:
    """The number of the stage that a tree of this name holds."""
    last = name.rpartition("_")[2]
    return int(last) if last.isdecimal() else 0


def ends(description: Description, index: int) -> tuple[bool, bool]:
    """Whether stage `index` takes images, and whether it gives logits."""
    if description["kind"] == "nac":
        return True, True
    count = description.get("modules") or len(description["depths"])
    first, last = index == 0, index == count - 1
    return description.get("first", first), description.get("last", last)


def builder(description: Description, name: str) -> Builder:
    """How the stage in tree `name` is built.

    Raises:
        UserError: the description is of no registered kind, or lacks fields.
    """
    return kind_of(description).builder(description, index_of(name))


def interface(description: Description, names: Sequence[str]) -> Interface:
    """What a chain of the stages in trees `names` takes and gives.

    Raises:
        UserError: as for `builder`.
    """
    of_stage = kind_of(description).interface
    first, last = (of_stage(description, index_of(names[i])) for i in (0, -1))
    return Interface(first.image_size, first.width, last.classes, first.channels)


# The builders are cached, so that chain.abstract traces equal stages once.
@functools.cache
def vit_builder(spec: ViTSpec, depth: int, first: bool, last: bool) -> Builder:
    """Builder of a `ViTStage`."""
    return lambda rngs: ViTStage(spec, depth, first=first, last=last, rngs=rngs)


@functools.cache
def vmoe_builder(spec: VMoESpec, start: int, depth: int, first: bool, last: bool) -> Builder:
    """Builder of a `VMoEStage`."""
    return lambda rngs: VMoEStage(spec, start, depth, first=first, last=last, rngs=rngs)


@functools.cache
def nac_builder(spec: NACSpec) -> Builder:
    """Builder of a whole `NAC`."""
    return lambda rngs: NAC(spec, rngs=rngs)


@functools.cache
def nac_student_builder(
    spec: NACSpec, index: int, modules: int, width: int, states: int
) -> Builder:
    """Builder of a NAC student; see `build_student`."""
    return lambda rngs: build_student(spec, index, modules, width, states, rngs=rngs)


def _vit_stage(description: Description, index: int) -> Builder:
    spec = spec_of(description)
    assert isinstance(spec, ViTSpec)
    return vit_builder(spec, description["depths"][index], *ends(description, index))


def _vmoe_stage(description: Description, index: int) -> Builder:
    spec, depths = spec_of(description), description["depths"]
    assert isinstance(spec, VMoESpec)
    return vmoe_builder(spec, sum(depths[:index]), depths[index], *ends(description, index))


def _nac_stage(description: Description, index: int) -> Builder:
    del index
    spec = spec_of(description)
    assert isinstance(spec, NACSpec)
    return nac_builder(spec)


def _nac_student_stage(description: Description, index: int) -> Builder:
    spec, modules = spec_of(description), description["modules"]
    assert isinstance(spec, NACSpec)
    # All mediators have the same structure.
    same = index if any(ends(description, index)) else 1
    return nac_student_builder(
        spec, same, modules, description["stitch_dim"], description["states"]
    )


def _interface(description: Description, index: int) -> Interface:
    spec = spec_of(description)
    first, last = ends(description, index)
    vit = spec.vit if isinstance(spec, VMoESpec) else spec
    width = 0
    if not first:
        width = _token_width(spec, description, index)
    return Interface(
        image_size=vit.image_size if first else 0,
        width=width,
        classes=vit.classes if last else 0,
        channels=vit.channels,
    )


def _token_width(spec: Spec, description: Description, index: int) -> int:
    if isinstance(spec, NACSpec):
        return description["stitch_dim"]
    if isinstance(spec, ViTSpec):
        return spec.width
    stitched = spec.kind(sum(description["depths"][:index])).pre
    return spec.stitch_dim if stitched else spec.vit.width


_KINDS: dict[str, Kind] = {
    "vit": Kind(_vit_stage, _interface),
    "vmoe": Kind(_vmoe_stage, _interface),
    "nac": Kind(_nac_stage, _interface),
    "nac_student": Kind(_nac_student_stage, _interface),
}


def tree_names(description: Description) -> list[str]:
    """Names of the trees of converted weights, in the order of the network."""
    kind = description["kind"]
    if kind == "nac":
        return ["nac"]
    prefix = {"vit": "module", "vmoe": "vmoe", "nac_student": "student"}[kind]
    count = description.get("modules") or len(description["depths"])
    if "first" in description:  # a single student of a V-MoE
        prefix = "student"
    numbers = [description["module"]] if "module" in description else range(count)
    return [f"{prefix}_{i}" for i in numbers]


def in_order(names: Sequence[str]) -> list[str]:
    """Names of trees in the order of their stages."""
    return sorted(names, key=index_of)


def normalisation(description: Description) -> dict[str, tuple[float, ...]]:
    """The recorded mean and std of the pixels, a number per channel; {}: none are recorded.

    Raises:
        ValueError: they are no such numbers.
    """
    found = {}
    for name, values in description.get("normalisation", {}).items():
        if not isinstance(values, list | tuple) or not all(map(is_finite, values)):
            raise ValueError(f"{name} is {values!r}; a finite number per channel is expected")
        if name == "std" and min(values, default=0) <= 0:
            raise ValueError(f"std is {values!r}; its numbers must be above 0")
        found[name] = tuple(map(float, values))
    if len({len(values) for values in found.values()}) > 1:
        raise ValueError("mean and std are of other numbers of channels")
    return found


def class_names(description: Description) -> tuple[str, ...]:
    """The recorded names of classes, in the order of the logits; (): none are recorded.

    Raises:
        ValueError: they are no list of names.
    """
    names = description.get("class_names", ())
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise ValueError("class_names is no list of names")
    return tuple(names)
