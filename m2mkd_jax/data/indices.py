"""Which images each training batch contains: pure functions of (seed, step).

Axes: N images, B images of the global batch, K indices of a replica.
"""

import functools

import numpy as np

from m2mkd_jax.errors import UserError

# Added to the seed, so that each use has its own stream of random numbers.
_PERMUTATION, _AUGMENTATION, _SUBSET, _VIEW, _HELD_OUT, _BALANCED = 1, 2, 3, 4, 5, 6
# The published sampler cuts an epoch to a multiple of this.
# Source: docs/reference.md#repeated-augmentation.
_REPEATED_MULTIPLE = 256


def _generator(seed: int, *words: int) -> np.random.Generator:
    if seed < 0:
        raise UserError(f"the data seed is {seed}: use a seed that is 0 or larger")
    return np.random.default_rng((seed, *words))


def step_generator(seed: int, step: int) -> np.random.Generator:
    """The generator of one training step's augmentation, the same in every process and worker.

    Raises:
        UserError: a negative seed.
    """
    return _generator(seed, _AUGMENTATION, step)


def view_generator(seed: int, view: int, index: int) -> np.random.Generator:
    """The generator of the augmentation of one image in one view, in whatever batch it comes.

    Raises:
        UserError: a negative seed.
    """
    return _generator(seed, _VIEW, view, index)


# Around the end of an epoch, steps of two epochs are prefetched together, and a process may run
# several jobs: keep a few permutations (10 MB each for ImageNet).
@functools.lru_cache(maxsize=4)
def epoch_permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the images in one epoch.

    Args:
        length: N.
        seed: 0 or larger.
        epoch: counted from 0.

    Returns:
        A permutation of range(N), int64 (N,), read-only.

    Raises:
        UserError: a negative seed.
    """
    order = _generator(seed, _PERMUTATION, epoch).permutation(length)
    order.setflags(write=False)
    return order


def repeated_augmentation(
    permutation: np.ndarray, replicas: int, rank: int, repeats: int = 3
) -> np.ndarray:
    """One replica's indices of one epoch of repeated augmentation.

    Each index of the permutation is repeated `repeats` times; the resulting list is dealt round
    robin over the replicas, so that the copies of an image go to different replicas, and each
    replica's part is cut to floor(N / 256) * 256 / replicas. With 3 repeats an epoch sees a third
    of the images.

    Args:
        permutation: int (N,), the epoch's order.
        replicas: 1 or more.
        rank: the replica, from 0.
        repeats: copies of each image, 1 or more.

    Returns:
        int (K,), K = floor(floor(N / 256) * 256 / replicas).

    Raises:
        ValueError: a rank, replicas or repeats out of range.

    Source: docs/reference.md#repeated-augmentation.
    """
    if replicas < 1 or not 0 <= rank < replicas or repeats < 1:
        raise ValueError(f"no replica {rank} of {replicas} with {repeats} repeats")
    permutation = np.asarray(permutation)
    length = len(permutation)
    kept = length // _REPEATED_MULTIPLE * _REPEATED_MULTIPLE // replicas
    # The published list is padded to a multiple of the replicas, but the cut removes the padding.
    return permutation[(rank + replicas * np.arange(kept)) // repeats]


def class_balanced_order(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """An order of the images in which every prefix is balanced over the classes.

    Round by round, one shuffled image of each class is taken, the classes of a round in random
    order. In any prefix the counts of two classes differ by at most one while both have images
    left.

    Args:
        labels: int (N,).
        seed: 0 or larger.

    Returns:
        A permutation of range(N), int64 (N,).
    """
    labels = np.asarray(labels)
    shuffled = _generator(seed, _SUBSET).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    counts = np.bincount(labels)
    starts = np.repeat(np.cumsum(counts) - counts, counts)
    rounds = np.arange(len(labels)) - starts
    ties = _generator(seed, _SUBSET, 1).random(len(labels))
    return by_class[np.lexsort((ties, rounds))]


def held_out(labels: np.ndarray, share: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Divides images into those for training and a stratified share that is held out.

    Of a class of n images round(share * n) are held out, at least one and at most n - 1. They are
    the first of a shuffled order of the class, so that those of a smaller share are among those of
    a larger one.

    Args:
        labels: int (N,).
        share: above 0 and below 1.
        seed: 0 or larger.

    Returns:
        Indices for training and indices held out, each int64, ascending.

    Raises:
        UserError: a class of a single image, or a negative seed.
    """
    labels = np.asarray(labels)
    counts = np.bincount(labels)
    if (counts == 1).any():
        raise UserError(
            f"class {int(np.argmax(counts == 1))} has a single image, and data.validation needs one"
            " for training and one for validation: add images, or remove the class"
        )
    shuffled = _generator(seed, _HELD_OUT).permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    place = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)
    wanted = np.minimum(np.maximum(np.rint(share * counts), 1), counts - 1)
    chosen = place < np.repeat(wanted, counts)
    return np.sort(by_class[~chosen]), np.sort(by_class[chosen])


def balanced_epoch(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The order of the images in one epoch in which every class comes equally often.

    The N places of an epoch are shared by the K classes that have images; the N mod K that are left
    over go to classes drawn anew in each epoch. A class with fewer images than places repeats them,
    every image once before any comes again; of one with more, other images are drawn in each epoch.

    Args:
        labels: int (N,).
        seed: 0 or larger.
        epoch: counted from 0.

    Returns:
        int64 (N,), numbers of images.

    Raises:
        UserError: a negative seed.
    """
    generator = _generator(seed, _BALANCED, epoch)
    present, length = np.unique(labels), len(labels)
    places = np.full(len(present), length // len(present))
    places[generator.permutation(len(present))[: length % len(present)]] += 1
    order = []
    for label, count in zip(present, places, strict=True):
        own = np.flatnonzero(labels == label)
        rounds = -(-count // len(own))
        drawn = np.concatenate([generator.permutation(own) for _ in range(max(rounds, 1))])
        order.append(drawn[:count])
    return generator.permutation(np.concatenate(order))


def balanced_weights(labels: np.ndarray, classes: int) -> tuple[float, ...]:
    """Weights N / (K n) of K classes of n images each, of N images; 0 for a class without images.

    K counts the classes that have images, so that the weights of all images have the mean 1.

    Args:
        labels: int (N,).
        classes: of the data set.
    """
    counts = np.bincount(labels, minlength=classes)
    present = counts > 0
    weights = np.where(present, len(labels) / (present.sum() * np.maximum(counts, 1)), 0.0)
    return tuple(float(weight) for weight in weights)


class BatchIndices:
    """The image indices of the global batch at any training step, from (seed, step) alone.

    Each epoch is a new permutation, cut to full batches. With repeats > 1 each index comes
    `repeats` times and the epoch is cut to floor(N / 256) * 256 of them: batch t is what R replicas
    of `repeated_augmentation` see together at step t, for any R that divides the batch. With labels
    an epoch has every class equally often (`balanced_epoch`).

    Attributes:
        length: N.
        batch_size: B.
        steps_per_epoch: full batches of an epoch.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int,
        repeats: int = 1,
        labels: np.ndarray | None = None,
    ) -> None:
        """Checks that an epoch has a full batch.

        Args:
            length: N.
            batch_size: B, of the global batch.
            seed: 0 or larger.
            repeats: copies of each image, 1 or more.
            labels: int (N,), to have every class equally often; None: every image once an epoch.

        Raises:
            UserError: an epoch without a full batch, or a negative seed.
        """
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
        self._labels = labels
        self._orders: dict[int, np.ndarray] = {}
        step_generator(seed, 0)  # a bad seed is reported here, not from a prefetch thread

    def __getitem__(self, step: int) -> np.ndarray:
        """The indices of the global batch at `step` (0, 1, ...): int64 (B,)."""
        if step < 0:
            raise IndexError(f"no training step {step}")
        epoch, place = self.epoch(step), int(step) % self.steps_per_epoch
        order = self._order(epoch)
        row = np.arange(place * self.batch_size, (place + 1) * self.batch_size)
        return order[row // self._repeats]

    def _order(self, epoch: int) -> np.ndarray:
        """The images of an epoch in their order: int64 (N,)."""
        if self._labels is None:
            return epoch_permutation(self.length, self._seed, epoch)
        order = self._orders.get(epoch)
        if order is None:
            order = balanced_epoch(self._labels, self._seed, epoch)
            # As many as `epoch_permutation` keeps; a new dict, because threads read the old one.
            kept = list(self._orders.items())[-3:]
            self._orders = dict([*kept, (epoch, order)])
        return order

    def epoch(self, step: int) -> int:
        """The epoch, from 0, that a step (0, 1, ...) lies in."""
        return int(step) // self.steps_per_epoch
