"""Tables of names: which PyTorch tensor of a published checkpoint is which of our arrays.

A table is a list of `Entry`; the same table serves both directions (`from_torch`, `to_torch`). Here
are the layouts of single tensors and the table of a ViT; the others are in names_nac.py and
names_vmoe.py. Layouts, PyTorch <-> ours, with C input and D output channels, K and P the sides of a
kernel and of a patch:

    same        as it is
    linear      (D, C) <-> (C, D)
    patches     convolution (D, C, P, P) <-> (P*P*C, D), rows ordered (row, column, channel)
    depthwise   (C, 1, K, K) <-> (K, K, C)
    grid        (C, H, W) <-> (H, W, C)
    expert      a tensor of one expert, (1, D, C) <-> (C, D) or (1, D) <-> (D)
    conv        convolution (D, C, K, K) <-> (K, K, C, D)
    deconv      transposed convolution (C, D, K, K) <-> (C, K, K, D)
    pooled      linear layer on a 7 x 7 map, (D, C*7*7) <-> (7*7*C, D)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ArrayPath = tuple[str, ...]  # keys from the root of a nested dict to an array
POOLED = 7  # side of the maps that a detector's box head flattens
Index = int | tuple[int, ...] | None  # along an array's stacked leading axes; None: not stacked


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint and the array that holds its values.

    Attributes:
        torch: name of the tensor.
        path: keys to our array in a stage's nested dict of parameters.
        layout: one of the layouts above.
        index: position along the array's stacked axes. Blocks are stacked along one axis, experts
            of blocks along two. None if the array is not stacked.
    """

    torch: str
    path: ArrayPath
    layout: str = "same"
    index: Index = None


def read_layout(array: np.ndarray, layout: str) -> np.ndarray:
    """A tensor of PyTorch in our layout (a view where possible)."""
    if layout == "linear":
        return array.T
    if layout == "patches":
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    if layout == "depthwise":
        return array[:, 0].transpose(1, 2, 0)
    if layout == "expert":
        return array[0].T
    if layout == "conv":
        return array.transpose(2, 3, 1, 0)
    if layout == "deconv":
        return array.transpose(0, 2, 3, 1)
    if layout == "pooled":
        maps = array.reshape(len(array), -1, POOLED, POOLED)
        return maps.transpose(2, 3, 1, 0).reshape(-1, len(array))
    return array.transpose(1, 2, 0) if layout == "grid" else array


def write_layout(array: np.ndarray, entry: Entry, patch: int = 0) -> np.ndarray:
    """Our array in the layout of PyTorch; the inverse of `read_layout`.

    Args:
        array: the array, or the slice of it that `entry` selects.
        entry: its entry in a table.
        patch: side of a ViT's patches; a NAC's tokenizer has fixed ones.
    """
    layout = entry.layout
    if layout == "linear":
        return array.T
    if layout == "patches":
        side = patch
        if "patch_embed" not in entry.path:
            side = 4 if "stage_0" in entry.path else 2  # the tokenizer's stem, its downsampling
        return array.reshape(side, side, -1, array.shape[-1]).transpose(3, 2, 0, 1)
    if layout == "depthwise":
        return array.transpose(2, 0, 1)[:, None]
    if layout == "expert":
        return array.T[None]
    if layout == "conv":
        return array.transpose(3, 2, 0, 1)
    if layout == "deconv":
        return array.transpose(0, 3, 1, 2)
    if layout == "pooled":
        maps = array.reshape(POOLED, POOLED, -1, array.shape[-1])
        return maps.transpose(3, 2, 0, 1).reshape(array.shape[-1], -1)
    return array.transpose(2, 0, 1) if layout == "grid" else array


def array_at(tree: Mapping[str, Any], path: Sequence[str]) -> Any:
    """The array at a path of a nested dict."""
    node: Any = tree
    for name in path:
        node = node[name]
    return node


def as_tuple(index: Index) -> tuple[int, ...]:
    """An entry's index as a tuple; () selects the whole array."""
    if index is None:
        return ()
    return index if isinstance(index, tuple) else (index,)


def linear(torch: str, path: ArrayPath, index: Index = None, bias: bool = True) -> Iterator[Entry]:
    """Entries of a linear layer."""
    yield Entry(f"{torch}.weight", (*path, "kernel"), "linear", index)
    if bias:
        yield Entry(f"{torch}.bias", (*path, "bias"), "same", index)


def norm(torch: str, path: ArrayPath, index: Index = None) -> Iterator[Entry]:
    """Entries of a LayerNorm."""
    yield Entry(f"{torch}.weight", (*path, "scale"), "same", index)
    yield Entry(f"{torch}.bias", (*path, "bias"), "same", index)


def patches(torch: str, path: ArrayPath) -> Iterator[Entry]:
    """Entries of a convolution whose stride is its kernel's size."""
    yield Entry(f"{torch}.weight", (*path, "linear", "kernel"), "patches")
    yield Entry(f"{torch}.bias", (*path, "linear", "bias"))


def embedding() -> list[Entry]:
    """What only the first stage of a transformer has: tokens, positions, patch embedding."""
    table = [Entry("cls_token", ("cls_token",)), Entry("pos_embed", ("pos_embed",))]
    return table + list(patches("patch_embed.proj", ("patch_embed",)))


def classifier() -> list[Entry]:
    """What only the last stage of a transformer has: the final norm and the head."""
    return [*norm("norm", ("norm",)), *linear("head", ("head",))]


def vit_stage_names(
    depth: int, *, first: bool, last: bool, qkv_bias: bool, offset: int = 0
) -> list[Entry]:
    """The table of one ViT stage.

    Args:
        depth: blocks in the stage.
        first: whether it has the embedding.
        last: whether it has the final norm and the head.
        qkv_bias: whether the query, key and value projections have biases.
        offset: number of its first block in the tensors' names, `blocks.{offset}`.
    """
    table = embedding() if first else []
    for i in range(depth):
        torch = f"blocks.{offset + i}"
        for name in ("norm1", "norm2"):
            table += norm(f"{torch}.{name}", ("blocks", name), i)
        table += linear(f"{torch}.attn.qkv", ("blocks", "attn", "qkv"), i, qkv_bias)
        table += linear(f"{torch}.attn.proj", ("blocks", "attn", "proj"), i)
        for name in ("fc1", "fc2"):
            table += linear(f"{torch}.mlp.{name}", ("blocks", "mlp", name), i)
    return table + (classifier() if last else [])
