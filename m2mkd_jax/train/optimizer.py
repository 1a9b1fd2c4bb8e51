"""The optimizer of a recipe as one optax transformation.

recipe fields read here: optimizer ('adamw' | 'sgd'), weight_decay, decay_rule, momentum (sgd
only), clip (0 = off), accumulate (1 = off), and the fields of train/schedule.py.
"""

from typing import Any

import jax
import optax

from m2mkd_jax import tree_paths
from m2mkd_jax.errors import UserError
from m2mkd_jax.train.schedule import learning_rate

DECAY_RULES = ("published", "published_stage", "all", "none")
OPTIMIZERS = ("adamw", "sgd")
EMBEDDINGS = ("pos_embed", "cls_token")


def decay_mask(params: Any, rule: str) -> Any:
    """Which parameters weight decay acts on: a tree of bools like `params` (nested dicts).

    'published': all but leaves named bias, one-dimensional ones (norm scales, layer scales) and
    pos_embed and cls_token. Scalars (the gain of a modulated layer, a bandwidth) ARE decayed.
    'published_stage': the same, but pos_embed and cls_token are decayed, as in the published MT of
    stage 0. 'all', 'none': what they say (NAC end to end decays all). Dimensions are counted
    without the axis along which blocks are stacked. Source: reference section 6.
    Raises UserError on an unknown rule.
    """
    if rule not in DECAY_RULES:
        raise UserError(f"decay rule {rule!r} is unknown: use one of {', '.join(DECAY_RULES)}")

    def decays(path, leaf) -> bool:
        if rule in ("all", "none"):
            return rule == "all"
        names = tree_paths.names(path)
        kind = [name for name in names if not tree_paths.is_index(name)][-1]
        if kind in EMBEDDINGS:
            return rule == "published_stage"
        return kind != "bias" and leaf.ndim - tree_paths.is_stacked(names) != 1

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(recipe: Any, steps_per_epoch: int, params: Any) -> optax.GradientTransformation:
    """Clipping, AdamW(0.9, 0.999, eps 1e-8) or SGD with Nesterov momentum, accumulation.

    params: the trainable parameters (only names and shapes are used, jax.ShapeDtypeStruct will
    do). steps_per_epoch counts optimizer UPDATES: with recipe.accumulate = n the transformation
    is called n times per update with the gradients of n equal parts of a batch, returns zeros for
    the first n - 1, and the learning rate advances once; metrics should be averaged likewise.

    AdamW's decay is decoupled and multiplied by the current rate, as in torch; SGD's is added to
    the gradient before the momentum, as in torch. Clipping is optax's, by the global norm of the
    accumulated gradient: torch divides by norm + 1e-6 instead of norm, a relative difference of
    at most 1e-6 / clip. Raises UserError on an unknown optimizer, decay rule or schedule.
    """
    if recipe.optimizer not in OPTIMIZERS:
        raise UserError(
            f"optimizer {recipe.optimizer!r} is unknown: use one of {', '.join(OPTIMIZERS)}"
        )
    if recipe.accumulate < 1 or recipe.clip < 0:
        raise UserError(
            f"accumulate must be at least 1 and clip not negative: they are "
            f"{recipe.accumulate} and {recipe.clip}"
        )
    rate = learning_rate(recipe, steps_per_epoch)
    mask = decay_mask(params, recipe.decay_rule)
    parts = []
    if recipe.clip:
        parts.append(optax.clip_by_global_norm(recipe.clip))
    if recipe.optimizer == "adamw":
        decay = recipe.weight_decay
        parts.append(optax.adamw(rate, 0.9, 0.999, 1e-8, weight_decay=decay, mask=mask))
    else:
        if recipe.weight_decay:
            parts.append(optax.add_decayed_weights(recipe.weight_decay, mask))
        parts.append(optax.sgd(rate, momentum=recipe.momentum, nesterov=True))
    transformation = optax.chain(*parts)
    if recipe.accumulate > 1:
        steps = optax.MultiSteps(transformation, recipe.accumulate)
        transformation = steps.gradient_transformation()
    return transformation


def ema_update(ema: Any, params: Any, decay: float) -> Any:
    """decay * ema + (1 - decay) * params, leaf by leaf: a moving average of the weights."""
    return optax.incremental_update(params, ema, 1.0 - decay)
