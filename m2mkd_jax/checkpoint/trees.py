"""Trees of arrays: flattened by path, compared strictly with an expected structure, checksummed.

A path is the keys from the root joined by "/", e.g. "params/stages/0/attn/kernel". The key of a
field of a namedtuple (optax states) is its name, that of an item of a tuple or list its index.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from m2mkd_jax.errors import UserError, closest

Tree = Any
ANOTHER_MODEL = "it was made with another model configuration"


def flatten(tree: Tree) -> dict[str, Any]:
    """All leaves by path, in the order of `jax.tree.leaves`; empty containers are left out.

    Raises:
        ValueError: two leaves have the same path.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of one tree have the same path; do keys contain '/'?")
    return flat


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """The nested dict that `flatten` flattens to `flat`."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def match_tree(loaded: Tree, expected: Tree, where: str) -> Tree:
    """Checks that a tree has exactly the expected paths, shapes and dtypes.

    `nnx.update` accepts unknown keys and wrong shapes silently, so everything that is read from a
    file is checked here first.

    Args:
        loaded: a nested dict of arrays, or of anything with .shape and .dtype.
        expected: a pytree of arrays or `jax.ShapeDtypeStruct`; keys may be ints or field names.
        where: where `loaded` comes from (a path), for the message.

    Returns:
        `loaded` in the structure of `expected`.

    Raises:
        UserError: a leaf is unexpected, missing, of another shape or of another dtype. The message
            names the first one, in this order, and how many more of its kind there are.
    """
    have, want = flatten(loaded), flatten(expected)
    missing = [path for path in want if path not in have]
    unexpected = [path for path in have if path not in want]
    if unexpected:
        near = closest(unexpected[0], missing or want)
        hint = f" (did you mean {near!r}?)" if near else ""
        raise _mismatch(where, f"unexpected array {unexpected[0]!r}{hint}", unexpected)
    if missing:
        raise _mismatch(where, f"array {missing[0]!r} is missing", missing)
    facts: dict[str, Callable[[Any], Any]] = {"shape": np.shape, "dtype": _dtype}
    for name, fact in facts.items():
        wrong = [path for path in want if fact(have[path]) != fact(want[path])]
        if wrong:
            path = wrong[0]
            what = f"{path!r} has {name} {fact(have[path])}, expected {fact(want[path])}"
            reason = "convert them first" if name == "dtype" else ANOTHER_MODEL
            raise _mismatch(where, what, wrong, reason)
    return jax.tree.unflatten(jax.tree.structure(expected), [have[path] for path in want])


def checksum(tree: Tree) -> str:
    """sha256 (hex) over path, dtype, shape and bytes of every array, in sorted path order.

    Arrays are copied to the host one by one. If an array is sharded over several processes, every
    process must make this call, and each gets the same result.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(tree).items()):
        array = np.ascontiguousarray(_on_host(leaf))
        digest.update(f"{path} {array.dtype.name} {np.shape(leaf)}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def not_finite(tree: Tree) -> str:
    """The path of the first array with a number that is not finite; "" if there is none.

    Of arrays that are sharded over several processes only this process's part is looked at.
    """
    for path, leaf in flatten(tree).items():
        parts = [leaf]
        if isinstance(leaf, jax.Array) and not leaf.is_fully_replicated:
            parts = [shard.data for shard in leaf.addressable_shards]
        if not all(np.isfinite(np.asarray(part)).all() for part in parts):
            return path
    return ""


def _on_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _dtype(leaf: Any) -> np.dtype:
    return np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _mismatch(where: str, what: str, alike: list[str], reason: str = ANOTHER_MODEL) -> UserError:
    """The error about `what`, the first of the leaves in `alike`."""
    more = f", and {len(alike) - 1} more like it" if len(alike) > 1 else ""
    return UserError(f"{where}: {what}{more}; {reason}")
