"""Learning rates, as pure functions of the number of optimizer updates.

Recipe fields: lr (already scaled to the batch), min_lr, warmup_lr, epochs, warmup_epochs, schedule.

Source: docs/reference.md#schedules.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.errors import require

SCHEDULES = ("cosine", "clean", "linear", "constant", "one_cycle", "published", "published_nac")
# Per update: progress after the warmup, 0 to 1 -> share of the way from min_lr to lr.
_FALLING: dict[str, Callable[[jax.Array], jax.Array]] = {
    # cos^2(x/2) = (1 + cos x) / 2 without the cancellation near the end.
    "cosine": lambda progress: jnp.square(jnp.cos(0.5 * jnp.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "constant": jnp.ones_like,
}
_FALLING["clean"] = _FALLING["one_cycle"] = _FALLING["cosine"]


def epoch_table(recipe: Any, kind: str) -> np.ndarray:
    """The published rates, one per epoch.

    f(t) warms up linearly from warmup_lr; from t = warmup_epochs on it is the cosine over all
    epochs, which is already below lr when the warmup ends (a jump down).

    Args:
        recipe: see the top of the file.
        kind: 'published_nac': epoch e has the rate f(e). 'published': the original sets the rate
            after each epoch from that epoch's number, so epochs 0 and 1 have f(0) and epoch e has
            f(e - 1).

    Returns:
        float64 (ceil(epochs),).

    Source: docs/reference.md#schedules.
    """
    t = np.arange(int(np.ceil(recipe.epochs)), dtype=np.float64)
    if kind == "published":
        t = np.maximum(t - 1, 0)
    cosine = recipe.min_lr + 0.5 * (recipe.lr - recipe.min_lr) * (
        1 + np.cos(np.pi * t / recipe.epochs)
    )
    slope = (recipe.lr - recipe.warmup_lr) / max(recipe.warmup_epochs, 1)
    return np.where(t < recipe.warmup_epochs, recipe.warmup_lr + t * slope, cosine)


def learning_rate(recipe: Any, steps_per_epoch: int) -> Callable[[jax.Array | int], jax.Array]:
    """The schedule of a recipe.

    Per update, from warmup_lr to lr during the warmup, then to min_lr, which it keeps after the
    last epoch: 'cosine', also called 'clean', up by a line and down by one cosine; 'linear' both by
    lines; 'constant' lr to the end; 'one_cycle' both by half a cosine (Smith and Topin 2018, arXiv
    1708.07120, as in PyTorch). 'published', 'published_nac': constant within an epoch, see
    `epoch_table`; after the last epoch the last rate.

    Args:
        recipe: see the top of the file.
        steps_per_epoch: optimizer updates per epoch, not accumulation passes.

    Returns:
        A function: number of the update (int, from 0) -> learning rate (float32 scalar), jittable.

    Raises:
        UserError: an unknown schedule, a warmup longer than the training, none where it is a part
            of the cycle, or no step at all.

    Source: docs/reference.md#schedules.
    """
    kind = recipe.schedule
    require(kind in SCHEDULES, f"schedule {kind!r} is unknown: use one of {', '.join(SCHEDULES)}")
    require(
        recipe.epochs > 0 and steps_per_epoch >= 1,
        f"training needs at least one step: epochs is {recipe.epochs}, "
        f"steps per epoch {steps_per_epoch}",
    )
    require(
        0 <= recipe.warmup_epochs <= recipe.epochs,
        f"warmup_epochs ({recipe.warmup_epochs}) must lie between 0 and epochs ({recipe.epochs})",
    )
    require(
        kind != "one_cycle" or recipe.warmup_epochs > 0,
        "schedule one_cycle rises for warmup_epochs, which is 0: set it, such as to 0.3 * epochs",
    )
    if kind in _FALLING:
        return _per_update(recipe, steps_per_epoch, kind)
    table = np.asarray(epoch_table(recipe, kind), np.float32)

    def staircase(step: jax.Array | int) -> jax.Array:
        epoch = jnp.clip(jnp.asarray(step) // steps_per_epoch, 0, len(table) - 1)
        return jnp.asarray(table)[epoch]

    return staircase


def _per_update(
    recipe: Any, steps_per_epoch: int, kind: str
) -> Callable[[jax.Array | int], jax.Array]:
    """A warmup, then a fall, per update."""
    warmup, decay = recipe.warmup_epochs, recipe.epochs - recipe.warmup_epochs

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step)
        # Whole epochs and the fraction separately: float32 cannot count steps beyond 2^24.
        whole = (step // steps_per_epoch).astype(jnp.float32)
        fraction = (step % steps_per_epoch).astype(jnp.float32) / steps_per_epoch
        epoch = whole - warmup + fraction
        ahead = epoch / max(warmup, 1e-12)  # of the peak, from -1 to 0 during the warmup
        if kind == "one_cycle":
            ahead = -jnp.square(jnp.sin(0.5 * jnp.pi * ahead))
        rising = recipe.lr + (recipe.lr - recipe.warmup_lr) * ahead
        progress = jnp.clip(epoch / max(decay, 1e-12), 0.0, 1.0)
        falling = recipe.min_lr + (recipe.lr - recipe.min_lr) * _FALLING[kind](progress)
        return jnp.where(epoch < 0, rising, falling).astype(jnp.float32)

    return schedule
