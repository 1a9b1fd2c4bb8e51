"""Balance losses against closed forms."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.errors import UserError
from m2mkd_jax.jobs import checks
from m2mkd_jax.losses import balance
from tests.e2e import tiny_vmoe


def cdf(x: float) -> float:
    return 0.5 * (1.0 + math.erf(x / math.sqrt(2.0)))


def test_importance_at_its_ends():
    even = jnp.full((2, 5, 4), 0.25)
    assert balance.importance_loss(even) == 0.0
    one = jnp.zeros((6, 4)).at[:, 2].set(1.0)
    # Shares 0, 0, 1, 0: mean 1/4, variance 3/16, ratio 3 = E - 1.
    assert balance.importance_loss(one) == pytest.approx(3.0, rel=1e-6)
    # Shares 3/8, 1/8, 2/8, 2/8: variance (1/64 + 1/64) / 4 = 1/128, over 1/16: 1/8.
    mixed = jnp.asarray([[0.5, 0.0, 0.25, 0.25], [0.25, 0.25, 0.25, 0.25]])
    assert balance.importance_loss(mixed) == pytest.approx(1 / 8, rel=1e-6)


def test_load_counts_chances_under_fresh_noise():
    logits = jnp.asarray([[[1.0, 0.0, 0.5]], [[0.2, 0.3, -1.0]]])
    threshold = jnp.asarray([[[0.6]], [[0.25]]])
    chance = [
        [cdf((logit - t) / 0.5) for logit in row]
        for row, t in (((1.0, 0.0, 0.5), 0.6), ((0.2, 0.3, -1.0), 0.25))
    ]
    load = np.mean(chance, axis=0)
    expected = load.var() / load.mean() ** 2
    assert balance.load_loss(logits, threshold, 0.5) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("loss", ["importance", "load"])
def test_going_downhill_evens_out(loss):
    """Every token prefers expert 0; along the negative gradient this preference shrinks."""
    draw = np.random.default_rng(0)
    logits = jnp.asarray(draw.normal(size=(64, 4)) + np.array([1.0, 0, 0, 0]), jnp.float32)

    def value(bias):
        shifted = logits + bias[None]
        if loss == "importance":
            return balance.importance_loss(jax.nn.softmax(shifted))
        # The threshold stands: the second largest of each token's logits.
        return balance.load_loss(shifted, jnp.sort(logits)[:, -2:-1], 0.25)

    before, slope = jax.value_and_grad(value)(jnp.zeros(4))
    assert slope[0] > 0 and slope[0] == slope.max()
    assert value(-0.1 * slope) < before


@pytest.mark.parametrize("changes", [{"router": "published"}, {"router": "vmoe", "noise": 0.0}])
def test_a_load_loss_that_would_always_be_zero_is_refused(changes):
    config = tiny_vmoe.get_config()
    checks.check_config(config)
    config.vmoe.update(changes)
    with pytest.raises(UserError, match=r"config.recipes.m2mkd.load_weight is 0.01; .* 0 without"):
        checks.check_config(config)
    for recipe in config.recipes.values():
        recipe.load_weight = 0.0
    checks.check_config(config)


def test_a_module_of_its_own_may_not_have_one_either():
    config = tiny_vmoe.get_config()
    config.vmoe.router = "published"
    for recipe in config.recipes.values():
        recipe.load_weight = 0.0
    config.recipes.m2mkd.modules = {"1": {"load_weight": 0.5}}
    with pytest.raises(UserError, match=r"config.recipes.m2mkd.load_weight is 0.5; .* 0 without"):
        checks.check_config(config)
