"""Learning rate schedules."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from m2mkd_jax.config.defaults import scaled_lr
from m2mkd_jax.errors import UserError
from m2mkd_jax.train.schedule import learning_rate


def recipe(**changes):
    fields = dict(
        lr=1e-3, min_lr=1e-5, warmup_lr=1e-6, epochs=10, warmup_epochs=2, schedule="clean"
    )
    return SimpleNamespace(**{**fields, **changes})


def test_clean_is_continuous_and_ends_at_min_lr():
    steps = 50
    rates = np.asarray(learning_rate(recipe(), steps)(jnp.arange(10 * steps + 100)))
    assert rates.dtype == np.float32
    np.testing.assert_allclose(rates[[0, 50, 100]], [1e-6, (1e-3 + 1e-6) / 2, 1e-3], rtol=1e-5)
    assert (np.diff(rates[: 2 * steps + 1]) > 0).all()
    assert (np.diff(rates[2 * steps : 10 * steps + 1]) < 0).all()
    # No jump: no step is longer than the warmup's, which is the steepest part.
    assert np.abs(np.diff(rates)).max() < 1.01e-3 / (2 * steps)
    halfway = 6 * steps
    np.testing.assert_allclose(rates[halfway], (1e-3 + 1e-5) / 2, rtol=1e-5)
    np.testing.assert_allclose(rates[10 * steps :], 1e-5, rtol=1e-5)


def test_clean_is_exact_in_float32_far_out():
    # 400 epochs of 100,000 steps: step numbers beyond 2^24, where float32 skips integers.
    r = recipe(epochs=400, warmup_epochs=25)
    step = 399 * 100_000 + 1
    progress = (step / 100_000 - 25) / 375
    expected = 1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + np.cos(np.pi * progress))
    np.testing.assert_allclose(jax.jit(learning_rate(r, 100_000))(step), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("schedule", "quarter", "end"),
    [("cosine", 0.8535534, 1e-5), ("linear", 0.75, 1e-5), ("constant", 1.0, 1e-3)],
)
def test_named_schedules_warm_up_and_fall(schedule, quarter, end):
    rates = np.asarray(learning_rate(recipe(schedule=schedule), 50)(jnp.arange(600)))
    expected = [1e-6, (1e-3 + 1e-6) / 2, 1e-3, 1e-5 + quarter * (1e-3 - 1e-5), end, end]
    np.testing.assert_allclose(rates[[0, 50, 100, 200, 500, 599]], expected, rtol=1e-5)


def test_one_cycle_is_optaxs():
    with jax.numpy_dtype_promotion("standard"):
        cycle = optax.cosine_onecycle_schedule(100, 1e-3, 0.3, 1e3, 0.1)
        expected = jax.vmap(cycle)(jnp.arange(101.0))
    given = recipe(schedule="one_cycle", epochs=10, warmup_epochs=3, min_lr=1e-5)
    found = learning_rate(given, 10)(jnp.arange(101))
    np.testing.assert_allclose(found, expected, rtol=2e-5)
    with pytest.raises(UserError, match="warmup_epochs"):
        learning_rate(recipe(schedule="one_cycle", warmup_epochs=0), 10)


def test_without_warmup():
    np.testing.assert_allclose(learning_rate(recipe(warmup_epochs=0), 5)(0), 1e-3, rtol=1e-6)


@pytest.mark.parametrize("schedule, epochs", [("published", [0, 0, 1, 2]), ("published_nac", None)])
def test_published_is_a_staircase(schedule, epochs):
    rate = learning_rate(recipe(schedule=schedule), 4)
    slope = (1e-3 - 1e-6) / 2
    cosine = 1e-5 + 0.5 * (1e-3 - 1e-5) * (1 + np.cos(np.pi * np.array([2, 3]) / 10))
    f = np.array([1e-6, 1e-6 + slope, *cosine])
    expected = f[epochs or [0, 1, 2, 3]]
    np.testing.assert_allclose(rate(jnp.arange(16)), np.repeat(expected, 4), rtol=1e-6)
    # After the end the last rate stays.
    assert rate(10_000) == rate(39)


def test_scaled_lr():
    assert scaled_lr(5e-4, 2048) == pytest.approx(2e-3)
    assert scaled_lr(1e-3, 64, per=256) == pytest.approx(2.5e-4)


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"schedule": "cosin"}, "'cosin' is unknown"),
        ({"warmup_epochs": 20}, r"warmup_epochs \(20\) must lie between 0 and epochs \(10\)"),
        ({"epochs": 0}, "at least one step"),
    ],
)
def test_mistakes(changes, says):
    with pytest.raises(UserError, match=says) as error:
        learning_rate(recipe(**changes), 5)
    assert "\n" not in str(error.value)
