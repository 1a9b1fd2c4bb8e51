"""Which images are in which batch: pure functions of (seed, step), so any step can be asked for.

Axes: N images, B images of the global batch.
"""

import functools

import numpy as np

from m2mkd_jax.errors import UserError

# Streams that share a seed must not share random numbers: each use has its own word.
_PERMUTATION, _AUGMENTATION, _SUBSET = 1, 2, 3
# The published sampler cuts an epoch to a multiple of this (reference section 7).
_REPEATED_MULTIPLE = 256


def _generator(seed, *words):
    if seed < 0:
        raise UserError(f"the data seed is {seed}: use a seed that is 0 or larger")
    return np.random.default_rng((seed, *words))


def step_generator(seed, step):
    """Random numbers of one training step's augmentation, the same wherever they are drawn.

    Raises UserError for a negative seed.
    """
    return _generator(seed, _AUGMENTATION, step)


# A step at an epoch's edge is prefetched beside steps of the next epoch, for training and for
# several jobs in one process: a few arrays are worth keeping (10 MB each for ImageNet).
@functools.lru_cache(maxsize=4)
def epoch_permutation(length, seed, epoch):
    """The order of the images in one epoch.

    Args: length N; seed >= 0; epoch counted from 0.
    Returns: int64 (N,), read-only, a permutation of range(N).
    Raises: UserError for a negative seed.
    """
    order = _generator(seed, _PERMUTATION, epoch).permutation(length)
    order.setflags(write=False)
    return order


def repeated_augmentation(permutation, replicas, rank, repeats=3):
    """One replica's indices of one epoch of repeated augmentation (reference section 7).

    Every index of the permutation stands `repeats` times in a row; the row is dealt over the
    replicas like cards, so that the copies of an image land on different replicas, and each hand
    is cut to floor(N / 256) * 256 / replicas: with 3 repeats an epoch sees a third of the images.

    Args: permutation int (N,); replicas >= 1; 0 <= rank < replicas; repeats >= 1.
    Returns: int (K,), K = floor(floor(N / 256) * 256 / replicas).
    Raises: ValueError for a rank, replicas or repeats out of range.
    """
    if replicas < 1 or not 0 <= rank < replicas or repeats < 1:
        raise ValueError(f"no replica {rank} of {replicas} with {repeats} repeats")
    permutation = np.asarray(permutation)
    length = len(permutation)
    kept = length // _REPEATED_MULTIPLE * _REPEATED_MULTIPLE // replicas
    # The published row is padded to a multiple of the replicas, but the cut never reaches that.
    return permutation[(rank + replicas * np.arange(kept)) // repeats]


def class_balanced_order(labels, seed=0):
    """An order of the images whose every prefix is balanced over the classes.

    The images of a class are shuffled and dealt in rounds, one of each class per round, the
    classes of a round in random order. Prefixes are nested by construction, and in a prefix two
    classes differ by at most one image while both have images left.

    Args: labels int (N,); seed >= 0.
    Returns: int64 (N,), a permutation of range(N).
    """
    labels = np.asarray(labels)
    shuffled = _generator(seed, _SUBSET).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    rounds = np.arange(len(labels)) - starts
    ties = _generator(seed, _SUBSET, 1).random(len(labels))
    return by_class[np.lexsort((ties, rounds))]


class BatchIndices:
    """Image indices of the global batch at any training step; a batch depends on (seed, step).

    Each epoch is a fresh permutation, cut to whole batches (the rest is dropped; the next epoch
    shuffles it back in). With repeats > 1 each index comes `repeats` times and the epoch is cut
    to floor(N / 256) * 256 of them: batch t is what R replicas of `repeated_augmentation` would
    see together at step t, for any R that divides it.

    Args: length N; batch_size B, the global one; seed >= 0; repeats >= 1.
    Attributes: steps_per_epoch, batch_size, length.
    Raises: UserError when an epoch has no whole batch or the seed is negative.
    """

    def __init__(self, length, batch_size, seed, repeats=1):
        if batch_size < 1 or repeats < 1:
            raise UserError(
                f"batch size {batch_size} with {repeats} repeats: both must be 1 or larger"
            )
        usable = length if repeats == 1 else length // _REPEATED_MULTIPLE * _REPEATED_MULTIPLE
        if batch_size > usable:
            cut = (
                ""
                if repeats == 1
                else (
                    f" (repeated augmentation keeps {usable} indices, a multiple of"
                    f" {_REPEATED_MULTIPLE}, of an epoch: set repeated_augmentation=1 to use all)"
                )
            )
            raise UserError(
                f"a batch of {batch_size} does not fit into {length} training images{cut}:"
                " use a smaller batch or more images"
            )
        self.length = length
        self.batch_size = batch_size
        self.steps_per_epoch = usable // batch_size
        self._seed = seed
        self._repeats = repeats
        step_generator(seed, 0)  # a bad seed is reported here, not from a prefetch thread

    def __getitem__(self, step):
        """Indices of the global batch at `step` (0, 1, ...): int64 (B,). IndexError below 0."""
        if step < 0:
            raise IndexError(f"no training step {step}")
        epoch, place = divmod(int(step), self.steps_per_epoch)
        order = epoch_permutation(self.length, self._seed, epoch)
        row = np.arange(place * self.batch_size, (place + 1) * self.batch_size)
        return order[row // self._repeats]
