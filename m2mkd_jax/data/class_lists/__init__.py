"""WordNet ids of ImageNet, Tiny-ImageNet and their renditions (reference section 7)."""

import functools
from importlib import resources

# A set of renditions -> the set whose classes, and logits, it takes its own from.
PARENTS = {"imagenet_r": "imagenet", "tiny_imagenet_r": "tiny_imagenet"}


@functools.cache
def wordnet_ids(name):
    """The classes of a set in the order of its logits: a tuple of ids.

    Args: name, 'imagenet', 'imagenet_r', 'tiny_imagenet' or 'tiny_imagenet_r'.
    """
    lines = (resources.files(__package__) / f"{name}.txt").read_text().splitlines()
    return tuple(line for line in lines if not line.startswith("#"))
