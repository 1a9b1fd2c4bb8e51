"""Samplers against what the published code returned (tests/fixtures/l_samplers)."""

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from m2mkd_jax.data.few_shot import published_selection
from m2mkd_jax.data.indices import repeated_augmentation
from m2mkd_jax.errors import UserError

FIXTURES = Path(__file__).parents[1] / "fixtures" / "l_samplers"
REPEATED = json.loads((FIXTURES / "meta.json").read_text())
FEW_SHOT = json.loads((FIXTURES / "cifar_fs.json").read_text())
TASKS = sorted(name for name in FEW_SHOT if name != "semantics")


@pytest.mark.parametrize(
    "case", REPEATED, ids=lambda c: f"len{c['len']}_rep{c['replicas']}_rank{c['rank']}"
)
def test_repeated_augmentation_gives_the_published_indices(case):
    arrays = np.load(FIXTURES / "rasampler.npz")
    length, replicas, rank = case["len"], case["replicas"], case["rank"]
    name = f"len{length}_rep{replicas}_rank{rank}_epoch{case['epoch']}"
    permutation = arrays[f"permutation_len{length}_epoch{case['epoch']}"]

    shuffled = repeated_augmentation(permutation, replicas, rank)
    in_order = repeated_augmentation(np.arange(length), replicas, rank)

    np.testing.assert_array_equal(shuffled, arrays[name])
    np.testing.assert_array_equal(in_order, arrays[name + ".noshuffle"])
    assert len(shuffled) == case["returned"]


@pytest.mark.parametrize("name", TASKS)
def test_published_few_shot_selection(name):
    arrays = np.load(FIXTURES / "cifar_fs.npz")
    seed, k_way, n_shot, val = map(
        int, re.fullmatch(r"seed(\d+)_k(\d+)_n(\d+)_v(\d+)", name).groups()
    )
    before = random.getstate(), np.random.get_state()[1].copy()

    task = published_selection(arrays["targets"], k_way, n_shot, val, seed, classes=100)

    np.testing.assert_array_equal(task.classes, arrays[f"{name}.chosen_in_draw_order"])
    np.testing.assert_array_equal(task.support_indices, arrays[f"{name}.train_idx"])
    np.testing.assert_array_equal(task.support_labels, arrays[f"{name}.train_label"])
    np.testing.assert_array_equal(task.query_indices, arrays[f"{name}.val_idx"])
    np.testing.assert_array_equal(task.query_labels, arrays[f"{name}.val_label"])
    # The fault that the option is named for: every support image is a query image too.
    shared = np.isin(task.support_indices, task.query_indices).sum()
    assert shared == FEW_SHOT[name]["train_images_also_in_val"] == k_way * n_shot
    # The published code seeds the global generators; ours leaves them alone.
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])


def test_published_selection_refuses_the_unseeded_seed():
    with pytest.raises(UserError, match="seed 0"):
        published_selection(np.arange(10), 2, 1, 3, seed=0)
