"""Learning rates: a pure function of the number of optimizer updates done (reference section 6).

recipe fields read here: lr (already scaled to the batch), min_lr, warmup_lr, epochs,
warmup_epochs, schedule.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.errors import UserError

SCHEDULES = ("clean", "published", "published_nac")


def epoch_table(recipe, kind: str) -> np.ndarray:
    """The published rates, one per epoch: float64 of length ceil(epochs).

    f(t) warms up linearly from warmup_lr; from t = warmup_epochs on it is the cosine over ALL
    epochs, which is therefore already below lr where the warmup ends (a jump down). kind
    'published_nac': epoch e runs at f(e). kind 'published': the rate was set after each epoch from
    that epoch's number, so epochs 0 and 1 run at f(0) and epoch e at f(e - 1).
    """
    t = np.arange(int(np.ceil(recipe.epochs)), dtype=np.float64)
    if kind == "published":
        t = np.maximum(t - 1, 0)
    cosine = recipe.min_lr + 0.5 * (recipe.lr - recipe.min_lr) * (
        1 + np.cos(np.pi * t / recipe.epochs)
    )
    slope = (recipe.lr - recipe.warmup_lr) / max(recipe.warmup_epochs, 1)
    return np.where(t < recipe.warmup_epochs, recipe.warmup_lr + t * slope, cosine)


def learning_rate(recipe, steps_per_epoch: int) -> Callable[[jax.Array | int], jax.Array]:
    """A schedule: optimizer update (int, from 0) -> learning rate (float32 scalar), jit-able.

    'clean': per update, linear from warmup_lr to lr over the warmup, then one cosine from lr to
    min_lr over the rest. 'published', 'published_nac': constant within an epoch, see
    `epoch_table`. steps_per_epoch counts optimizer updates, not accumulation passes. After the
    last epoch: min_lr (clean) or the last epoch's rate. Raises UserError on an unknown schedule,
    a warmup longer than the training, or epochs or steps below 1.
    """
    kind = recipe.schedule
    if kind not in SCHEDULES:
        raise UserError(f"schedule {kind!r} is unknown: use one of {', '.join(SCHEDULES)}")
    if recipe.epochs <= 0 or steps_per_epoch < 1:
        raise UserError(
            f"training needs at least one step: epochs is {recipe.epochs}, "
            f"steps per epoch {steps_per_epoch}"
        )
    if not 0 <= recipe.warmup_epochs <= recipe.epochs:
        raise UserError(
            f"warmup_epochs ({recipe.warmup_epochs}) must lie between 0 and "
            f"epochs ({recipe.epochs})"
        )
    if kind == "clean":
        return _clean(recipe, steps_per_epoch)
    table = np.asarray(epoch_table(recipe, kind), np.float32)

    def staircase(step):
        epoch = jnp.clip(jnp.asarray(step) // steps_per_epoch, 0, len(table) - 1)
        return jnp.asarray(table)[epoch]

    return staircase


def _clean(recipe, steps_per_epoch: int) -> Callable[[jax.Array | int], jax.Array]:
    warmup, decay = recipe.warmup_epochs, recipe.epochs - recipe.warmup_epochs

    def schedule(step):
        step = jnp.asarray(step)
        # Whole epochs and the rest apart: a float32 step count would lose steps beyond 2^24.
        epoch = step // steps_per_epoch - warmup + (step % steps_per_epoch) / steps_per_epoch
        rising = recipe.lr + (recipe.lr - recipe.warmup_lr) * epoch / max(warmup, 1e-12)
        progress = jnp.clip(epoch / max(decay, 1e-12), 0.0, 1.0)
        # cos^2(x/2) = (1 + cos x) / 2 without the cancellation near the end.
        falling = recipe.min_lr + (recipe.lr - recipe.min_lr) * jnp.square(
            jnp.cos(0.5 * jnp.pi * progress)
        )
        return jnp.where(epoch < 0, rising, falling).astype(jnp.float32)

    return schedule
