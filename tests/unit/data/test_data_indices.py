"""Batch indices: every image once per epoch, repeats, nested subsets; few-shot tasks."""

from types import SimpleNamespace

import numpy as np
import pytest

from m2mkd_jax.data.array_source import ArrayImageSource
from m2mkd_jax.data.few_shot import disjoint_selection, draw_tasks
from m2mkd_jax.data.indices import (
    BatchIndices,
    class_balanced_order,
    epoch_permutation,
    repeated_augmentation,
)
from m2mkd_jax.errors import UserError


def test_an_epoch_is_a_permutation_of_its_own():
    first, second = epoch_permutation(100, 3, 0), epoch_permutation(100, 3, 1)
    assert sorted(first) == sorted(second) == list(range(100))
    assert (first != second).any()
    assert (first != epoch_permutation(100, 4, 0)).any()


def test_batches_of_an_epoch_are_disjoint_and_drop_the_rest():
    indices = BatchIndices(103, 10, seed=0)
    assert indices.steps_per_epoch == 10
    for epoch in (0, 1, 7):
        seen = np.concatenate([indices[epoch * 10 + step] for step in range(10)])
        assert len(np.unique(seen)) == 100
    assert (indices[0] != indices[10]).any()


def test_a_step_does_not_depend_on_what_was_asked_before():
    late = BatchIndices(50, 8, seed=5)
    expected = [late[step].copy() for step in range(20)]
    fresh = BatchIndices(50, 8, seed=5)
    for step in (17, 3, 11):
        np.testing.assert_array_equal(fresh[step], expected[step])


@pytest.mark.parametrize("replicas", [1, 2, 4, 8])
def test_repeated_batches_are_what_the_replicas_see_together(replicas):
    indices = BatchIndices(600, 64, seed=2, repeats=3)
    assert indices.steps_per_epoch == 512 // 64
    local = 64 // replicas
    hands = [
        repeated_augmentation(epoch_permutation(600, 2, 1), replicas, rank)
        for rank in range(replicas)
    ]
    for step in range(8):
        together = np.concatenate([hand[step * local : (step + 1) * local] for hand in hands])
        np.testing.assert_array_equal(np.sort(indices[8 + step]), np.sort(together))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((31, 32, 0), "a batch of 32 does not fit into 31"),
        ((255, 32, 0, 3), "repeated_augmentation=1"),
        ((64, 32, -1), "seed is -1"),
        ((64, 0, 0), "batch size 0"),
    ],
)
def test_wrong_numbers_are_user_errors_of_one_line(arguments, words):
    with pytest.raises(UserError) as error:
        BatchIndices(*arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_prefixes_of_the_balanced_order_are_balanced():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(7), [9, 9, 9, 9, 9, 9, 4]))
    order = class_balanced_order(labels)
    assert sorted(order) == list(range(len(labels)))
    for size in range(1, len(labels) + 1):
        counts = np.bincount(labels[order[:size]], minlength=7)
        # The class of 4 images runs out; the others stay within one of each other.
        assert counts[:6].max() - counts[:6].min() <= 1
        assert counts[6] >= min(4, counts[:6].min())


def test_queries_of_a_task_come_from_the_test_split():
    rng = np.random.default_rng(1)
    train, test = rng.permutation(np.arange(400) % 20), rng.permutation(np.arange(200) % 20)
    state = np.random.get_state()[1].copy()
    task = disjoint_selection(train, test, k_way=5, n_shot=2, query_samples=6, seed=0)

    ascending = np.sort(task.classes)
    assert len(task.support_indices) == 10 and len(task.query_indices) == 30
    for indices, labels, targets, per_class in (
        (task.support_indices, task.support_labels, train, 2),
        (task.query_indices, task.query_labels, test, 6),
    ):
        assert len(np.unique(indices)) == len(indices)
        np.testing.assert_array_equal(ascending[labels], targets[indices])
        assert (np.bincount(labels) == per_class).all()
    again = disjoint_selection(train, test, 5, 2, 6, seed=0)
    np.testing.assert_array_equal(task.query_indices, again.query_indices)
    other = disjoint_selection(train, test, 5, 2, 6, seed=1)
    assert (task.support_indices != other.support_indices).any()
    np.testing.assert_array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize(
    ("numbers", "words"),
    [((21, 1, 1), "21 ways of 20"), ((5, 21, 1), "21 train images"), ((5, 1, 11), "11 test")],
)
def test_a_task_that_cannot_be_drawn_is_a_user_error(numbers, words):
    with pytest.raises(UserError, match=words):
        disjoint_selection(np.arange(400) % 20, np.arange(200) % 20, *numbers, seed=0)


def splits():
    """Two splits of ten classes, every image told by its first pixel."""
    rng, sources = np.random.default_rng(0), []
    for count, first in ((120, 0), (100, 120)):
        labels = rng.permutation(np.arange(count) % 10)
        images = np.zeros((count, 4, 4, 3), np.uint8)
        images[:, 0, 0, 0] = first + np.arange(count)
        sources.append(ArrayImageSource(images, labels, [f"class {i}" for i in range(10)]))
    return sources


def few_shot(**fields):
    numbers = dict(ways=4, shots=3, episodes=5, selection="disjoint", seed=1)
    return SimpleNamespace(**{**numbers, **fields})


def test_episodes_draw_from_both_splits_and_name_their_classes():
    train, test = splits()
    episodes = list(draw_tasks(train, test, few_shot()))
    assert len(episodes) == 5
    for support, query in episodes:
        assert (np.bincount(support.labels) == 3).all() and (np.bincount(query.labels) == 9).all()
        for part, whole in ((support, train), (query, test)):
            for image, label in zip(part.images, part.labels, strict=True):
                place = int(image[0, 0, 0]) - (0 if whole is train else 120)
                original = whole.class_names[whole.labels[place]]
                assert part.class_names[label] == original
    pictures = {support.images.tobytes() for support, _ in episodes}
    assert len(pictures) == 5
    # Episode e does not depend on how many there are, nor on those before it.
    later = next(draw_tasks(train, test, few_shot(seed=3, episodes=1)))
    np.testing.assert_array_equal(later[0].images, episodes[2][0].images)


def test_published_episodes_ask_what_was_trained_on():
    train, test = splits()
    config = few_shot(selection="published", episodes=2)
    for support, query in draw_tasks(train, test, config):
        asked = set(query.images[:, 0, 0, 0].tolist())
        assert set(support.images[:, 0, 0, 0].tolist()) <= asked and max(asked) < 120


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"selection": "other"}, "use one of disjoint, published"),
        ({"episodes": 0}, "0 episodes"),
        ({"ways": 11}, "11 ways of 10"),
        ({"selection": "published", "seed": 0}, "no seed 0"),
        ({"selection": "published", "shots": 13}, "needs 13 train images of class"),
        ({"shots": 0}, "0 shots"),
        ({"shots": -1, "selection": "published"}, "-1 shots"),
    ],
)
def test_episodes_that_cannot_be_drawn_are_user_errors(fields, words):
    with pytest.raises(UserError, match=words):
        list(draw_tasks(*splits(), few_shot(**fields)))
