"""Combinations of options, and modules of one's own, that really train: a step or two a job."""

from __future__ import annotations

import numpy as np
import pytest
from ml_collections import ConfigDict

import m2mkd_jax
from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import checks
from m2mkd_jax.jobs.pipeline import run
from tests.unit.jobs import combinations
from tests.unit.jobs.combinations import FAMILIES, apply, draw

# The first draws of each family that are accepted without weights from elsewhere.
DRAWS = {"nac": 1, "vmoe": 1, "dense": 1}


def short(config: ConfigDict) -> ConfigDict:
    """The config with a step or two for each job."""
    for recipe in config.recipes.values():
        recipe.epochs, recipe.warmup_epochs = max(1, recipe.accumulate) * 0.1, 0.0
    config.evaluation.every = 0.0
    return config


def test_students_and_a_teacher_of_ones_own(tmp_path):
    config = short(combinations.dense())
    config.phases = ("pt", "mt", "ft", "m2mkd", "e2e", "eval")
    config.teacher.family = "tests.own_teacher:MixerTeacher"
    summary = run(config, tmp_path)
    assert {job["status"] for job in summary["jobs"]} == {"done"}
    model = m2mkd_jax.load(tmp_path)
    assert model(np.zeros((2, 16, 16, 3), np.float32)).shape == (2, 10)
    student = m2mkd_jax.load(tmp_path / "jobs" / "m2mkd" / "1")
    assert student(np.zeros((2, 4, 16), np.float32)).shape == (2, 4, 16)
    meta = m2mkd_jax.load(tmp_path / "jobs" / "pt")
    assert meta(np.zeros((2, 16, 16, 3), np.float32)).shape == (2, 10)


@pytest.mark.parametrize("family", FAMILIES)
def test_drawn_combinations_train(family, tmp_path):
    trained, seed = 0, 0
    while trained < DRAWS[family]:
        config, changes = draw(family, seed)
        seed += 1
        if len(changes) < 3 or any(key.startswith("init.") for key in changes):
            continue
        apply(config, changes, {})
        short(config)
        try:
            checks.validate(config)
            summary = run(config, tmp_path / str(seed))
        except UserError:
            assert not (tmp_path / str(seed)).exists()  # refused before any work
            continue
        trained += 1
        assert {job["status"] for job in summary["jobs"]} == {"done"}, changes
