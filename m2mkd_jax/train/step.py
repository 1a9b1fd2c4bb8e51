"""One optimizer step, for every phase.

Axes: B batch, H height, W width, K classes.

The training state is a plain dict: "step" (int32 scalar), "params" {stage: params}, "opt_state",
"fixed" {stage: random arrays that are drawn once and must survive a restart} and, when an average
of the weights is kept, "ema" like "params".
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from m2mkd_jax.train import erasing, mixing
from m2mkd_jax.train.optimizer import ema_update


def normalise(images: jax.Array, mean, std) -> jax.Array:
    """uint8 (B, H, W, 3) -> float32, ((x / 255) - mean) / std per channel."""
    return (images.astype(jnp.float32) / 255.0 - jnp.asarray(mean)) / jnp.asarray(std)


def prepare(
    keys: tuple[jax.Array, jax.Array], batch: dict, recipe: Any, data: Any
) -> tuple[jax.Array, jax.Array]:
    """What a step does to a batch from the host: normalise, erase, mix.

    keys: of erasing and of mixing. Returns images (B, H, W, 3) float32 and targets (B, K).
    """
    images = normalise(batch["image"], data.mean, data.std)
    images = erasing.erase(keys[0], images, data.augment.erase)
    return mixing.mix(keys[1], images, batch["label"], data.classes, recipe)


def initial_state(
    params: dict, fixed: dict, optimizer: optax.GradientTransformation, recipe: Any
) -> dict:
    """State before the first step."""
    state = {
        "step": jnp.zeros((), jnp.int32),
        "params": params,
        "opt_state": optimizer.init(params),
        "fixed": fixed,
    }
    if recipe.ema:
        # A copy: a buffer that appears twice in the state cannot be donated.
        state["ema"] = jax.tree.map(jnp.copy, params)
    return state


def make_step(
    loss: Callable,
    optimizer: optax.GradientTransformation,
    recipe: Any,
    data: Any,
    seed: int,
    out_shardings: Any = None,
) -> Callable[[dict, dict, dict], tuple[dict, dict]]:
    """(state, frozen, batch) -> (state, metrics), compiled, the old state's buffers reused.

    Args:
        loss: (trainable, frozen, batch, key) -> (scalar, metrics); losses.Program.loss.
        optimizer: of train/optimizer.py.
        recipe: mixing, ema and accumulate fields.
        data: mean, std, classes, augment.erase.
        seed: of all randomness; a step's key depends on it and on the step number alone.
        out_shardings: (of the state, of the metrics); the new state must lie where the old one
            does, or its buffers cannot be reused. None: the compiler's choice.

    The batch holds "image" uint8 (B, H, W, 3) and "label" int32 (B,).
    """

    def step(state: dict, frozen: dict, batch: dict) -> tuple[dict, dict]:
        key = jax.random.fold_in(jax.random.key(seed), state["step"])
        mix_key, loss_key, erase_key = jax.random.split(key, 3)
        images, targets = prepare((erase_key, mix_key), batch, recipe, data)
        frozen = with_fixed(frozen, state["fixed"])
        batch = {"image": images, "target": targets}
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(
            state["params"], frozen, batch, loss_key
        )
        metrics["gradient_norm"] = optax.global_norm(grads)
        updates, opt_state = optimizer.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {**state, "step": state["step"] + 1, "params": params, "opt_state": opt_state}
        if recipe.ema:
            new["ema"] = ema_update(state["ema"], params, recipe.ema)
        if recipe.ema and recipe.accumulate > 1:
            # The weights move with the last part of a batch alone, and so must their average.
            moved = new["step"] % recipe.accumulate == 0
            new["ema"] = jax.tree.map(functools.partial(jnp.where, moved), new["ema"], state["ema"])
        return new, metrics

    return jax.jit(step, donate_argnums=0, out_shardings=out_shardings)


def with_fixed(frozen: dict, fixed: dict) -> dict:
    """The frozen stages, and the fixed arrays of the trained ones."""
    return frozen | {n: {**frozen.get(n, {}), "fixed": arrays} for n, arrays in fixed.items()}


def evaluated_params(state: dict) -> dict:
    """What evaluation and the finished weights use: the average if one is kept."""
    return state.get("ema", state["params"])
