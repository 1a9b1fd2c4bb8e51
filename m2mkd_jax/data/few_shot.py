"""Draws the images of few-shot tasks.

Axes: N images of a split, S support images (k_way * n_shot), Q query images.

Source: arXiv 2402.16918, section 4; docs/reference.md#few-shot.
"""

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from m2mkd_jax.data.image_source import ImageSource
from m2mkd_jax.errors import UserError

SELECTIONS = ("disjoint", "published")


@dataclasses.dataclass(frozen=True)
class FewShotTask:
    """A k-way task: indices into the splits it was drawn from, and labels 0..k-1.

    Labels follow the ascending order of the classes: the smallest drawn class is label 0.

    Attributes:
        classes: int64 (k,), the drawn classes in draw order.
        support_indices: int64 (S,).
        support_labels: int32 (S,).
        query_indices: int64 (Q,).
        query_labels: int32 (Q,).
    """

    classes: np.ndarray
    support_indices: np.ndarray
    support_labels: np.ndarray
    query_indices: np.ndarray
    query_labels: np.ndarray


def published_selection(
    targets: np.ndarray,
    k_way: int,
    n_shot: int,
    val_samples: int,
    seed: int,
    classes: int | None = None,
) -> FewShotTask:
    """The published CIFAR-100 and CUB few-shot selection, number for number.

    Both sets are drawn from one split with one seed, so every support image is also a query image
    and the accuracy is partly measured on training images. For comparison with published numbers;
    `disjoint_selection` is the default.

    Args:
        targets: int (N,), labels of the split.
        k_way: classes of the task.
        n_shot: support images per class.
        val_samples: query images per class; all of a class that has fewer.
        seed: 1 or larger. The original does not seed its generators for seed 0.
        classes: how many classes to draw from (100, CUB 200); default max(targets) + 1.

    Returns:
        The task; both sets index `targets`.

    Raises:
        UserError: a seed below 1, more ways than classes, or fewer images than shots.

    Source: docs/reference.md#few-shot.
    """
    if seed < 1:
        raise UserError(
            f"the published few-shot selection has no seed {seed} (it leaves seed 0 unseeded):"
            " use 1 or larger, or the disjoint selection"
        )
    targets = np.asarray(targets)
    classes = int(targets.max()) + 1 if classes is None else classes
    _check_numbers(k_way, classes, n_shot, val_samples)
    # As published: classes by Python's generator, images by numpy's legacy one. Both are local, so
    # the global generators are unaffected.
    drawn = np.array(random.Random(seed).sample(range(classes), k_way))
    _check_enough("train", targets, drawn, n_shot)
    support, support_labels = _draw(targets, drawn, n_shot, np.random.RandomState(seed))
    query, query_labels = _draw(targets, drawn, val_samples, np.random.RandomState(seed))
    return FewShotTask(drawn, support, support_labels, query, query_labels)


def disjoint_selection(
    train_targets: np.ndarray,
    test_targets: np.ndarray,
    k_way: int,
    n_shot: int,
    query_samples: int,
    seed: int,
) -> FewShotTask:
    """A few-shot task with support images from train and query images from test.

    Args:
        train_targets: int (N,), labels of the training split.
        test_targets: int, labels of the test split.
        k_way: classes of the task.
        n_shot: support images per class.
        query_samples: query images per class (3 * n_shot in the paper's protocol).
        seed: 0 or larger; the same seed gives the same task.

    Returns:
        The task; support indices are into train, query indices into test.

    Raises:
        UserError: a negative seed, more ways than classes, or too few images of a class.
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


def draw_tasks(
    train: ImageSource, test: ImageSource, config: Any
) -> Iterator[tuple[ImageSource, ImageSource]]:
    """Draws the episodes of a few-shot run; each depends on its own seed alone.

    Args:
        train: the training split.
        test: the test split.
        config: fields ways, shots, episodes, selection ('disjoint' or 'published') and seed;
            episode e has the seed `seed + e`. There are 3 * shots query images per class.

    Yields:
        (support, query): their labels are 0..ways-1, their class names those of the drawn classes.

    Raises:
        UserError: an unknown selection, or what the selection functions refuse.
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


def _check_numbers(k_way: int, classes: int, *counts: int) -> None:
    if not 1 <= k_way <= classes:
        raise UserError(f"few-shot with {k_way} ways of {classes} classes: use 1 to {classes}")
    if min(counts) < 1:
        raise UserError(
            f"few-shot with {counts[0]} shots and {counts[1]} queries per class: use 1 or more"
        )


def _check_enough(split: str, targets: np.ndarray, drawn: np.ndarray, wanted: int) -> None:
    for cls in drawn:
        found = int((targets == cls).sum())
        if found < wanted:
            raise UserError(
                f"few-shot needs {wanted} {split} images of class {cls} and there are"
                f" {found}: lower the number of shots or queries"
            )


def _draw(
    targets: np.ndarray,
    drawn: np.ndarray,
    count: int,
    rng: np.random.Generator | np.random.RandomState,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices and labels of `count` images of each drawn class, shuffled together."""
    per_class = [rng.permutation(np.flatnonzero(targets == cls))[:count] for cls in drawn]
    chosen = rng.permutation(np.concatenate(per_class))
    return chosen, np.searchsorted(np.sort(drawn), targets[chosen]).astype(np.int32)
