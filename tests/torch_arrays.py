"""State dicts of PyTorch as nested dicts of parameters and back, by a table of names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from m2mkd_jax.conversion.names import Entry, array_at, as_tuple, read_layout, write_layout


def arrays_from_torch(table: Sequence[Entry], tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Our nested dict of arrays from tensors by PyTorch name; exactly those of the table."""
    assert {entry.torch for entry in table} == tensors.keys()
    stacks: dict[tuple[str, ...], dict[tuple[int, ...], np.ndarray]] = {}
    for entry in table:
        value = read_layout(np.asarray(tensors[entry.torch]), entry.layout)
        stacks.setdefault(entry.path, {}).setdefault(as_tuple(entry.index), value)
    tree: dict[str, Any] = {}
    for path, values in stacks.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        indices = sorted(values)
        stacked = np.stack([values[index] for index in indices])
        lengths = [last + 1 for last in indices[-1]]  # of the stacked axes
        node[path[-1]] = stacked.reshape((*lengths, *stacked.shape[1:]))
    return tree


def arrays_to_torch(
    table: Sequence[Entry], tree: Mapping[str, Any], patch: int = 0
) -> dict[str, np.ndarray]:
    """Tensors by PyTorch name from our nested dict; `patch`: side of a ViT's patches."""
    tensors = {}
    for entry in table:
        value = np.asarray(array_at(tree, entry.path))[as_tuple(entry.index)]
        tensors[entry.torch] = np.array(write_layout(value, entry, patch), order="C")
    return tensors
