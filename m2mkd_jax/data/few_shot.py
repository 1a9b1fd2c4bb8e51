"""Which images make a few-shot task (reference section 7, paper section 4 of arXiv 2402.16918).

Axes: N images of a split, S support images (k_way * n_shot), Q query images.
"""

import dataclasses
import random

import numpy as np

from m2mkd_jax.errors import UserError

SELECTIONS = ("disjoint", "published")


@dataclasses.dataclass(frozen=True)
class FewShotTask:
    """A k-way task: indices into the splits it was drawn from, and labels 0..k-1.

    classes: int64 (k,), the drawn classes in draw order. Labels follow the ASCENDING order of
    the classes: the smallest drawn class is label 0.
    support_indices, support_labels: int64 and int32 (S,).
    query_indices, query_labels: int64 and int32 (Q,).
    """

    classes: np.ndarray
    support_indices: np.ndarray
    support_labels: np.ndarray
    query_indices: np.ndarray
    query_labels: np.ndarray


def published_selection(targets, k_way, n_shot, val_samples, seed, classes=None):
    """The published CIFAR-100 and CUB few-shot selection, number for number.

    Both sets come from ONE split with one seed, so every support image is also a query image:
    the measured accuracy is partly accuracy on the training images. Here for comparison with
    published numbers; `disjoint_selection` is the default.

    Args:
      targets: int (N,), labels of the split.
      k_way, n_shot, val_samples: classes, support and query images per class.
      seed: 1 or larger. The original leaves seed 0 unseeded, and then its two sets even have
        different classes; there is nothing to reproduce.
      classes: how many classes to draw from (100, CUB 200); default max(targets) + 1.
    Returns: FewShotTask, both sets indexing `targets`. A class with too few query images gives all.
    Raises: UserError for a seed below 1, more ways than classes, or fewer images than shots.
    """
    if seed < 1:
        raise UserError(
            f"the published few-shot selection has no seed {seed} (it leaves seed 0 unseeded):"
            " use 1 or larger, or the disjoint selection"
        )
    targets = np.asarray(targets)
    classes = int(targets.max()) + 1 if classes is None else classes
    _check_numbers(k_way, classes, n_shot, val_samples)
    # Python's own generator draws the classes and numpy's legacy one the images, as published;
    # both are local, so nobody else's random numbers change.
    drawn = np.array(random.Random(seed).sample(range(classes), k_way))
    _check_enough("train", targets, drawn, n_shot)
    support, support_labels = _draw(targets, drawn, n_shot, np.random.RandomState(seed))
    query, query_labels = _draw(targets, drawn, val_samples, np.random.RandomState(seed))
    return FewShotTask(drawn, support, support_labels, query, query_labels)


def disjoint_selection(train_targets, test_targets, k_way, n_shot, query_samples, seed):
    """A few-shot task whose queries were never trained on: support from train, queries from test.

    Args:
      train_targets, test_targets: int (N,), labels of the two splits.
      k_way, n_shot, query_samples: classes, support and query images per class (the paper's
        protocol has query_samples = 3 * n_shot).
      seed: 0 or larger; the same seed gives the same task.
    Returns: FewShotTask; support indices are into train, query indices into test.
    Raises: UserError for a negative seed, more ways than classes, or too few images of a class.
    """
    if seed < 0:
        raise UserError(f"the few-shot seed is {seed}: use a seed that is 0 or larger")
    train_targets, test_targets = np.asarray(train_targets), np.asarray(test_targets)
    present = np.unique(train_targets)
    _check_numbers(k_way, len(present), n_shot, query_samples)
    rng = np.random.default_rng(seed)
    drawn = rng.choice(present, size=k_way, replace=False).astype(np.int64)
    _check_enough("train", train_targets, drawn, n_shot)
    _check_enough("test", test_targets, drawn, query_samples)
    support, support_labels = _draw(train_targets, drawn, n_shot, rng)
    query, query_labels = _draw(test_targets, drawn, query_samples, rng)
    return FewShotTask(drawn, support, support_labels, query, query_labels)


def draw_tasks(train, test, config):
    """The episodes of a few-shot run, one after the other; episode e depends on (seed, e) alone.

    Args:
      train, test: sources (see sources.py) of the two splits.
      config: fields ways, shots, episodes, selection ('disjoint' or 'published') and seed; episode
        e has seed + e. Queries are 3 * shots images per class, as published.
    Yields: (support, query), sources whose labels are 0..ways-1 and whose class names are those of
      the drawn classes, in that order.
    Raises: UserError for what `disjoint_selection` and `published_selection` refuse, and for
      another selection.
    """
    if config.selection not in SELECTIONS:
        raise UserError(
            f"the few-shot selection is {config.selection!r}: use one of {', '.join(SELECTIONS)}"
        )
    if config.episodes < 1:
        raise UserError(f"few-shot with {config.episodes} episodes: use 1 or more")
    targets, queries = np.asarray(train.labels), 3 * config.shots
    for seed in range(config.seed, config.seed + config.episodes):
        if config.selection == "published":
            pool = train
            task = published_selection(
                targets, config.ways, config.shots, queries, seed, len(train.class_names)
            )
        else:
            pool = test
            task = disjoint_selection(
                targets, np.asarray(test.labels), config.ways, config.shots, queries, seed
            )
        names = tuple(train.class_names[label] for label in np.sort(task.classes))
        yield (
            train.select(task.support_indices, task.support_labels, names),
            pool.select(task.query_indices, task.query_labels, names),
        )


def _check_numbers(k_way, classes, *counts):
    if not 1 <= k_way <= classes:
        raise UserError(f"few-shot with {k_way} ways of {classes} classes: use 1 to {classes}")
    if min(counts) < 1:
        raise UserError(
            f"few-shot with {counts[0]} shots and {counts[1]} queries per class: use 1 or more"
        )


def _check_enough(split, targets, drawn, wanted):
    for cls in drawn:
        found = int((targets == cls).sum())
        if found < wanted:
            raise UserError(
                f"few-shot needs {wanted} {split} images of class {cls} and there are"
                f" {found}: lower the number of shots or queries"
            )


def _draw(targets, drawn, count, rng):
    """`count` images of each drawn class, in draw order, then shuffled together."""
    per_class = [rng.permutation(np.flatnonzero(targets == cls))[:count] for cls in drawn]
    chosen = rng.permutation(np.concatenate(per_class))
    return chosen, np.searchsorted(np.sort(drawn), targets[chosen]).astype(np.int32)
