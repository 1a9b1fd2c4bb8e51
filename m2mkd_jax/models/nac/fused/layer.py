"""A propagator of fused kernels and matrix products.

Axes: B batch, I input latents, U mediators, V = I + U senders, D state, H hidden channels.

The same numbers as models/nac/attention.py's LatentLayer, but for the order of roundings. Each
function here is what comes before a matrix product together with the product, so that the product's
operand need not be kept: the backward pass of what comes before gives it again.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from m2mkd_jax.models import layers
from m2mkd_jax.models.nac.fused import attention, feed_forward, residuals, senders
from m2mkd_jax.models.nac.fused.programs import Norm
from m2mkd_jax.models.nac.fused.residuals import Residual

Three = tuple[jax.Array, jax.Array, jax.Array]


def _keep(x: jax.Array) -> jax.Array:
    return checkpoint_name(x, layers.KEPT)


def _of_operand(grad: jax.Array, weights: jax.Array) -> jax.Array:
    """Gradient (..., D) of x in x @ weights."""
    return jnp.einsum("bue,de->bud", grad, weights.astype(grad.dtype))


def _of_weights(x: jax.Array, grad: jax.Array, weights: jax.Array) -> jax.Array:
    """Gradient (D, E) of the weights in x @ weights."""
    return jnp.einsum("bud,bue->de", x, grad).astype(weights.dtype)


def _like(grads: Any, primals: Any) -> Any:
    return jax.tree.map(lambda g, p: g.astype(p.dtype), grads, primals)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def project_senders(
    inputs: jax.Array,
    mediators: jax.Array,
    norm: Norm,
    modulations: Three,
    weights: Three,
    epsilon: float,
) -> tuple[Three, jax.Array]:
    """Queries (B, U, HC), keys and values (B, V, HC); and the mediators as they are.

    Whoever goes on with these mediators adds their gradient in the kernel of this one's.
    """
    return _project_forward(inputs, mediators, norm, modulations, weights, epsilon)[0]


def _project_forward(
    inputs: jax.Array,
    mediators: jax.Array,
    norm: Norm,
    modulations: Three,
    weights: Three,
    epsilon: float,
) -> tuple[tuple[Three, jax.Array], tuple[Any, ...]]:
    operands = senders.modulate_senders(inputs, mediators, norm, modulations, epsilon=epsilon)
    q, k, v = (x @ w for x, w in zip(operands, weights, strict=True))
    return ((q, k, v), mediators), (inputs, mediators, norm, modulations, weights)


def _project_backward(
    epsilon: float, saved: tuple[Any, ...], grads: tuple[Three, jax.Array]
) -> tuple[Any, ...]:
    inputs, mediators, norm, modulations, weights = saved
    of_products, of_mediators = grads
    of_operands = tuple(_of_operand(g, w) for g, w in zip(of_products, weights, strict=True))
    operands, of_inputs, of_mediators, of_norm, of_modulations = senders.modulate_senders_backward(
        inputs, mediators, norm, modulations, of_operands, of_mediators, epsilon=epsilon
    )
    of_weights = tuple(
        _of_weights(x, g, w) for x, g, w in zip(operands, of_products, weights, strict=True)
    )
    return (
        of_inputs,
        of_mediators,
        _like(of_norm, norm),
        _like(of_modulations, modulations),
        of_weights,
    )


project_senders.defvjp(_project_forward, _project_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, log_kernel: jax.Array, heads: int
) -> jax.Array:
    """Attention with a finite log kernel (B, U, V): (B, U, HC), (B, V, HC) twice -> (B, U, HC)."""
    return attention.forward(q, k, v, log_kernel, heads=heads)[0]


def _attend_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, log_kernel: jax.Array, heads: int
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    message, log_sum = map(_keep, attention.forward(q, k, v, log_kernel, heads=heads))
    return message, (q, k, v, log_kernel, message, log_sum)


def _attend_backward(
    heads: int, saved: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, ...]:
    return attention.backward(*saved, grad, heads=heads)


attend.defvjp(_attend_forward, _attend_backward)


@jax.custom_vjp
def project_message(x: jax.Array, modulation: jax.Array, weights: jax.Array) -> jax.Array:
    """(x * modulation) @ weights: (B, U, HC) -> (B, U, D)."""
    return _message_forward(x, modulation, weights)[0]


def _message_forward(
    x: jax.Array, modulation: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    wide = x.astype(jnp.float32) * layers.align_rank(modulation, x).astype(jnp.float32)
    operand = wide.astype(x.dtype)
    return operand @ weights, (x, modulation, weights)


def _message_backward(
    saved: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, modulation, weights = saved
    operand, of_x, of_modulation = residuals.modulate_backward(
        x, modulation, _of_operand(grad, weights)
    )
    return of_x, of_modulation.astype(modulation.dtype), _of_weights(operand, grad, weights)


project_message.defvjp(_message_forward, _message_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def add_and_project(
    states: jax.Array,
    y: jax.Array,
    residual: Residual,
    norm: Norm,
    modulation: jax.Array,
    weights: jax.Array,
    epsilon: float,
) -> tuple[jax.Array, jax.Array]:
    """Adds a residual branch; of the sum's LayerNorm, modulated, the product with weights.

    Returns:
        The sum (B, U, D) and the product (B, U, 2H).
    """
    return _add_forward(states, y, residual, norm, modulation, weights, epsilon)[0]


def _add_forward(
    states: jax.Array,
    y: jax.Array,
    residual: Residual,
    norm: Norm,
    modulation: jax.Array,
    weights: jax.Array,
    epsilon: float,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    total, operand = residuals.add_and_modulate(
        states, y, residual, norm, modulation, epsilon=epsilon
    )
    total = _keep(total)
    return (total, operand @ weights), (total, y, residual, norm, modulation, weights)


def _add_backward(
    epsilon: float, saved: tuple[Any, ...], grads: tuple[jax.Array, jax.Array]
) -> tuple[Any, ...]:
    total, y, residual, norm, modulation, weights = saved
    of_total, of_product = grads
    of_operand = _of_operand(of_product, weights)
    operand, of_states, of_y, of_branch, of_norm, of_modulation = (
        residuals.add_and_modulate_backward(
            total, y, residual, norm, modulation, (of_total, of_operand), epsilon=epsilon
        )
    )
    of_residual = Residual(of_branch[0], of_branch[1], jnp.zeros_like(residual.keep))
    return (
        of_states,
        of_y,
        _like(of_residual, residual),
        _like(of_norm, norm),
        of_modulation.astype(modulation.dtype),
        _of_weights(operand, of_product, weights),
    )


add_and_project.defvjp(_add_forward, _add_backward)


@jax.custom_vjp
def project_geglu(
    h: jax.Array, bias: jax.Array, modulation: jax.Array, weights: jax.Array
) -> jax.Array:
    """GEGLU of h + bias, modulated, times weights: (B, U, 2H) -> (B, U, D)."""
    return _geglu_forward(h, bias, modulation, weights)[0]


def _geglu_forward(
    h: jax.Array, bias: jax.Array, modulation: jax.Array, weights: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return feed_forward.geglu(h, bias, modulation) @ weights, (h, bias, modulation, weights)


def _geglu_backward(
    saved: tuple[jax.Array, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    h, bias, modulation, weights = saved
    operand, of_h, of_bias, of_modulation = feed_forward.geglu_backward(
        h, bias, modulation, _of_operand(grad, weights)
    )
    return (
        of_h,
        of_bias.astype(bias.dtype),
        of_modulation.astype(modulation.dtype),
        _of_weights(operand, grad, weights),
    )


project_geglu.defvjp(_geglu_forward, _geglu_backward)


@jax.custom_vjp
def add(states: jax.Array, y: jax.Array, residual: Residual) -> jax.Array:
    """Adds a residual branch: (B, U, D) -> (B, U, D)."""
    return _residual_forward(states, y, residual)[0]


def _residual_forward(
    states: jax.Array, y: jax.Array, residual: Residual
) -> tuple[jax.Array, tuple[Any, ...]]:
    gamma, bias = (x.astype(jnp.float32)[None, None] for x in residual[:2])
    branch = gamma * (y.astype(jnp.float32) + bias) * residual.keep[:, None, None]
    return (states.astype(jnp.float32) + branch).astype(states.dtype), (y, residual)


def _residual_backward(saved: tuple[Any, ...], grad: jax.Array) -> tuple[Any, ...]:
    y, residual = saved
    of_y, of_branch = residuals.add_backward(y, residual, grad)
    of_residual = Residual(of_branch[0], of_branch[1], jnp.zeros_like(residual.keep))
    return grad, of_y, _like(of_residual, residual)


add.defvjp(_residual_forward, _residual_backward)
