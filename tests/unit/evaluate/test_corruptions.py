"""Corrupted images against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from m2mkd_jax.evaluate import corruptions
from m2mkd_jax.evaluate.corruptions import KINDS, SEVERITIES, corrupt

KEY = jax.random.key(0)


@pytest.fixture
def images():
    return jax.random.uniform(jax.random.key(1), (3, 24, 24, 3))


def test_noise_has_its_deviation(images):
    for level, wanted in enumerate(corruptions.NOISE):
        found = np.std(corruptions.noise(images, jax.random.split(KEY, 3), level) - images)
        assert found == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_is_corrupted_alike_in_whatever_batch_it_comes(kind, images):
    pixels = (255 * images).astype(jnp.uint8)
    whole = corrupt(pixels, KEY, 4, kind, 3)
    parts = [corrupt(pixels[i : i + 1], KEY, 4 + i, kind, 3) for i in range(3)]
    np.testing.assert_array_equal(whole, jnp.concatenate(parts))
    alike = corrupt(jnp.broadcast_to(pixels[:1], pixels.shape), KEY, 4, kind, 3)
    assert (alike[0] == alike[1]).all() == (kind != "noise")


def test_blur_is_scipys(images):
    # Width 24 at level 2: sigma 0.04 * 24 = 0.96, radius ceil(2.88) = 3.
    expected = gaussian_filter(np.asarray(images), (0, 0.96, 0.96, 0), mode="nearest", radius=3)
    np.testing.assert_allclose(corruptions.blur(images, KEY, 2), expected, atol=1e-5)


def test_contrast_keeps_the_mean_and_scales_the_deviation(images):
    found = corruptions.contrast(images, KEY, 1)
    np.testing.assert_allclose(found.mean((1, 2)), images.mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(found.std((1, 2)), 0.45 * images.std((1, 2)), atol=1e-5)


def test_brightness_and_shift(images):
    np.testing.assert_allclose(corruptions.brightness(images, KEY, 0) - images, 0.1, atol=1e-6)
    found = corruptions.shift(images, KEY, 4)  # round(0.2 * 24) = 5 pixels
    np.testing.assert_array_equal(found[:, 5:, 5:], images[:, :-5, :-5])
    np.testing.assert_array_equal(found[:, :5, 5:], jnp.repeat(images[:, :1, :-5], 5, axis=1))


def test_pixels_of_a_block_have_its_mean(images):
    found = np.asarray(corruptions.pixelate(images, KEY, 4))  # blocks of 6 pixels
    blocks = found.reshape(3, 4, 6, 4, 6, 3)
    np.testing.assert_allclose(blocks.std((2, 4)), 0, atol=1e-6)
    np.testing.assert_allclose(found.mean((1, 2)), images.mean((1, 2)), atol=1e-5)


def test_severities_rise(images):
    smooth = gaussian_filter(np.asarray(images), (0, 3, 3, 0), mode="wrap")
    low, high = smooth.min(), smooth.max()
    pixels = jnp.asarray((255 * (smooth - low) / (high - low)).round(), jnp.uint8)
    for kind in KINDS:
        wrong = [
            np.abs(np.float64(corrupt(pixels, KEY, 0, kind, s)) - np.float64(pixels)).mean()
            for s in SEVERITIES
        ]
        assert wrong[0] > 0 and wrong == sorted(wrong), kind
