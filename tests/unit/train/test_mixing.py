"""Mixup and cutmix: distributions of the draws, and what a batch looks like after them."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from m2mkd_jax.train.mixing import cut_box, draw, mix, smooth_one_hot

DRAWS = 4000
SHAPE = (8, 32, 24, 3)


def recipe(**changes):
    fields = dict(mixup=0.8, cutmix=1.0, switch_prob=0.5, mix_prob=1.0, smoothing=0.1)
    return SimpleNamespace(**{**fields, **changes})


def draws(r):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    return [np.asarray(x) for x in jax.jit(jax.vmap(lambda k: draw(k, r, SHAPE)))(keys)]


def near(value, expected, deviation):
    assert abs(value - expected) < 5 * deviation / np.sqrt(DRAWS), (value, expected)


def test_default_draws():
    lam, use_cutmix, box = draws(recipe())
    near(use_cutmix.mean(), 0.5, 0.5)
    mixup = lam[~use_cutmix]
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2a + 1)).
    near(mixup.mean(), 0.5, np.sqrt(2))
    assert abs(mixup.var() - 1 / (4 * 2.6)) < 0.01
    assert ((lam >= 0) & (lam <= 1)).all()
    yl, yh, xl, xh = box[use_cutmix].T
    assert (yl >= 0).all() and (yl <= yh).all() and (yh <= 32).all()
    assert (xl >= 0).all() and (xl <= xh).all() and (xh <= 24).all()
    np.testing.assert_allclose(lam[use_cutmix], 1 - (yh - yl) * (xh - xl) / (32 * 24), rtol=1e-6)
    # The centre is uniform over the image, so boxes are cut off on both sides alike.
    assert (yl == 0).any() and (yh == 32).any() and (xl == 0).any() and (xh == 24).any()
    near((yl + yh).mean() / 2, 16, 10 * np.sqrt(2))
    near((xl + xh).mean() / 2, 12, 8 * np.sqrt(2))


def test_cutmix_keeps_its_beta_away_from_borders():
    # Before clipping the box's share of the image is 1 - lam, up to rounding both sides of 1024 to
    # even pixels, 2 * 2 / 1024.
    lam = jnp.linspace(0.0, 1.0, 21)
    boxes = jax.vmap(lambda x: cut_box(x, jnp.asarray([512, 512]), (1024, 1024, 3)))(lam)
    share = (boxes[:, 1] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 2]) / 1024**2
    np.testing.assert_allclose(share, 1 - lam, atol=5e-3)


@pytest.mark.parametrize(
    "changes, cutmix_share",
    [({"mixup": 0.0}, 1.0), ({"cutmix": 0.0}, 0.0), ({"switch_prob": 0.2}, 0.2)],
)
def test_one_kind_only(changes, cutmix_share):
    lam, use_cutmix, _ = draws(recipe(**changes))
    near(use_cutmix.mean(), cutmix_share, 0.5 * (0 < cutmix_share < 1) + 1e-9)
    assert (lam < 1).mean() > 0.9


def test_each_kind_is_drawn_as_it_would_be_alone():
    lam, use_cutmix, box = draws(recipe(cutmix=0.3))
    of_mixup, _, _ = draws(recipe(cutmix=0.0))
    of_cutmix, _, boxes = draws(recipe(mixup=0.0, cutmix=0.3))
    alone = np.where(use_cutmix, of_cutmix, of_mixup)
    # The last digit of lam may move a border by a pixel.
    assert np.isclose(lam, alone, atol=1e-6).mean() > 0.99
    assert np.equal(box, boxes)[use_cutmix].mean() > 0.99


def test_mix_prob():
    lam, use_cutmix, _ = draws(recipe(mix_prob=0.25))
    near(((lam < 1) | use_cutmix).mean(), 0.25, 0.45)
    assert (lam[~use_cutmix] == 1).mean() == pytest.approx(0.75 / 0.875, abs=0.03)


def test_smooth_one_hot():
    targets = smooth_one_hot(jnp.asarray([1, 0]), 4, 0.2)
    expected = [[0.05, 0.85, 0.05, 0.05], [0.85, 0.05, 0.05, 0.05]]
    np.testing.assert_allclose(targets, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_targets_follow_the_pixels(seed, dtype):
    # Image i is all i: the mean of a mixed image tells how much of each partner is in it.
    images = jnp.broadcast_to(jnp.arange(8.0)[:, None, None, None], SHAPE).astype(dtype)
    step = jax.jit(lambda key: mix(key, images, jnp.arange(8), 8, recipe(smoothing=0.0)))
    mixed, targets = step(jax.random.key(seed))
    assert mixed.dtype == dtype and mixed.shape == SHAPE
    assert targets.dtype == jnp.float32
    np.testing.assert_allclose(targets.sum(-1), 1.0, rtol=1e-6)
    told = targets @ jnp.arange(8.0)
    atol = 1e-5 if dtype == jnp.float32 else 5e-2
    np.testing.assert_allclose(mixed.astype(jnp.float32).mean((1, 2, 3)), told, atol=atol)
    assert not np.allclose(told, np.arange(8.0))


def test_both_off_smooths_only():
    images = jax.random.normal(jax.random.key(0), SHAPE)
    r = recipe(mixup=0.0, cutmix=0.0)
    mixed, targets = mix(jax.random.key(1), images, jnp.arange(8), 8, r)
    np.testing.assert_array_equal(mixed, images)
    np.testing.assert_array_equal(targets, smooth_one_hot(jnp.arange(8), 8, 0.1))
    lam, use_cutmix, _ = draw(jax.random.key(1), r, SHAPE)
    assert lam == 1 and not use_cutmix
