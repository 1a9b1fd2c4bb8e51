"""Evaluation on a part of a network's classes: ImageNet-R, Tiny-ImageNet-R.

The logits are restricted to the classes of the data set, in its order.
Axes: B batch, K classes of the network, P classes of the data set.

Source: docs/reference.md#renditions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.data.class_lists import PARENTS, wordnet_ids
from m2mkd_jax.errors import UserError


def positions(name: str, classes: Sequence[str] | None = None) -> np.ndarray:
    """The positions of a data set's classes among a network's logits.

    Args:
        name: 'imagenet_r' or 'tiny_imagenet_r'.
        classes: (K,), the network's classes as WordNet ids in the order of its logits; None: those
            of ImageNet-1k or Tiny-ImageNet.

    Returns:
        int32 (P,).

    Raises:
        UserError: the network lacks one of the classes.
    """
    classes = wordnet_ids(PARENTS[name]) if classes is None else classes
    place = {wordnet_id: number for number, wordnet_id in enumerate(classes)}
    wanted = wordnet_ids(name)
    missing = [wordnet_id for wordnet_id in wanted if wordnet_id not in place]
    if missing:
        raise UserError(
            f"{name} cannot be evaluated: the network's {len(classes)} classes lack {len(missing)} "
            f"of its {len(wanted)} (the first: {missing[0]}); it must have been trained on "
            f"{PARENTS[name]}"
        )
    return np.array([place[wordnet_id] for wordnet_id in wanted], np.int32)


def restricted(logits: Callable[..., Any], where: np.ndarray) -> Callable[..., Any]:
    """Restricts the logits of a function to some classes.

    Args:
        logits: returns (B, K), or several of these by name.
        where: int (P,), from `positions`.

    Returns:
        A function of the same arguments that returns (B, P), likewise.
    """

    def narrowed(*arguments: Any) -> Any:
        places = jnp.asarray(where)
        return jax.tree.map(lambda own: jnp.take(own, places, axis=-1), logits(*arguments))

    return narrowed
