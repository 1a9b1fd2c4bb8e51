"""Given weights of another image size, other channels, or other classes, made to fit.

Axes: T tokens (class token, then S x S patches), P patch side, C channels, D width.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from m2mkd_jax.conversion.resize_positions import resize_positions

_POSITIONS = "pos_embed"
_RGB = 3
# Where a stage that takes images has its linear layer over patches.
_PATCHES = (("patch_embed",), ("tokenizer", "stage_0", "downsample"))


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


def other_channels(params: dict, wanted: dict, channels: int) -> tuple[str, ...]:
    """The path of the given kernel over patches in RGB that is for other channels here; (): none.

    Args:
        params: of a stage, by name.
        wanted: shapes of the same stage in this run.
        channels: C that it takes in this run.
    """
    for place in _PATCHES if channels != _RGB else ():
        path = (*place, "linear", "kernel")
        given, own = _at(params, path), _at(wanted, path)
        if given is not None and own is not None:
            (rows, width), (own_rows, own_width) = np.shape(given), own.shape
            if width == own_width and rows * channels == own_rows * _RGB:
                return path
    return ()


def _at(tree: Any, path: Sequence[str]) -> Any:
    """The entry of nested dicts at `path`; None where there is none."""
    for name in path:
        if not isinstance(tree, dict) or name not in tree:
            return None
        tree = tree[name]
    return tree


def adapted_kernel(kernel: np.ndarray, channels: int) -> np.ndarray:
    """A kernel over patches in RGB for images of other channels, as timm's adapt_input_conv has it.

    One channel gets the sum of the three, so that a grey image gives what it gave with its channel
    repeated; more get the three in turn, times 3 / C.

    Args:
        kernel: (P * P * 3, D), rows by row, column, channel.
        channels: C.

    Returns:
        (P * P * C, D).
    """
    rgb = kernel.reshape(-1, _RGB, kernel.shape[-1])
    if channels == 1:
        return rgb.sum(1)
    repeated = rgb[:, np.arange(channels) % _RGB] * (_RGB / channels)
    return repeated.reshape(-1, kernel.shape[-1]).astype(kernel.dtype)


def fitted(params: dict, wanted: dict, channels: int = _RGB) -> dict:
    """Parameters of a stage made to fit, as far as they can be.

    Position embeddings (1, T, D) are interpolated to the wanted size, the kernel over patches is
    adapted to the channels.

    Args:
        params: of a stage, by name.
        wanted: shapes of the same stage in this run.
        channels: C of the images that it takes in this run.
    """
    if path := other_channels(params, wanted, channels):
        kernel = adapted_kernel(np.asarray(_at(params, path)), channels)
        params = _replaced(params, path, kernel)
    if (sides := other_positions(params, wanted)) is None:
        return params
    positions = np.asarray(params[_POSITIONS])
    resized = resize_positions(positions.astype(np.float32), sides[1]).astype(positions.dtype)
    return {**params, _POSITIONS: resized}


def changes(params: dict, wanted: dict, channels: int) -> Iterator[str]:
    """What `fitted` does to parameters, in words."""
    if sides := other_positions(params, wanted):
        old, new = (f"{side} x {side}" for side in sides)
        yield f"positions interpolated from {old} to {new} patches"
    if other_channels(params, wanted, channels):
        how = "summed" if channels == 1 else f"repeated, times 3 / {channels},"
        yield f"patch embedding {how} from 3 channels to {channels}"


def _replaced(tree: dict, path: Sequence[str], value: np.ndarray) -> dict:
    """Nested dicts with another entry at `path`."""
    rest = value if len(path) == 1 else _replaced(tree[path[0]], path[1:], value)
    return {**tree, path[0]: rest}


def without(tree: dict, path: Sequence[str]) -> dict[str, Any]:
    """Nested dicts without the entry at `path`; all for an empty path."""
    if not path or path[0] not in tree:
        return tree
    rest = {name: value for name, value in tree.items() if name != path[0]}
    return rest if len(path) == 1 else {**rest, path[0]: without(tree[path[0]], path[1:])}
