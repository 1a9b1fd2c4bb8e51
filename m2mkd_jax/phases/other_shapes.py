"""Given weights of another image size, or of other classes, made to fit.

Axes: T tokens (class token, then S x S patches), D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from m2mkd_jax.conversion.resize_positions import resize_positions

_POSITIONS = "pos_embed"


def other_positions(params: dict, wanted: dict) -> tuple[int, int] | None:
    """Patches on a side of given position embeddings and of the wanted ones, where they differ.

    Args:
        params: of a stage, by name.
        wanted: shapes of the same stage in this run.
    """
    if _POSITIONS not in params or _POSITIONS not in wanted:
        return None
    given, own = np.shape(params[_POSITIONS]), wanted[_POSITIONS].shape
    if len(given) != 3 or given == own or (given[0], given[2]) != (own[0], own[2]):
        return None
    sides = [math.isqrt(shape[1] - 1) for shape in (given, own)]
    square = all(s * s + 1 == shape[1] for s, shape in zip(sides, (given, own), strict=True))
    return (sides[0], sides[1]) if square else None


def fitted(params: dict, wanted: dict) -> dict:
    """Parameters of a stage with position embeddings (1, T, D) interpolated to the wanted size."""
    if (sides := other_positions(params, wanted)) is None:
        return params
    positions = np.asarray(params[_POSITIONS])
    resized = resize_positions(positions.astype(np.float32), sides[1]).astype(positions.dtype)
    return {**params, _POSITIONS: resized}


def without(tree: dict, path: Sequence[str]) -> dict[str, Any]:
    """Nested dicts without the entry at `path`; all for an empty path."""
    if not path or path[0] not in tree:
        return tree
    rest = {name: value for name, value in tree.items() if name != path[0]}
    return rest if len(path) == 1 else {**rest, path[0]: without(tree[path[0]], path[1:])}
