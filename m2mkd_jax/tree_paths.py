"""Paths to the leaves of a tree, and which of them are in a stack of layers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

# Identical layers are stacked under these names: their leaves have one extra leading axis.
STACKED = ("blocks", "propagators")


def names(path: Sequence[Any]) -> list[Any]:
    """The keys of a jax key path: of dicts, of namedtuples by field, of sequences by index."""
    # DictKey has .key, GetAttrKey .name, SequenceKey .idx.
    return [getattr(k, "key", getattr(k, "name", getattr(k, "idx", None))) for k in path]


def is_index(name: Any) -> bool:
    """Whether a key is the index of a list, as an int or (from a file) as a string."""
    return isinstance(name, int) or (isinstance(name, str) and name.isdigit())


def is_stacked(names: Sequence[Any]) -> bool:
    """Whether a leaf has a leading axis of layers; blocks/0/... is a list, not a stack.

    Args:
        names: the keys of its path (see `names`).
    """
    return any(a in STACKED and not is_index(b) for a, b in itertools.pairwise(names))


def is_experts_kernel(names: Sequence[Any]) -> bool:
    """Whether a leaf holds the kernels of a layer of experts.

    Args:
        names: the keys of its path (see `names`).
    """
    return "experts" in names and names[-1] == "kernel"
