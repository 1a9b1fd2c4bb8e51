"""The 15 operations against Pillow's own result and against images whose answer is known."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps
from sklearn.datasets import load_sample_image

from m2mkd_jax.data import image_ops as ops

FILL = (124, 116, 104)


def pictures():
    """A photograph, noise, a flat picture, and one that uses few levels; not square."""
    photo = Image.fromarray(load_sample_image("china.jpg")).resize((70, 50))
    rng = np.random.default_rng(0)
    yield "photo", np.asarray(photo)
    yield "noise", rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)
    yield "flat", np.full((12, 9, 3), 77, np.uint8)
    yield "few", rng.choice(np.array([3, 90, 91, 200], np.uint8), (20, 30, 3))


PICTURES = dict(pictures())


def affine(image, *matrix):
    """Pillow's bicubic warp; matrix maps output to input."""
    return image.transform(
        image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=FILL
    )


def blend(enhancer, function):
    return [(lambda im, f=f: enhancer(im).enhance(f), function, f) for f in (0.1, 0.55, 1.0, 1.9)]


# Exact where Pillow uses a table; one level where it rounds in between or computes in doubles.
EXACT = [
    (ImageOps.autocontrast, ops.auto_contrast, None),
    (ImageOps.equalize, ops.equalize, None),
    (ImageOps.invert, ops.invert, None),
    *[(lambda im, b=b: ImageOps.posterize(im, b), ops.posterize, b) for b in range(1, 5)],
    *[(lambda im, t=t: ImageOps.solarize(im, t), ops.solarize, t) for t in (0, 26, 128, 256)],
    *blend(ImageEnhance.Brightness, ops.brightness),
    *[
        (lambda im, d=d: im.rotate(d, Image.Resampling.BICUBIC, fillcolor=FILL), ops.rotate, d)
        for d in (-29, -5, 0, 3.3, 30)
    ],
]
WITHIN_ONE = [
    *blend(ImageEnhance.Contrast, ops.contrast),
    *blend(ImageEnhance.Color, ops.color),
    *blend(ImageEnhance.Sharpness, ops.sharpness),
    *[(lambda im, a=a: affine(im, 1, a, 0, 0, 1, 0), ops.shear_x, a) for a in (-0.27, 0, 0.3)],
    *[(lambda im, a=a: affine(im, 1, 0, 0, a, 1, 0), ops.shear_y, a) for a in (-0.3, 0.27)],
    *[
        (lambda im, a=a: affine(im, 1, 0, a * im.width, 0, 1, 0), ops.translate_x, a)
        for a in (-0.45, 0.013, 0.4)
    ],
    *[
        (lambda im, a=a: affine(im, 1, 0, 0, 0, 1, a * im.height), ops.translate_y, a)
        for a in (-0.4, 0.45)
    ],
]


def difference(reference, function, value, picture):
    expected = np.asarray(reference(Image.fromarray(picture))).astype(int)
    kept = picture.copy()
    out = function(picture) if value is None else function(picture, value)
    assert out.dtype == np.uint8 and out.shape == picture.shape
    np.testing.assert_array_equal(picture, kept)
    return abs(out.astype(int) - expected)


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize(
    ("reference", "function", "value"), EXACT, ids=[f"{f.__name__}-{v}" for _, f, v in EXACT]
)
def test_tables_and_rotations_are_pillows(reference, function, value, name):
    assert difference(reference, function, value, PICTURES[name]).max() == 0


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize(
    ("reference", "function", "value"),
    WITHIN_ONE,
    ids=[f"{f.__name__}-{v}" for _, f, v in WITHIN_ONE],
)
def test_blends_shears_and_shifts_are_pillows_within_one_level(reference, function, value, name):
    assert difference(reference, function, value, PICTURES[name]).max() <= 1


def test_solarize_add_by_hand():
    row = np.array([0, 17, 18, 127, 128, 255], np.uint8)
    picture = np.repeat(row[None, :, None], 3, -1)
    np.testing.assert_array_equal(
        ops.solarize_add(picture, 110)[0, :, 0], [110, 127, 128, 237, 128, 255]
    )
    np.testing.assert_array_equal(
        ops.solarize_add(picture, 200)[0, :, 0], [200, 217, 218, 255, 128, 255]
    )


def test_posterize_to_no_bits_is_black():
    """Magnitude 10 with inc1 keeps 4 - 4 bits, which newer versions of Pillow refuse."""
    assert not ops.posterize(PICTURES["noise"], 0).any()


def test_directions_and_fill_by_hand():
    """A dot in the middle of 5x5; what comes from outside is the fill."""
    picture = np.zeros((5, 5, 3), np.uint8)
    picture[2, 2] = 200
    for moved, place in (
        (ops.translate_x(picture, 0.2), (2, 1)),  # one of five pixels, to the left
        (ops.translate_y(picture, -0.2), (3, 2)),  # down
        (ops.shear_x(picture, 0.4), (2, 1)),  # row 2's middle is at 2.5: 0.4 * 2.5 = 1 to the left
        (ops.shear_y(picture, -0.4), (3, 2)),
    ):
        assert (moved[place] == 200).all()
    np.testing.assert_array_equal(ops.translate_x(picture, 0.2)[:, 4], [FILL] * 5)
    np.testing.assert_array_equal(ops.translate_x(picture, -1.0), np.full((5, 5, 3), FILL))
    # A quarter turn counter-clockwise brings the right column to the top row.
    picture[:, 4] = [10, 20, 30]
    np.testing.assert_array_equal(ops.rotate(picture, 90)[0], [[10, 20, 30]] * 5)
