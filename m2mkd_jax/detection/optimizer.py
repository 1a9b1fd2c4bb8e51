"""Learning rate by layer and weight decay of a detector.

Source: Li et al. 2022 (arXiv 2203.16527), appendix; docs/detection.md#optimizer.
"""

from __future__ import annotations

import itertools
from typing import Any

import jax
import numpy as np
import optax

from m2mkd_jax import tree_paths
from m2mkd_jax.detection.spec import BackboneSpec
from m2mkd_jax.errors import require

LAYER_RULES = ("block", "published")


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


def decay_mask(params: Any) -> Any:
    """The parameters on which weight decay acts: all but the transformer's norms and positions.

    The norms of pyramid and heads are decayed, and so are biases.

    Args:
        params: of a detector or backbone.

    Source: docs/detection.md#optimizer.
    """

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
