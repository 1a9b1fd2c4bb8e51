"""Dispatch: moves tokens to the experts that the router chose, and combines the results.

Axes: G groups of tokens, S tokens of a group, K choices per token, N = S K assignments of a group,
E experts, C slots per expert and group, D channels.

Two dispatches, (x, routing, weights, apply) -> (y, dropped):

    dropless    every assignment is served, as published
    capacity    each expert has C slots per group; assignments beyond them are dropped

    x           tokens (G, S, D)
    weights     pytree of arrays with a leading axis E
    apply       (weights, rows, linear) -> rows: what the experts compute. The dispatch chooses the
                layout of rows; linear(rows, {"kernel": (E, D, F), "bias": (E, F)}) applies to each
                row the layer of its own expert
    y           (G, S, D), the experts' outputs, weighted and summed; zero where all are dropped
    dropped     share of the assignments that are dropped; with expert choice, which drops none,
                share of the tokens that no expert takes

With a mesh ('data', 'expert') in context the groups are sharded over both axes and the experts over
'expert'; `capacity` then moves slots by an all-to-all. Without a mesh everything is local.

Source: 'capacity' is that of Riquelme et al. 2021 (arXiv 2106.05974), section 2, 'dropless' that of
FastMoE (arXiv 2103.13262); docs/reference.md#vmoe-dispatch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from m2mkd_jax.errors import UserError
from m2mkd_jax.models import layers
from m2mkd_jax.models.moe.grouped import (
    default_method,
    grouped_linear,
    tile_linear,
    tiles,
)
from m2mkd_jax.models.moe.router import ExpertChoice, Routing, TokenChoice
from m2mkd_jax.parallel import backend

# (weights, rows, linear) -> rows, see above.
Apply = Callable[[Any, jax.Array, Callable[..., jax.Array]], jax.Array]

ALL_DEVICES = PartitionSpec(("data", "expert"))


def _mesh() -> jax.sharding.AbstractMesh | None:
    """The mesh in context; None if it has only one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 else mesh


def groups(images: int, group_images: int) -> int:
    """Number of groups G that a batch is split into.

    Args:
        images: images of the batch.
        group_images: images of a group, at most the batch; 0 for all images of a device.

    Raises:
        UserError: the batch cannot be split so, or a group would span several devices.
    """
    mesh = _mesh()
    return count_groups(images, group_images, mesh.size if mesh else 1)


def count_groups(images: int, group_images: int, devices: int) -> int:
    """`groups` on a given number of devices.

    Raises:
        UserError: as for `groups`.
    """
    count = max(images // group_images, 1) if group_images else devices
    if images % count or count % devices or (group_images and images > count * group_images):
        size = f"groups of {group_images} images" if group_images else "equal groups"
        raise UserError(
            f"moe: a batch of {images} images cannot be cut into {size} on {devices} device(s); "
            "change the batch size or vmoe.group_images"
        )
    return count


def dropless(
    x: jax.Array, routing: Routing, weights: Any, apply: Apply
) -> tuple[jax.Array, jax.Array]:
    """Serves every assignment.

    Where experts are sharded over devices, each expert has as many slots as a group has tokens, the
    worst case, since a token picks an expert at most once. That is exact, at E/K times the FLOPs,
    memory and traffic of the experts; `capacity` is cheaper there. On one device, and on a mesh
    without an expert axis, rows are sorted by expert and only gradients leave a device.

    Source: docs/reference.md#vmoe-dispatch.

    Args:
        x, routing, weights, apply: see the top of this file.

    Returns:
        y and dropped, see the top of this file.
    """
    mesh = _mesh()
    if isinstance(routing, ExpertChoice):
        return _chosen_by_experts(x, routing, weights, apply)
    if backend.platform() == backend.ANY:
        return _every_expert(x, routing, weights, apply), jnp.zeros(())
    if mesh and mesh.shape["expert"] > 1:
        return capacity(x, routing, weights, apply, slots=x.shape[1])
    local: Callable[..., jax.Array] = functools.partial(_sorted, apply=apply)
    if mesh:
        local = jax.shard_map(
            local,
            in_specs=(ALL_DEVICES, ALL_DEVICES, ALL_DEVICES, PartitionSpec()),
            out_specs=ALL_DEVICES,
            check_vma=False,  # the check does not support the custom gradients inside
        )
    return local(x, routing.experts, routing.weights, weights), jnp.zeros(())


def capacity(
    x: jax.Array, routing: Routing, weights: Any, apply: Apply, slots: int
) -> tuple[jax.Array, jax.Array]:
    """Serves the assignments that fit into C slots per expert and group, in the routing's order.

    Args:
        x, routing, weights, apply: see the top of this file.
        slots: C; with expert choice the routing itself determines it.

    Returns:
        y and dropped, see the top of this file.
    """
    if isinstance(routing, ExpertChoice):
        return _chosen_by_experts(x, routing, weights, apply)
    experts = _count(weights)
    source, slot = fill_slots(routing, experts, slots)
    g, s, k = routing.experts.shape
    # Both moves are lookups, and so are their gradients: no scatter in either direction.
    rows = _take(x, source // k, slot.reshape(g, s, k))
    rows = on_experts(rows.reshape(g, experts, slots, -1), weights, apply)
    rows = _take(rows.reshape(g, experts * slots, -1), slot, source[..., None])
    y = _weighted_sum(rows.reshape(g, s, k, -1), routing.weights)
    return y.astype(x.dtype), jnp.mean(slot == experts * slots, dtype=jnp.float32)


def fill_slots(routing: TokenChoice, experts: int, slots: int) -> tuple[jax.Array, jax.Array]:
    """Assigns slots: the assignment s * K + k in each slot e * C + c, and the inverse.

    First choices of all tokens go before second ones, tokens in the routing's order.

    Args:
        routing: of G groups.
        experts: E.
        slots: C.

    Returns:
        source: (G, E * C) int32, the assignment in a slot; N for an empty slot.
        slot: (G, N) int32, the slot of an assignment; E * C for a dropped one.
    """
    g, s, k = routing.experts.shape
    order = jnp.arange(s)[None] if routing.order is None else routing.order
    order = jnp.broadcast_to(order[..., None], (g, s, 1))
    chosen = jnp.take_along_axis(routing.experts, order, axis=1)
    number = order * k + jnp.arange(k)[None, None]
    queue = [jnp.swapaxes(a, 1, 2).reshape(g, s * k) for a in (chosen, number)]
    expert, assignment = jax.lax.sort(queue, dimension=1, is_stable=True, num_keys=1)
    counts = _sizes(routing.experts.reshape(g, s * k), experts)
    starts = jnp.cumsum(counts, axis=1) - counts
    # The inverse first: an assignment's place in its expert's queue.
    place = jnp.arange(s * k)[None] - jnp.take_along_axis(starts, expert, axis=1)
    slot = jnp.where(place < slots, expert * slots + place, experts * slots)
    slot = jax.lax.sort([assignment, slot], dimension=1, num_keys=1)[1]
    places = jnp.arange(slots)
    source = jnp.take_along_axis(
        assignment, (starts[..., None] + places[None, None]).reshape(g, -1), axis=1, mode="clip"
    )
    filled = (places[None, None] < counts[..., None]).reshape(g, -1)
    return jnp.where(filled, source, s * k), slot


def _every_expert(x: jax.Array, routing: TokenChoice, weights: Any, apply: Apply) -> jax.Array:
    """Dropless by plain products, for any platform: every expert computes every token.

    E/K times the FLOPs of the experts; what a token has not chosen has weight zero.
    """
    count = _count(weights)
    rows = jnp.broadcast_to(x[:, None], (x.shape[0], count, *x.shape[1:]))
    rows = on_experts(rows, weights, apply).astype(jnp.float32)
    chosen = routing.experts[..., None] == jnp.arange(count)[None, None, None]
    shares = jnp.sum(jnp.where(chosen, routing.weights[..., None], 0.0), axis=2)
    return jnp.einsum("gesd,gse->gsd", rows, shares).astype(x.dtype)


def _sorted(
    x: jax.Array, experts: jax.Array, token_weights: jax.Array, weights: Any, *, apply: Apply
) -> jax.Array:
    """Dropless on one device: rows sorted by expert, in groups of varying size."""
    s, k, count = x.shape[0] * x.shape[1], experts.shape[-1], _count(weights)
    chosen = experts.reshape(1, s * k)
    assignments = jnp.arange(s * k)[None]
    _, source = jax.lax.sort([chosen, assignments], dimension=1, is_stable=True, num_keys=1)
    slot = jax.lax.sort([source, assignments], dimension=1, num_keys=1)[1]
    sizes = _sizes(chosen, count)[0]
    flat = x.reshape(1, s, -1)
    if default_method() == "batched":
        # Tokens go straight into tiles, and stay there until their experts are done.
        own = tiles(sizes, s * k)
        source = jnp.append(source[0], s * k)[own.source].reshape(1, -1)
        slot = own.place[slot]
        rows = _take(flat, source // k, slot.reshape(1, s, k))
        rows = apply(
            weights,
            rows.reshape(*own.source.shape, -1),
            lambda x, layer: tile_linear(x, layer["kernel"], layer["bias"], own, s * k),
        )
        rows = rows.reshape(1, source.shape[1], -1)
    else:
        rows = _take(flat, source // k, slot.reshape(1, s, k))
        rows = apply(
            weights,
            rows[0],
            lambda x, layer: grouped_linear(x, layer["kernel"], layer["bias"], sizes),
        )[None]
    rows = _take(rows, slot, source[..., None])
    y = _weighted_sum(rows.reshape(*experts.shape, -1), token_weights)
    return y.astype(x.dtype)


def _chosen_by_experts(
    x: jax.Array, routing: ExpertChoice, weights: Any, apply: Apply
) -> tuple[jax.Array, jax.Array]:
    """Either dispatch with expert choice: every expert has exactly C rows."""
    g, e, c = routing.tokens.shape
    tokens = routing.tokens.reshape(g, e * c)
    rows = jnp.take_along_axis(x, tokens[..., None], axis=1)
    rows = on_experts(rows.reshape(g, e, c, -1), weights, apply)
    rows = rows.astype(jnp.float32) * routing.weights[..., None]
    rows = rows.reshape(g, e * c, -1)
    # Any number of experts may take a token, so this is a scatter-add and not a lookup.
    y, taken = jax.vmap(
        lambda rows, tokens: (
            jnp.zeros((x.shape[1], rows.shape[-1])).at[tokens].add(rows),
            jnp.zeros((x.shape[1],), bool).at[tokens].set(True),
        )
    )(rows, tokens)
    return y.astype(x.dtype), jnp.mean(~taken, dtype=jnp.float32)


def on_experts(rows: jax.Array, weights: Any, apply: Apply) -> jax.Array:
    """Applies each expert to its slots, on the device that holds the expert.

    Args:
        rows: (G, E, C, D).
        weights, apply: see the top of this file.

    Returns:
        (G, E, C, D).

    Raises:
        UserError: the experts cannot be sharded evenly over the mesh's expert axis.
    """
    mesh = _mesh()
    if mesh and rows.shape[1] % mesh.shape["expert"]:
        raise UserError(
            f"moe: {rows.shape[1]} experts cannot be shared out over the mesh's expert axis of "
            f"{mesh.shape['expert']}"
        )
    by_group, by_expert = ALL_DEVICES, PartitionSpec("data", "expert")
    # The change of sharding is an all-to-all.
    rows = _moved(_constrain(_constrain(rows, by_group), by_expert))

    def linear(rows: jax.Array, layer: dict[str, jax.Array]) -> jax.Array:
        return jnp.einsum("egcd,edf->egcf", rows, layer["kernel"]) + layer["bias"][:, None, None]

    rows = jnp.swapaxes(apply(weights, jnp.swapaxes(rows, 0, 1), linear), 0, 1)
    return _moved(_constrain(_constrain(rows, by_expert), by_group))


def _moved(rows: jax.Array) -> jax.Array:
    """Rows that have come from other devices; kept, so that the backward pass moves none again."""
    return checkpoint_name(rows, layers.KEPT) if _mesh() else rows


def _constrain(x: jax.Array, spec: PartitionSpec) -> jax.Array:
    return jax.lax.with_sharding_constraint(x, spec) if _mesh() else x


def _count(weights: Any) -> int:
    """Number of experts E."""
    return jax.tree.leaves(weights)[0].shape[0]


def _sizes(experts: jax.Array, count: int) -> jax.Array:
    """Number of assignments per expert: (G, N) -> (G, E)."""
    return jnp.sum(experts[..., None] == jnp.arange(count)[None, None], axis=1, dtype=jnp.int32)


def _weighted_sum(rows: jax.Array, weights: jax.Array) -> jax.Array:
    """Sum over K of (G, S, K, D) weighted by (G, S, K), in float32."""
    return jnp.einsum("gskd,gsk->gsd", rows.astype(jnp.float32), weights)


@jax.custom_vjp
def _take(rows: jax.Array, source: jax.Array, readers: jax.Array) -> jax.Array:
    """Gathers rows; its gradient is a gather too, where autodiff would make it a scatter.

    Args:
        rows: (G, N, D).
        source: (G, M), the row to read; N for zeros.
        readers: (G, N, R), the inverse: the positions in M that read a row, M for none.

    Returns:
        (G, M, D).
    """
    del readers
    return jnp.take_along_axis(rows, source[..., None], axis=1, mode="fill", fill_value=0)


def _take_forward(
    rows: jax.Array, source: jax.Array, readers: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _take(rows, source, readers), readers


def _take_backward(readers: jax.Array, grad: jax.Array) -> tuple[jax.Array, None, None]:
    g, n, r = readers.shape
    flat = readers.reshape(g, n * r, 1)
    parts = jnp.take_along_axis(grad, flat, axis=1, mode="fill", fill_value=0)
    return parts.reshape(g, n, r, -1).sum(2), None, None


_take.defvjp(_take_forward, _take_backward)
