"""The sharding of a training state: all rules by path.

    a leaf under 'experts'    its expert axis over 'expert': a device holds its own experts only
    a large leaf with fsdp    also its longest remaining divisible axis over 'data'
    everything else           replicated

The paths of optimizer moments, accumulated gradients and averaged weights contain the parameter's
path, so one rule serves a parameter and everything kept for it.

Axes: L stacked layers (never sharded: every device runs every layer), E experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from m2mkd_jax import tree_paths
from m2mkd_jax.errors import UserError

# Smallest parameter worth sharding: elements in one layer's array.
LARGE = 2**16


def spec(names: Sequence[Any], shape: Sequence[int], sizes: dict, fsdp: bool) -> PartitionSpec:
    """The partition of one leaf.

    Args:
        names: keys from the root to the leaf.
        shape: of the leaf.
        sizes: {'data': groups, 'expert': devices per group}.
        fsdp: shard large leaves over 'data'.

    Raises:
        UserError: the number of experts is not divisible by the devices of a group.
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


def shardings(mesh: Mesh | AbstractMesh, tree: Any, fsdp: bool) -> Any:
    """The shardings of a tree.

    Args:
        mesh: from `make_mesh`.
        tree: arrays or shapes.
        fsdp: shard large leaves over 'data'.

    Returns:
        A tree of `NamedSharding`, also for replicated leaves, which Orbax needs to restore onto a
        mesh.

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
    """Places arrays, each equal in all processes, by their shardings.

    A device receives only its part; arrays already placed so are not copied.

    Args:
        tree: arrays of the host or of devices.
        shardings: of `shardings`.
    """

    def place(leaf: Any, sharding: NamedSharding) -> jax.Array:
        placed = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
        if jax.process_count() == 1 or placed:
            return jax.device_put(leaf, sharding)
        # device_put would compare the complete arrays of all processes over the network.
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(place, tree, shardings)


def bytes_per_device(tree: Any, shardings: Any) -> int:
    """The bytes of a tree of arrays (or shapes) on one device."""
    parts = jax.tree.map(
        lambda leaf, sharding: math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize,
        tree,
        shardings,
    )
    return sum(jax.tree.leaves(parts))
