"""Parameters of a V-MoE from those of its students, or of a dense vision transformer.

Axes: L stacked blocks, E experts.

Works on plain nested dicts of arrays. A stage has its ends (embedding, norm and head) and
`segment_0`, `segment_1`, ..., each with `blocks` stacked along L. Which blocks share a segment
depends on their stitches, so weights are carried over block by block.

Source: arXiv 2402.16918, section 3, and Komatsuzaki et al. 2023 (arXiv 2212.05055);
docs/reference.md#vmoe-assembly, docs/reference.md#vmoe-upcycling.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.errors import UserError

STITCHES = ("pre_stitch", "post_stitch")
Params = dict[str, Any]


def assemble(
    network: Sequence[Params], students: Sequence[Params], *, keep_stitches: bool
) -> tuple[list[Params], dict[str, str]]:
    """Puts the students' weights into the network's stages.

    The head keeps its initial values where network and students differ in the number of classes.

    Source: arXiv 2402.16918, section 3; docs/reference.md#vmoe-assembly.

    Args:
        network: parameters of the network's freshly initialised stages, divided like the students.
        students: parameters of the students, in order.
        keep_stitches: keep the students' stitches (the network must have them) or drop them.

    Returns:
        The stages' new parameters, and the origin of every stage, by its number.

    Raises:
        UserError: the number of modules or blocks, or a shape, does not fit.
    """
    if len(network) != len(students):
        raise UserError(f"assemble: {len(students)} students for {len(network)} stages")
    result, origin = [], {}
    for i, (stage, student) in enumerate(zip(network, students, strict=True)):
        given = blocks(student)
        if not keep_stitches:
            given = [{k: v for k, v in block.items() if k not in STITCHES} for block in given]
        params, fresh = _filled(stage, given, ends(student), f"assemble: stage {i}")
        result.append(params)
        had = any(name in block for block in blocks(student) for name in STITCHES)
        note = ", stitches " + ("kept" if keep_stitches else "dropped") if had else ""
        origin[str(i)] = f"m2mkd/{i}{note}{fresh}"
    return result, origin


def keep_experts(params: Params, kept: np.ndarray) -> tuple[Params, np.ndarray]:
    """A stage's parameters with some of its experts alone.

    Args:
        params: of a stage.
        kept: int (L', E'), the experts that are kept in each block with experts, of this stage and
            the following ones.

    Returns:
        The stage's parameters, and the rows of `kept` that are left for the following stages.
    """
    result = dict(params)
    for name in (n for n in params if n.startswith("segment_")):
        block = params[name]["blocks"]
        if "moe" not in block:
            continue
        count = len(jax.tree.leaves(block["moe"])[0])
        own, kept = kept[:count], kept[count:]
        rows = np.arange(count)[:, None]
        router = block["moe"]["router"]["linear"]
        linear = {
            "kernel": jnp.take_along_axis(router["kernel"], own[:, None], axis=2),
            "bias": router["bias"][rows, own],
        }
        experts = jax.tree.map(lambda leaf, at=(rows, own): leaf[at], block["moe"]["experts"])
        moe = {"router": {"linear": linear}, "experts": experts}
        result[name] = {**params[name], "blocks": {**block, "moe": moe}}
    return result, kept


def upcycle(network: Sequence[Params], dense: Sequence[Params]) -> list[Params]:
    """Initialises a V-MoE from a dense ViT (sparse upcycling).

    Every expert is a copy of its block's MLP, and everything else is copied. The routers keep their
    initial values, and so does the head where the number of classes differs.

    Source: Komatsuzaki et al. 2023 (arXiv 2212.05055); docs/reference.md#vmoe-upcycling.

    Args:
        network: parameters of the network's freshly initialised stages, without stitches.
        dense: parameters of the ViT's stages, divided alike.

    Returns:
        The stages' new parameters.

    Raises:
        UserError: the number of stages or blocks, or a shape, does not fit.
    """
    if len(network) != len(dense):
        raise UserError(f"upcycle: {len(dense)} dense stages for {len(network)} stages")
    result = []
    for i, (stage, source) in enumerate(zip(network, dense, strict=True)):
        where = f"upcycle: stage {i}"
        own, given = blocks(stage), unstacked(source.get("blocks", {}))
        _check_number(own, given, where)
        given = [_upcycled(*pair) for pair in zip(own, given, strict=True)]
        rest = {k: v for k, v in source.items() if k != "blocks"}
        result.append(_filled(stage, given, rest, where)[0])
    return result


def _upcycled(block: Params, dense: Params) -> Params:
    """A dense block's parameters, with a copy of its MLP for every expert that `block` has."""
    if "moe" not in block:
        return dense
    count = block["moe"]["experts"]["fc1"]["bias"].shape[0]
    copies = jax.tree.map(lambda a: jnp.broadcast_to(a, (count, *a.shape)), dense["mlp"])
    rest = {k: v for k, v in dense.items() if k != "mlp"}
    return rest | {"moe": {"router": block["moe"]["router"], "experts": copies}}


def ends(params: Params) -> Params:
    """A stage's parameters outside its blocks: embedding, norm, head."""
    return {k: v for k, v in params.items() if not k.startswith("segment_")}


def stacks(params: Params) -> list[Params]:
    """The stacked blocks of every segment, in order."""
    return [params[f"segment_{i}"]["blocks"] for i in range(len(params) - len(ends(params)))]


def segments(stacked: Sequence[Params]) -> Params:
    """The inverse of `stacks`: entries segment_0, segment_1, ... of a stage."""
    return {f"segment_{i}": {"blocks": blocks} for i, blocks in enumerate(stacked)}


def unstacked(stack: Params) -> list[Params]:
    """Stacked blocks, each without the axis L."""
    leaves = jax.tree.leaves(stack)
    count = leaves[0].shape[0] if leaves else 0
    return [jax.tree.map(lambda a, i=i: a[i], stack) for i in range(count)]


def blocks(params: Params) -> list[Params]:
    """A stage's blocks, each without the axis L."""
    return [block for stack in stacks(params) for block in unstacked(stack)]


def _filled(
    stage: Params, given: Sequence[Params], its_ends: Params, where: str
) -> tuple[Params, str]:
    """A stage with the given blocks and ends, and a note where the head keeps its own values."""
    own, counts = blocks(stage), [jax.tree.leaves(s)[0].shape[0] for s in stacks(stage)]
    _check_number(own, given, where)
    for i, (target, source) in enumerate(zip(own, given, strict=True)):
        _check(target, source, f"{where}, block {i}")
    note = ""
    if "head" in stage and "head" in its_ends:
        classes = [part["head"]["bias"].shape for part in (stage, its_ends)]
        if classes[0] != classes[1]:
            its_ends, note = {**its_ends, "head": stage["head"]}, ", head fresh"
    _check(ends(stage), its_ends, where)
    stacked, at = [], 0
    for count in counts:
        stacked.append(jax.tree.map(lambda *a: jnp.stack(a), *given[at : at + count]))
        at += count
    return {**its_ends, **segments(stacked)}, note


def _check_number(own: Sequence[Params], given: Sequence[Params], where: str) -> None:
    if len(own) != len(given):
        raise UserError(f"{where} has {len(own)} blocks, its source has {len(given)}")


def _check(target: Params, source: Params, where: str) -> None:
    """Raises UserError at the first array that only one of them has or that differs in shape."""
    shapes = [
        {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for tree in (target, source)
    ]
    for path in sorted(set(shapes[0]) | set(shapes[1])):
        have = [tree.get(path) for tree in shapes]
        if have[0] != have[1]:
            text = ["absent" if shape is None else f"of shape {shape}" for shape in have]
            raise UserError(
                f"{where}: {path} is {text[1]} in the source and {text[0]} in the network"
            )
