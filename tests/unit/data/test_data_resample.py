"""Resizing against Pillow's own, byte for byte."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image

from m2mkd_jax.data import resample

# Sharp edges are cut to 0..255 between the passes; a photograph hardly ever is.
EDGES = np.random.default_rng(0).integers(0, 2, (427, 640, 3), dtype=np.uint8) * 255
PHOTO = load_sample_image("flower.jpg")


def pillow(image, height, width, box=None):
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, box))


@pytest.mark.parametrize("pixels", [EDGES, PHOTO], ids=["edges", "photo"])
@pytest.mark.parametrize(
    ("height", "width", "new_height", "new_width"),
    [
        (375, 500, 224, 224),  # smaller
        (427, 640, 256, 383),
        (50, 61, 224, 224),  # larger
        (300, 100, 224, 224),  # rows smaller, columns larger
        (427, 230, 224, 224),  # rows first in newer versions of Pillow
        (64, 64, 64, 64),
        (64, 37, 64, 64),
        (427, 640, 7, 1),
        (1, 1, 5, 3),
        (3, 2, 1, 1),
    ],
)
def test_bytes_are_pillows(pixels, height, width, new_height, new_width):
    image = pixels[:height, 640 - width :]
    before = image.copy()
    out = resample.resize(image, new_height, new_width)
    assert out.dtype == np.uint8 and out.flags.c_contiguous
    np.testing.assert_array_equal(out, pillow(image, new_height, new_width))
    np.testing.assert_array_equal(image, before)


@pytest.mark.parametrize("pixels", [EDGES, PHOTO], ids=["edges", "photo"])
def test_bytes_are_pillows_for_random_sizes_and_parts_of_pixels(pixels):
    rng = np.random.default_rng(1)
    for _ in range(60):
        height, width, size = rng.integers(2, (428, 641, 300))
        left, top, right, bottom = rng.random(4)
        box = (left, top, width - right, height - bottom)
        image = pixels[:height, :width]
        np.testing.assert_array_equal(
            resample.resize(image, size, size, box), pillow(image, size, size, box)
        )


def test_large_images_take_no_whole_numbers_for_their_bytes(monkeypatch):
    image, asked = PHOTO[:90, :100], []
    monkeypatch.setattr(resample, "_weights", lambda *sizes: asked.append(sizes))
    monkeypatch.setattr(resample, "_LARGEST", image.size - 1)
    np.testing.assert_array_equal(resample.resize(image, 50, 40), pillow(image, 50, 40))
    assert not asked


@pytest.mark.parametrize("largest", [1 << 23, 20_000, 0])
@pytest.mark.parametrize("pixels", [EDGES, PHOTO], ids=["edges", "photo"])
def test_a_window_is_that_part_of_pillows_result(pixels, largest, monkeypatch):
    monkeypatch.setattr(resample, "_LARGEST", largest)
    rng = np.random.default_rng(2)
    for _ in range(60):
        height, width = rng.integers(2, (428, 641))
        new_height, new_width = rng.integers(1, (300, 300))
        top, left = rng.integers(0, (new_height, new_width))
        rows, columns = rng.integers(1, (new_height - top + 1, new_width - left + 1))
        image = pixels[:height, :width]
        out = resample.resize(image, new_height, new_width, window=(top, left, rows, columns))
        expected = pillow(image, new_height, new_width)[top : top + rows, left : left + columns]
        np.testing.assert_array_equal(out, expected)
        assert out.flags.c_contiguous
