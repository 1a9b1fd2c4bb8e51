"""A loop over stacked layers that reads the largest parameters in their stacks.

Axes: L layers; a stack is (L, ...).

`jax.lax.scan` copies a layer's parameters out of their stacks; its backward pass fills stacks with
zeros and copies every layer's gradient into them. For the experts of a V-MoE, of which each layer
reads one after the other, all of that happens twice, and takes a fifth of a step on a CPU
(benchmarks/RESULTS.md). Here a stack is read as a constant, and carried through the loop beside
what flows from layer to layer, unchanged. So the gradient of what is carried is one array that
passes through all layers in the backward pass, and each writes its own part of it. It may start as
any array, such as that of the step before (parallel/gradient_buffers.py).

The same numbers as by `jax.lax.scan`; of first derivatives alone, as the constant has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from m2mkd_jax import tree_paths
from m2mkd_jax.parallel import gradient_buffers


class LayerArray:
    """One layer's array, which stays in its stack.

    Args:
        stack: (L, ...), without a gradient.
        carried: the stack again; its gradient is the stack's.
        layer: index of the layer.
    """

    def __init__(self, stack: jax.Array, carried: jax.Array, layer: jax.Array):
        self.stack, self.carried, self.layer = stack, carried, layer
        self.is_read = False

    def __getitem__(self, index: Any) -> LayerArray:
        """Itself: a module's parameter is read by `[...]`."""
        assert index is ...
        return self

    @property
    def shape(self) -> tuple[int, ...]:
        """The layer's."""
        return self.stack.shape[1:]

    def read(self, function: Callable[..., tuple[jax.Array, jax.Array]]) -> jax.Array:
        """The result of a function that reads the layer's array in the stack; once only.

        Args:
            function: (stack, carried, layer) -> (result, carried), a `jax.custom_vjp`. Its gradient
                of what is carried is the one that it gets, with the layer's part written; it
                returns `as_mapped` of what is carried.
        """
        assert not self.is_read, "a second gradient would be written over the first"
        self.is_read = True
        result, self.carried = function(self.stack, self.carried, self.layer)
        return result

    def copied(self) -> jax.Array:
        """The layer's array by itself."""
        return self.read(_copied)


def over_layers(
    body: Callable[[Any, dict, Any], tuple[Any, Any]],
    x: Any,
    params: dict,
    inputs: Any,
    uncopied: Callable[[Sequence[Any]], bool],
    transform: Callable[[Callable], Callable],
    loop: Callable[..., tuple[Any, Any]] = jax.lax.scan,
) -> tuple[Any, Any]:
    """Runs layers one after another: (x, parameters of a layer, its inputs) -> (x, output).

    Args:
        body: computes a layer.
        x: what flows from layer to layer.
        params: of all layers, nested dicts of arrays (L, ...).
        inputs: a tree of arrays (L, ...), or None.
        uncopied: of the names on a parameter's path: whether `body` takes it as a `LayerArray`.
        transform: of a function with a carry, as `jax.lax.scan` takes it: for rematerialisation.
        loop: (function with a carry, carry, inputs) -> (carry, outputs), such as `jax.lax.scan`.

    Returns:
        x after the last layer, and the outputs with a leading axis L.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(params)
    stays = [uncopied(tree_paths.names(path)) for path, _ in leaves]
    stacks = [leaf for (_, leaf), stay in zip(leaves, stays, strict=True) if stay]
    others = [leaf for (_, leaf), stay in zip(leaves, stays, strict=True) if not stay]
    constant = jax.lax.stop_gradient(stacks)

    def step(carry: tuple[Any, list], layer: tuple[Any, ...]) -> tuple[tuple[Any, list], Any]:
        x, carried = carry
        index, own, own_inputs = layer
        arrays = [LayerArray(s, c, index) for s, c in zip(constant, carried, strict=True)]
        parts = iter(arrays), iter(own)
        whole = jax.tree.unflatten(tree, [next(parts[0] if stay else parts[1]) for stay in stays])
        x, output = body(x, whole, own_inputs)
        for array in arrays:
            if not array.is_read:
                array.copied()  # its gradient is zero, which has to be written
        return (x, [array.carried for array in arrays]), output

    numbers = jnp.arange(len(leaves[0][1]), dtype=jnp.int32)
    (x, carried), outputs = loop(transform(step), (x, stacks), (numbers, others, inputs))
    return _last(x, carried, [gradient_buffers.buffer_of(stack) for stack in stacks]), outputs


@jax.custom_batching.custom_vmap
def as_mapped(carried: jax.Array, *others: jax.Array) -> jax.Array:
    """`carried`, mapped by `jax.vmap` if any of the other arrays is.

    Of an array that is not mapped jax sums the gradients over what is: with the parts of other
    layers, which are in each of them.
    """
    del others
    return carried


@as_mapped.def_vmap
def _as_mapped(
    count: int, mapped: list[bool], carried: jax.Array, *others: jax.Array
) -> tuple[jax.Array, bool]:
    del others
    if not mapped[0]:
        carried = jnp.broadcast_to(carried[None], (count, *carried.shape))
    return carried, True


@jax.custom_vjp
def _copied(stack: jax.Array, carried: jax.Array, layer: jax.Array) -> tuple[jax.Array, jax.Array]:
    array = jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
    return array, as_mapped(carried, stack, layer)


def _copied_forward(
    stack: jax.Array, carried: jax.Array, layer: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
    return _copied(stack, carried, layer), layer


def _copied_backward(
    layer: jax.Array, grads: tuple[jax.Array, jax.Array]
) -> tuple[None, jax.Array, None]:
    own, whole = grads
    return None, jax.lax.dynamic_update_index_in_dim(whole, own, layer, 0), None


_copied.defvjp(_copied_forward, _copied_backward)


@jax.custom_vjp
def _last(x: Any, carried: list[jax.Array], empty: list[jax.Array]) -> Any:
    """x; in the backward pass the arrays in `empty` are those that the layers write into."""
    del carried, empty
    return x


def _last_forward(x: Any, carried: list, empty: list) -> tuple[Any, list]:
    return x, [as_mapped(array, own) for array, own in zip(empty, carried, strict=True)]


def _last_backward(empty: list, grad: Any) -> tuple[Any, list, None]:
    return grad, empty, None


_last.defvjp(_last_forward, _last_backward)
