"""The optimizer of a recipe as one optax transformation.

Recipe fields: optimizer (one of OPTIMIZERS), weight_decay, decay_rule, momentum (sgd only), clip
(0 = off), accumulate (1 = off), and those of train/schedule.py and train/trained_parts.py.

Source: docs/reference.md#optimizer.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from m2mkd_jax import tree_paths
from m2mkd_jax.errors import require
from m2mkd_jax.parallel import backend
from m2mkd_jax.train.schedule import learning_rate
from m2mkd_jax.train.trained_parts import layer_scales, trained_mask

DECAY_RULES = ("published", "published_stage", "all", "none")
OPTIMIZERS = ("adamw", "sgd", "lion", "lamb", "adafactor", "muon")
# Kernels that are no matrices between hidden layers, which Muon is for.
_NOT_HIDDEN = ("patch_embed", "head", "to_logits", "depthwise", "router")
# The share of AdamW's update that Muon's is scaled to (Liu et al. 2025, arXiv 2502.16982, eq. 4).
_MUON_RMS = 0.2
EMBEDDINGS = ("pos_embed", "cls_token")
# Entries of an array that is copied sooner than a kernel starts: on a CPU, on others.
_SMALL = (2**14, 2**17)


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


def make_optimizer(
    recipe: Any, steps_per_epoch: int, params: Any, stages: Sequence[str] = ()
) -> optax.GradientTransformation:
    """Clipping, the recipe's optimizer, learning rates by layer, accumulation.

    With recipe.accumulate = n the transformation is called n times per update, with the gradients
    of n equal parts of a batch; it returns zeros for the first n - 1 calls, and the learning rate
    advances once per update.

    AdamW (0.9, 0.999, eps 1e-8), Lion, LAMB, Adafactor and Muon are optax's with its defaults,
    layer by layer also where layers are stacked; their decay is decoupled and multiplied by the
    current rate. SGD has Nesterov momentum, and its decay is added to the gradient before the
    momentum, as in torch. Muon updates matrices between hidden layers, scaled so that AdamW's
    learning rates fit it, and AdamW all else. Clipping is by the global norm of the accumulated
    gradient of what is trained; torch divides by norm + 1e-6 instead of norm, a relative difference
    of at most 1e-6 / clip.

    Args:
        recipe: see the top of the file.
        steps_per_epoch: optimizer updates per epoch, not accumulation passes.
        params: the trainable parameters, or their shapes (jax.ShapeDtypeStruct).
        stages: names of the stages in `params`, in the order in which they run, for layer_decay.

    Raises:
        UserError: an unknown optimizer, decay rule or schedule, an invalid number, or patterns that
            fit nothing.

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
    parts = [clip_by_global_norm(recipe.clip)] if recipe.clip else []
    parts += _update_rule(recipe, learning_rate(recipe, steps_per_epoch), params)
    transformation = optax.chain(*parts)
    trained = trained_mask(params, recipe)
    if not all(jax.tree.leaves(trained)):
        labels = jax.tree.map(lambda own: "trained" if own else "frozen", trained)
        kinds = {"trained": transformation, "frozen": optax.set_to_zero()}
        transformation = optax.partition(kinds, labels)
    decay = getattr(recipe, "layer_decay", 1.0)
    if decay != 1.0:
        scales = layer_scales(params, decay, stages or list(params))
        transformation = optax.chain(transformation, _scaled_by(scales))
    if recipe.accumulate > 1:
        steps = optax.MultiSteps(transformation, recipe.accumulate)
        transformation = steps.gradient_transformation()
    return with_implicit_promotion(transformation)


def _update_rule(recipe: Any, rate: Callable, params: Any) -> list[optax.GradientTransformation]:
    """The recipe's optimizer with its weight decay, in parts."""
    decay_mask(params, recipe.decay_rule)  # an unknown rule is refused here
    # A function of what is there: parameters may be masked out.
    mask = functools.partial(decay_mask, rule=recipe.decay_rule)
    decay = {"weight_decay": recipe.weight_decay, "mask": mask}
    if recipe.optimizer == "sgd":
        decayed = [optax.add_decayed_weights(recipe.weight_decay, mask)]
        sgd = optax.sgd(rate, momentum=recipe.momentum, nesterov=True)
        return [*(decayed if recipe.weight_decay else []), sgd]
    if recipe.optimizer == "adafactor":
        # Its own decay is not multiplied by the rate.
        return [
            optax.scale_by_factored_rms(),
            _by_layer(optax.clip_by_block_rms(1.0)),
            _by_layer(optax.scale_by_param_block_rms()),
            optax.add_decayed_weights(recipe.weight_decay, mask),
            optax.scale_by_learning_rate(rate),
        ]
    if recipe.optimizer == "lamb":
        return [
            optax.scale_by_adam(eps=1e-6),
            optax.add_decayed_weights(recipe.weight_decay, mask),
            _by_layer(optax.scale_by_trust_ratio()),
            optax.scale_by_learning_rate(rate),
        ]
    if recipe.optimizer == "muon":
        muon = optax.contrib.muon(
            rate,
            weight_decay=recipe.weight_decay,
            weight_decay_mask=mask,
            muon_weight_dimension_numbers=hidden_matrices,
            consistent_rms=_MUON_RMS,
        )
        # Not muon's own AdamW: it has Nesterov momentum, and decays what the mask leaves out.
        adamw = optax.adamw(rate, 0.9, 0.999, 1e-8, **decay)
        return [optax.partition({"muon": muon, "adamw": adamw}, _muon_or_adamw)]
    if recipe.optimizer == "adamw":
        return [optax.adamw(rate, 0.9, 0.999, 1e-8, **decay)]
    return [optax.lion(rate, **decay)]


def _by_layer(rule: optax.GradientTransformation) -> optax.GradientTransformation:
    """A rule that looks at whole arrays, for each layer and expert of a stack by itself.

    Args:
        rule: without a state.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def one(path: tuple[Any, ...], change: jax.Array, array: jax.Array) -> jax.Array:
            names = tree_paths.names(path)
            changed = lambda change, array: rule.update(change, state, array)[0]
            for _ in range(tree_paths.is_stacked(names) + ("experts" in names)):
                changed = jax.vmap(changed)
            return changed(change, array)

        return jax.tree_util.tree_map_with_path(one, updates, params), state

    return optax.GradientTransformation(rule.init, update)


def hidden_matrices(params: Any) -> Any:
    """Which parameters Muon makes orthogonal: the matrices between hidden layers.

    Returns:
        A tree like `params`: axes in and out of a kernel, whose other axes are layers and experts;
        None for what AdamW updates.
    """

    def axes(path: tuple[Any, ...], leaf: Any) -> Any:
        names = tree_paths.names(path)
        matrix = names[-1] == "kernel" and leaf.ndim - tree_paths.is_stacked(names) >= 2
        if not matrix or any(name in _NOT_HIDDEN for name in names):
            return None
        return optax.contrib.MuonDimensionNumbers(-2, -1)

    return jax.tree_util.tree_map_with_path(axes, params)


def _muon_or_adamw(params: Any) -> Any:
    """Which of the two updates each parameter."""
    return jax.tree.map(
        lambda axes: "adamw" if axes is None else "muon",
        hidden_matrices(params),
        is_leaf=lambda axes: axes is None or isinstance(axes, optax.contrib.MuonDimensionNumbers),
    )


def clip_by_global_norm(largest: float) -> optax.GradientTransformation:
    """Scales gradients down to a global norm of at most `largest`.

    By one factor, where optax's own divides every gradient by the norm: XLA does not fuse divisions
    into what reads them, and a V-MoE's step would write and read all gradients once more.

    Args:
        largest: positive.

    Source: docs/reference.md#gradient-clipping.
    """

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        factor = largest / jnp.maximum(global_norm(updates), largest)
        return jax.tree.map(lambda g: g * factor.astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def global_norm(tree: Any) -> jax.Array:
    """The square root of the sum of all squares, as `optax.tree.norm`.

    On one device small arrays are summed as one: XLA compiles a kernel or two for each sum, and a
    NAC has more than a hundred.

    Args:
        tree: of arrays.
    """
    leaves = jax.tree.leaves(tree)
    if jax.device_count() > 1:
        return optax.tree.norm(leaves)
    limit = _SMALL[backend.platform() != "cpu"]
    small = [leaf for leaf in leaves if leaf.size <= limit]
    parts = [leaf for leaf in leaves if leaf.size > limit]
    if small:
        parts.append(jnp.concatenate([leaf.ravel() for leaf in small]))
    return optax.tree.norm(parts)


def _scaled_by(scales: Any) -> optax.GradientTransformation:
    """Multiplies updates by factors, a tree of arrays."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(_times, updates, scales), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _times(update: jax.Array, factor: np.ndarray) -> jax.Array:
    return update * jnp.broadcast_to(factor, update.shape)


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
