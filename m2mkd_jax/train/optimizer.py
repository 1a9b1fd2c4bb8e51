"""The optimizer of a recipe as one optax transformation.

Recipe fields: optimizer ('adamw' or 'sgd'), weight_decay, decay_rule, momentum (sgd only), clip
(0 = off), accumulate (1 = off), and those of train/schedule.py.

Source: docs/reference.md#optimizer.
"""

from typing import Any

import jax
import optax

from m2mkd_jax import tree_paths
from m2mkd_jax.errors import require
from m2mkd_jax.train.schedule import learning_rate

DECAY_RULES = ("published", "published_stage", "all", "none")
OPTIMIZERS = ("adamw", "sgd")
EMBEDDINGS = ("pos_embed", "cls_token")


def decay_mask(params: Any, rule: str) -> Any:
    """The parameters on which weight decay acts.

    Args:
        params: nested dicts of arrays or shapes.
        rule:
            'published': all except leaves named bias, one-dimensional leaves (norm scales, layer
            scales), pos_embed and cls_token; scalars (gain of a modulated layer, bandwidth) are
            decayed. 'published_stage': also pos_embed and cls_token, as in the published MT of
            stage 0. 'all' (NAC end to end), 'none'. Dimensions are counted without the axis along
            which blocks are stacked.

    Returns:
        A tree of bools like `params`.

    Raises:
        UserError: an unknown rule.

    Source: docs/reference.md#weight-decay.
    """
    require(
        rule in DECAY_RULES,
        f"decay rule {rule!r} is unknown: use one of {', '.join(DECAY_RULES)}",
    )

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        if rule in ("all", "none"):
            return rule == "all"
        names = tree_paths.names(path)
        kind = [name for name in names if not tree_paths.is_index(name)][-1]
        if kind in EMBEDDINGS:
            return rule == "published_stage"
        return kind != "bias" and leaf.ndim - tree_paths.is_stacked(names) != 1

    return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(recipe: Any, steps_per_epoch: int, params: Any) -> optax.GradientTransformation:
    """Clipping, AdamW (0.9, 0.999, eps 1e-8) or SGD with Nesterov momentum, accumulation.

    With recipe.accumulate = n the transformation is called n times per update, with the gradients
    of n equal parts of a batch; it returns zeros for the first n - 1 calls, and the learning rate
    advances once per update.

    AdamW's decay is decoupled and multiplied by the current rate, SGD's is added to the gradient
    before the momentum, both as in torch. Clipping is optax's, by the global norm of the
    accumulated gradient; torch divides by norm + 1e-6 instead of norm, a relative difference of at
    most 1e-6 / clip.

    Args:
        recipe: see the top of the file.
        steps_per_epoch: optimizer updates per epoch, not accumulation passes.
        params: the trainable parameters, or their shapes (jax.ShapeDtypeStruct).

    Raises:
        UserError: an unknown optimizer, decay rule or schedule, or an invalid number.

    Source: docs/reference.md#optimizer, docs/reference.md#gradient-clipping.
    """
    require(
        recipe.optimizer in OPTIMIZERS,
        f"optimizer {recipe.optimizer!r} is unknown: use one of {', '.join(OPTIMIZERS)}",
    )
    require(
        recipe.accumulate >= 1 and recipe.clip >= 0,
        "accumulate must be at least 1 and clip not negative: they are "
        f"{recipe.accumulate} and {recipe.clip}",
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
    return with_implicit_promotion(transformation)


def with_implicit_promotion(
    transformation: optax.GradientTransformation,
) -> optax.GradientTransformation:
    """The same transformation, also under strict dtype promotion.

    optax itself multiplies float32 by its int32 counters: in AdamW's bias correction, and in the
    mean over accumulated gradients.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):
            return transformation.update(updates, state, params)

    return optax.GradientTransformation(transformation.init, update)


def ema_update(ema: Any, params: Any, decay: float) -> Any:
    """The moving average of the weights after an update: decay * ema + (1 - decay) * params."""
    return optax.incremental_update(params, ema, 1.0 - decay)
