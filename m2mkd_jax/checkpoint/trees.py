"""Trees of arrays as `path -> array`: compare one strictly with what is expected, checksum one.

A path is the keys from the root joined by "/", e.g. "params/stages/0/attn/kernel".  A field of a
namedtuple (optax states) counts as a key by its name, an item of a tuple or list by its index.
"""

import difflib
import hashlib
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from m2mkd_jax.errors import UserError

Tree = Any


def flatten(tree: Tree) -> dict[str, Any]:
    """All leaves by path, in the order of `jax.tree.leaves`; empty containers leave no trace."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of one tree have the same path; do keys contain '/'?")
    return flat


def nested(flat: dict[str, Any]) -> dict:
    """The nested dict of strings that `flatten` would flatten to `flat`."""
    tree: dict = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def match_tree(loaded: Tree, expected: Tree, where: str) -> Tree:
    """`loaded` in the structure of `expected`, once every path, shape and dtype agrees.

    `nnx.update` takes unknown keys and wrong shapes silently, so whatever comes from a file passes
    through here first.

    Args:
      loaded: a nested dict of arrays, or of anything with .shape and .dtype.
      expected: a pytree of arrays or `jax.ShapeDtypeStruct`; keys may be ints or field names.
      where: where `loaded` comes from (a path); opens the error message.

    Raises:
      UserError: names the first unexpected (with the missing name most like it), missing,
        wrong-shape or wrong-dtype leaf, in that order, and how many more there are of its kind.
    """
    have, want = flatten(loaded), flatten(expected)
    missing = [path for path in want if path not in have]
    unexpected = [path for path in have if path not in want]
    if unexpected:
        hint = difflib.get_close_matches(unexpected[0], missing or list(want), n=1)
        hint = f" (did you mean {hint[0]!r}?)" if hint else ""
        _refuse(where, f"unexpected array {unexpected[0]!r}{hint}", unexpected)
    if missing:
        _refuse(where, f"array {missing[0]!r} is missing", missing)
    for name, fact in (("shape", np.shape), ("dtype", _dtype)):
        wrong = [path for path in want if fact(have[path]) != fact(want[path])]
        if wrong:
            path = wrong[0]
            what = f"{path!r} has {name} {fact(have[path])}, expected {fact(want[path])}"
            _refuse(where, what, wrong)
    return jax.tree.unflatten(jax.tree.structure(expected), [have[path] for path in want])


def checksum(tree: Tree) -> str:
    """sha256 (hex) over path, dtype, shape and bytes of every array, in sorted path order.

    One array at a time is brought to the host.  Where an array is spread over several processes
    every process must make this call, and each gets the same answer.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(tree).items()):
        array = np.ascontiguousarray(_on_host(leaf))
        digest.update(f"{path} {array.dtype.name} {np.shape(leaf)}\n".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _on_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
        return multihost_utils.process_allgather(leaf, tiled=True)
    return np.asarray(leaf)


def _dtype(leaf: Any) -> np.dtype:
    return np.dtype(leaf.dtype) if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _refuse(where: str, what: str, all_of_them: list[str]) -> None:
    more = f", and {len(all_of_them) - 1} more like it" if len(all_of_them) > 1 else ""
    raise UserError(f"{where}: {what}{more}; it was made with another model configuration")
