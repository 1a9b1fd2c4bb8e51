"""Which parameters a recipe trains, and how fast by layer.

Recipe fields: freeze and train_only (patterns of paths), layer_decay. A recipe may lack any of
them. Paths are of single stages: "module_0/patch_embed/linear/kernel"; the blocks of a stage are
stacked in one array, and so have one path.

Axes: L blocks of the network.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from m2mkd_jax import tree_paths
from m2mkd_jax.errors import did_you_mean, require

EMBEDDINGS = ("patch_embed", "cls_token", "pos_embed")


def by_part(recipe: Any) -> bool:
    """Whether a recipe tells parts of the network apart, so that stages must keep their names."""
    patterns = getattr(recipe, "freeze", ()) or getattr(recipe, "train_only", ())
    return bool(patterns) or getattr(recipe, "layer_decay", 1.0) != 1.0


def trained_mask(params: Any, recipe: Any) -> Any:
    """Which parameters are trained: those that train_only names, but for those of freeze.

    Args:
        params: {stage: nested dicts of arrays or shapes}.
        recipe: see the top of the file.

    Returns:
        A tree of bools like `params`.

    Raises:
        UserError: a pattern that fits no parameter, or nothing is left to train.
    """
    frozen, wanted = getattr(recipe, "freeze", ()), getattr(recipe, "train_only", ())
    paths = [_text(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    for field, patterns in (("freeze", frozen), ("train_only", wanted)):
        for pattern in patterns:
            hint = did_you_mean(pattern, paths, f"paths are such as {paths[0]}")
            require(
                any(fnmatch.fnmatchcase(path, pattern) for path in paths),
                f"{field}: {pattern!r} fits no parameter; {hint}",
            )

    def is_trained(path: tuple[Any, ...], leaf: Any) -> bool:
        del leaf
        name = _text(path)
        fits = lambda patterns: any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        return (not wanted or fits(wanted)) and not fits(frozen)

    mask = jax.tree_util.tree_map_with_path(is_trained, params)
    require(any(jax.tree.leaves(mask)), "freeze and train_only leave nothing to train")
    return mask


def without_frozen(params: Any, recipe: Any) -> Any:
    """The same parameters; no gradient reaches those that are not trained."""
    if not (getattr(recipe, "freeze", ()) or getattr(recipe, "train_only", ())):
        return params
    mask = trained_mask(params, recipe)
    return jax.tree.map(lambda p, own: p if own else jax.lax.stop_gradient(p), params, mask)


def layer_scales(params: Any, decay: float, stages: Sequence[str]) -> Any:
    """The factor of the learning rate of every parameter: decay^(L + 1 - id).

    The id is 0 for the embeddings, i + 1 for block i of the network, and L + 1 for what follows
    them; what else lies between two stages has the id of the block after it. The factors are those
    of detection/optimizer.py.

    Args:
        params: {stage: arrays or shapes}.
        decay: the factor from one block to the one before it.
        stages: names of the stages in the order in which they run.

    Returns:
        A tree of float32 arrays like `params`; of stacked blocks (blocks, 1, ...), of others ().

    Raises:
        UserError: the network has no blocks.

    Source: Bao et al. 2022 (arXiv 2106.08254), fine-tuning recipe.
    """
    starts = _starts(params, stages)
    total = starts.pop("")
    require(total > 0, "layer_decay: the network has no blocks to count")

    def scale(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        names = tree_paths.names(path)
        layer: Any = total + 1
        if (stack := _stack(names)) is not None:
            first = starts["/".join(stack)]
            layer = first + 1 + np.arange(leaf.shape[0]).reshape(-1, *(1,) * (leaf.ndim - 1))
        elif names[1] in EMBEDDINGS:
            layer = 0
        elif names[0] != stages[-1]:
            layer = min(starts[names[0]] + 1, total)
        return np.asarray(decay ** (total + 1 - np.asarray(layer)), np.float32)

    return jax.tree_util.tree_map_with_path(scale, params)


def _starts(params: Any, stages: Sequence[str]) -> dict[str, int]:
    """How many blocks lie before each stage and each stack of blocks; of "" all there are."""
    lengths: dict[str, dict[str, int]] = {stage: {} for stage in stages}
    for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        names = tree_paths.names(path)
        if (stack := _stack(names)) is not None:
            lengths[names[0]]["/".join(stack)] = leaf.shape[0]
    starts, count = {}, 0
    for stage in stages:
        starts[stage] = count
        for place in sorted(lengths[stage], key=_by_number):
            starts[place] = count
            count += lengths[stage][place]
    return starts | {"": count}


def _stack(names: Sequence[Any]) -> list[str] | None:
    """The path of the stack of blocks that a leaf lies in; None: in none."""
    if "blocks" not in names or not tree_paths.is_stacked(names):
        return None
    return [str(name) for name in names[: names.index("blocks") + 1]]


def _by_number(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def _text(path: Sequence[Any]) -> str:
    return "/".join(map(str, tree_paths.names(path)))
