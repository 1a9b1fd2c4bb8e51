"""Which part of each array of a training state a device holds: every rule by path is here.

    a leaf under 'experts'    its expert axis over 'expert': a device holds its own experts alone
    with fsdp, a large leaf   also its longest axis that is still whole and divides, over 'data'
    everything else           a copy on every device

Moments, accumulated gradients and averages of the weights have the parameter's path inside their
own, so one rule serves a parameter and all that is kept for it.

Axes: L stacked layers (never cut: every device runs every layer), E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from m2mkd_jax import tree_paths
from m2mkd_jax.errors import UserError

# Numbers in one layer's array. A smaller one takes longer to ask for than to keep.
LARGE = 2**16


def spec(names: Sequence[Any], shape: Sequence[int], sizes: dict, fsdp: bool) -> PartitionSpec:
    """The rule for one leaf.

    Args:
        names: keys from the root to the leaf.
        shape: of the leaf.
        sizes: {'data': groups, 'expert': devices per group}.
        fsdp: cut large leaves over 'data'.

    Raises:
        UserError: the experts cannot be dealt equally.
    """
    cut: list[str | None] = [None] * len(shape)
    first = int(tree_paths.is_stacked(names))
    expert = first if "experts" in names and len(shape) > first else None
    if expert is not None:
        if shape[expert] % sizes["expert"]:
            raise UserError(
                f"{shape[expert]} experts cannot be dealt over {sizes['expert']} devices "
                f"({'/'.join(map(str, names))}); config.mesh.expert must divide "
                f"{shape[expert]}"
            )
        cut[expert] = "expert"
    if fsdp and math.prod(shape[first:]) >= LARGE:
        free = [i for i in range(first, len(shape)) if cut[i] is None]
        free = [i for i in free if shape[i] % sizes["data"] == 0]
        if free:
            cut[max(free, key=lambda i: shape[i])] = "data"
    return PartitionSpec(*cut)


def shardings(mesh, tree: Any, fsdp: bool) -> Any:
    """The tree of `NamedSharding` for a tree of arrays (or of shapes).

    Replicated leaves get a NamedSharding too: Orbax cannot restore onto a mesh without.

    Raises:
        UserError: see `spec`.
    """
    sizes = dict(mesh.shape)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(
            mesh, spec(tree_paths.names(path), leaf.shape, sizes, fsdp)
        ),
        tree,
    )


def put(tree: Any, shardings: Any) -> Any:
    """Arrays, each equal in all processes, on the devices that `shardings` names.

    A device receives its part alone; what lies right already is not copied.
    """

    def place(leaf, sharding):
        placed = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        if jax.process_count() == 1 or placed:
            return jax.device_put(leaf, sharding)
        # device_put would compare the processes' arrays, whole, over the network.
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree, shardings)


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """Bytes of a tree of arrays (or shapes) that one device holds."""
    parts = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(parts))
