"""WordNet ids of ImageNet, Tiny-ImageNet and their renditions.

Source: docs/reference.md#renditions.
"""

import functools
from importlib import resources

# Renditions -> the data set whose classes they are some of.
PARENTS = {"imagenet_r": "imagenet", "tiny_imagenet_r": "tiny_imagenet"}


@functools.cache
def wordnet_ids(name: str) -> tuple[str, ...]:
    """The class ids of a data set, in the order of the logits.

    Args:
        name: 'imagenet', 'imagenet_r', 'tiny_imagenet' or 'tiny_imagenet_r'.
    """
    lines = (
        (resources.files("m2mkd_jax.data.class_lists") / f"{name}.txt")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    return tuple(line for line in lines if not line.startswith("#"))
