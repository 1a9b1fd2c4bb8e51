"""Random erasing: boxes against closed forms, and what stands in them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from m2mkd_jax.train.erasing import draw_boxes, erase

COUNT = 10_000
SIDE = 4000  # so that rounding to pixels does not show


@pytest.fixture(scope="module")
def boxes():
    draw = jax.jit(lambda key: draw_boxes(key, 0.25, (COUNT, SIDE, SIDE, 3)))
    return np.asarray(draw(jax.random.key(0))).astype(np.float64)


def test_a_quarter_of_the_images_is_erased(boxes):
    erased = int((boxes[1] > boxes[0]).sum())
    assert stats.binomtest(erased, COUNT, 0.25).pvalue > 1e-3
    assert ((boxes[1] > boxes[0]) == (boxes[3] > boxes[2])).all()


def test_areas_and_aspects_are_those_of_tries_that_fit(boxes):
    """A try of area a fits a square when |ln aspect| < -ln a; ln aspect is uniform.

    So the aspect is free up to a = 0.3, and above it the accepted share is -ln a / -ln 0.3.
    """
    top, bottom, left, right = boxes[:, boxes[1] > boxes[0]]
    area = (bottom - top) * (right - left) / SIDE**2
    limit = -math.log(0.3)
    grid = np.linspace(0.02, 0.33, 4001)
    density = np.minimum(1.0, -np.log(grid) / limit)
    cumulative = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    cumulative /= cumulative[-1]
    assert stats.kstest(area, lambda a: np.interp(a, grid, cumulative)).pvalue > 1e-3
    small = area < 0.299
    aspect = np.log((bottom - top) / (right - left))[small]
    assert stats.kstest(aspect, stats.uniform(-limit, 2 * limit).cdf).pvalue > 1e-3


def test_the_first_of_ten_tries_that_fits_is_taken():
    """In an image ten times as high as wide a box of area a fits when its aspect is above 10 a."""
    boxes = np.asarray(draw_boxes(jax.random.key(2), 1.0, (COUNT, 10 * 400, 400, 3)))
    area = np.linspace(0.02, 0.33, 4001)
    above = (-math.log(0.3) - np.log(10 * area)) / (-2 * math.log(0.3))
    fits = np.clip(above, 0, 1).mean()
    assert 0.3 < fits < 0.6
    erased = int((boxes[1] > boxes[0]).sum())
    assert stats.binomtest(erased, COUNT, 1 - (1 - fits) ** 10).pvalue > 1e-3
    assert (boxes[3] - boxes[2] < 400).all()


def test_places_are_uniform_and_inside(boxes):
    top, bottom, left, right = boxes[:, boxes[1] > boxes[0]]
    assert top.min() >= 0 and bottom.max() <= SIDE and left.min() >= 0 and right.max() <= SIDE
    for low, high in ((top, bottom), (left, right)):
        share = (low + 0.5) / (SIDE - (high - low) + 1)
        assert stats.kstest(share, "uniform").pvalue > 1e-3
    rows, columns = top / (SIDE - (bottom - top) + 1), left / (SIDE - (right - left) + 1)
    assert abs(np.corrcoef(rows, columns)[0, 1]) < 4 / math.sqrt(len(top))


def test_a_box_is_filled_with_normal_numbers_and_the_rest_stays():
    images = jnp.full((64, 32, 32, 3), 7.0)
    out = np.asarray(jax.jit(lambda key: erase(key, images, 0.5))(jax.random.key(1)))
    changed = (out != 7).all(-1)
    np.testing.assert_array_equal(changed, (out != 7).any(-1))
    assert 16 < changed.any((1, 2)).sum() < 48
    for mask in changed[changed.any((1, 2))]:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert 0.01 < mask.mean() < 0.36
    # One number per pixel and channel, not per box.
    assert stats.kstest(out[changed][:5000, 0], "norm").pvalue > 1e-3
    assert abs(np.corrcoef(out[changed].T) - np.eye(3)).max() < 0.05
    # Another step's key gives other numbers, not the same behind another box.
    again = np.asarray(erase(jax.random.key(2), images, 0.5))
    both = changed & (again != 7).all(-1)
    assert both.sum() > 100 and (out[both] != again[both]).all()


def test_probability_zero_computes_nothing():
    images = jnp.ones((2, 4, 4, 3))
    assert erase(jax.random.key(0), images, 0.0) is images
