"""Learning rate by layer and weight decay of a detector.

Source: Li et al. 2022 (arXiv 2203.16527), appendix; docs/detection.md#optimizer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from m2mkd_jax import tree_paths
from m2mkd_jax.detection.spec import BackboneSpec
from m2mkd_jax.detection.training import STAGE, multi_step_rate
from m2mkd_jax.errors import require
from m2mkd_jax.train.optimizer import clip_by_global_norm, with_implicit_promotion

LAYER_RULES = ("block", "published")
DECAY_RULES = ("published", "all", "none")


def layer_scales(params: Any, spec: BackboneSpec, decay: float, rule: str = "block") -> Any:
    """The factor of the learning rate of every parameter: decay^(L + 1 - id) with L blocks.

    The id is 0 for the embeddings, i + 1 for block i, and L + 1 for all else.

    Args:
        params: of a detector or backbone, arrays or shapes.
        spec: of the backbone.
        decay: the factor from one layer to the one below.
        rule: 'block' counts blocks through the network; 'published' within their stage, as the
            published V-MoE detector does by mistake.

    Returns:
        A tree of arrays like `params`; of stacked blocks (blocks, 1, ...), of others ().

    Raises:
        UserError: an unknown rule.

    Source: docs/detection.md#optimizer.
    """
    known = ", ".join(LAYER_RULES)
    require(rule in LAYER_RULES, f"layer_rule {rule!r} is unknown: use one of {known}")
    numbers = np.arange(spec.depth)
    if rule == "published":
        numbers = np.concatenate([np.arange(depth) for depth in spec.depths])
    counts = [count for _, count in spec.segments()]
    starts = [0, *itertools.accumulate(counts)]

    def scale(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        names = tree_paths.names(path)
        layer: Any = spec.depth + 1
        if names[0] == "net":
            layer = 0
            if names[1].startswith("segment_"):
                i = int(names[1].removeprefix("segment_"))
                own = numbers[starts[i] : starts[i + 1]] + 1
                layer = own.reshape(-1, *(1,) * (leaf.ndim - 1))
        return np.asarray(decay ** (spec.depth + 1 - np.asarray(layer)), np.float32)

    return jax.tree_util.tree_map_with_path(scale, params)


def decay_mask(params: Any, rule: str = "published") -> Any:
    """The parameters on which weight decay acts.

    Args:
        params: of a detector or backbone.
        rule: 'published': all but the transformer's norms and positions, so that the norms of
            pyramid and heads are decayed, and biases; 'all', 'none'.

    Raises:
        UserError: an unknown rule.

    Source: docs/detection.md#optimizer.
    """
    known = ", ".join(DECAY_RULES)
    require(rule in DECAY_RULES, f"decay_rule {rule!r} is unknown: use one of {known}")
    if rule != "published":
        return jax.tree.map(lambda leaf: rule == "all", params)

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        names = tree_paths.names(path)
        norm = names[-2] in ("norm", "norm1", "norm2")
        return not (names[0] == "net" and (norm or names[-1] == "pos_embed"))

    return jax.tree_util.tree_map_with_path(decays, params)


def adamw(rate: Any, weight_decay: float, scales: Any, mask: Any) -> optax.GradientTransformation:
    """AdamW (0.9, 0.999, eps 1e-8) with a learning rate by parameter.

    Args:
        rate: learning rate, or its schedule.
        weight_decay: decoupled, multiplied by the parameter's own rate.
        scales: of `layer_scales`.
        mask: of `decay_mask`.
    """

    def scale(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        return jax.tree.map(_scaled, updates, scales), state

    return optax.chain(
        optax.scale_by_adam(0.9, 0.999, 1e-8),
        optax.add_decayed_weights(weight_decay, mask),
        optax.GradientTransformation(lambda params: optax.EmptyState(), scale),
        optax.scale_by_learning_rate(rate),
    )


def _scaled(update: jax.Array, scale: np.ndarray) -> jax.Array:
    return update * jax.numpy.broadcast_to(scale, update.shape)


def learning_rate(recipe: Any, updates_per_epoch: int) -> Callable[[jax.Array | int], jax.Array]:
    """The schedule of a recipe: number of the update, from 0 -> learning rate.

    Args:
        recipe: fields lr (scaled to the batch), warmup_epochs, warmup_factor and milestones.
        updates_per_epoch: optimizer updates in an epoch.

    Raises:
        UserError: milestones that do not rise, or lie in the warmup.
    """
    milestones = [round(epoch * updates_per_epoch) for epoch in recipe.milestones]
    warmup = round(recipe.warmup_epochs * updates_per_epoch)
    return multi_step_rate(recipe.lr, warmup, milestones, recipe.warmup_factor)


def make_optimizer(
    recipe: Any, updates_per_epoch: int, params: Any, spec: BackboneSpec
) -> optax.GradientTransformation:
    """Clipping, AdamW by layer, accumulation.

    Args:
        recipe: fields of `learning_rate`, and weight_decay, decay_rule, layer_decay, layer_rule,
            clip and accumulate.
        updates_per_epoch: optimizer updates in an epoch.
        params: {STAGE: of the detector, or their shapes}.
        spec: of its backbone.

    Raises:
        UserError: an unknown rule, or as for `learning_rate`.

    Source: docs/detection.md#optimizer.
    """
    scales = {STAGE: layer_scales(params[STAGE], spec, recipe.layer_decay, recipe.layer_rule)}
    mask = {STAGE: decay_mask(params[STAGE], recipe.decay_rule)}
    step = adamw(learning_rate(recipe, updates_per_epoch), recipe.weight_decay, scales, mask)
    if recipe.clip:
        step = optax.chain(clip_by_global_norm(recipe.clip), step)
    if recipe.accumulate > 1:
        step = optax.MultiSteps(step, recipe.accumulate).gradient_transformation()
    return with_implicit_promotion(step)
