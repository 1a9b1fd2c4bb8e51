"""Evaluation on a part of a network's classes: ImageNet-R, Tiny-ImageNet-R (reference section 7).

A network keeps all of its logits; only those of the set's classes compete, in their order.
Axes: B batch, K classes of the network, P classes of the set.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from m2mkd_jax.data.class_lists import PARENTS, wordnet_ids
from m2mkd_jax.errors import UserError


def positions(name: str, classes: Sequence[str] | None = None) -> np.ndarray:
    """Where the logits of a set's classes stand among a network's: int32 (P,).

    name: 'imagenet_r' or 'tiny_imagenet_r'. classes: the network's, as WordNet ids in the order of
    its logits; by default those of ImageNet-1k or Tiny-ImageNet.

    Raises:
        UserError: a network that lacks one of the classes.
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


def restricted(logits: Callable[..., jax.Array], where: np.ndarray) -> Callable[..., jax.Array]:
    """A function like `logits`, whose (B, K) it narrows to the positions `where` (P,): (B, P)."""

    def narrowed(*arguments):
        return jnp.take(logits(*arguments), jnp.asarray(where), axis=-1)

    return narrowed
