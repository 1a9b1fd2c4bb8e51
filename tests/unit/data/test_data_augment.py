"""Augmentation against closed forms and against images whose answer is known."""

import io
import math
import tracemalloc

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from sklearn.datasets import load_sample_image

from m2mkd_jax.data.array_source import ArrayImageSource, to_images
from m2mkd_jax.data.augment import (
    Augmentation,
    Draws,
    crop_box,
    evaluation_image,
    flip_batch,
    resized_crop,
    shift_batch,
    training_images,
)
from m2mkd_jax.data.decode import DamagedImage, decode, whole_jpeg
from m2mkd_jax.data.rand_augment import Policy, apply, operations
from m2mkd_jax.errors import UserError

COUNT = 10_000


def _boxes(height, width, scale):
    draws = Draws.of(np.random.default_rng(0), COUNT)
    return np.array(
        [
            crop_box(height, width, tries, place, scale)
            for tries, place in zip(draws.crop, draws.place, strict=True)
        ],
        np.float64,
    ).T


def _close(sample, mean, variance):
    """The sample's mean within 4 standard errors, its variance within 6%."""
    assert abs(sample.mean() - mean) < 4 * math.sqrt(variance / COUNT)
    assert sample.var() == pytest.approx(variance, rel=0.06)


def test_crops_have_uniform_area_and_log_uniform_aspect():
    # With areas up to half of a square every try fits: side sqrt(0.5 * 4/3) = 0.82 < 1.
    top, left, height, width = _boxes(4000, 4000, (0.08, 0.5))
    _close(height * width / 4000**2, (0.08 + 0.5) / 2, (0.5 - 0.08) ** 2 / 12)
    _close(np.log(width / height), 0, (2 * math.log(4 / 3)) ** 2 / 12)
    # Placed uniformly in what is left over.
    _close(top / (4000 - height), 1 / 2, 1 / 12)
    _close(left / (4000 - width), 1 / 2, 1 / 12)


def test_large_areas_are_accepted_as_often_as_they_fit():
    # A try of area a and aspect r fits a square when |ln r| <= -ln a: always below a = 3/4, else
    # with probability p(a) = -ln a / L, L = ln 4/3. Integrals of p from 0.08 to 1:
    #   0.67 + (0.25 + 0.75 ln 0.75) / L = 0.67 + 0.11902 = 0.78902;
    # of a * p: 0.27805 + (0.109375 + 0.28125 ln 0.75) / L = 0.27805 + 0.09894 = 0.37699.
    _, _, height, width = _boxes(4000, 4000, (0.08, 1.0))
    area = height * width / 4000**2
    assert area.mean() == pytest.approx(0.37699 / 0.78902, abs=4 * area.std() / 100)
    # P(a < 1/2) = 0.42 / 0.78902.
    assert (area < 0.5).mean() == pytest.approx(0.42 / 0.78902, abs=0.02)


@pytest.mark.parametrize(
    ("height", "width", "box"),
    [
        (100, 40, (23, 0, 53, 40)),  # narrow: 40 / (3/4) = 53.3 rows, (100 - 53) // 2
        (30, 100, (0, 30, 30, 40)),  # wide: 30 * 4/3 = 40 columns
        (60, 60, (0, 0, 60, 60)),  # within the limits: everything
    ],
)
def test_ten_tries_that_do_not_fit_give_the_largest_centred_crop(height, width, box):
    # Area 1 and the extreme aspect never fit.
    tries = np.ones((10, 2))
    tries[:, 1] = 0 if width >= height else 1
    assert crop_box(height, width, tries, np.array([0.9, 0.1])) == box


def test_crop_box_takes_the_first_try_that_fits():
    # Tries: area 1 of a wide shape (no), then a quarter of the area, square.
    tries = np.array([[1.0, 1.0]] * 3 + [[(0.25 - 0.08) / 0.92, 0.5]] + [[0.0, 0.0]] * 6)
    assert crop_box(80, 80, tries, np.array([0.0, 0.999])) == (0, 40, 40, 40)


def test_resized_crop_sees_nothing_outside_of_its_box():
    pixels = np.full((64, 64, 3), 255, np.uint8)
    pixels[16:48, 16:48] = 100
    cut = resized_crop(pixels, (16, 16, 32, 32), 8)
    assert cut.shape == (8, 8, 3) and (cut == 100).all()


def test_shifts_move_the_image_and_are_uniform():
    images = np.random.default_rng(0).integers(1, 256, (2, 6, 6, 3), dtype=np.uint8)
    # Row 0, column 4 of the padded image: 2 pixels of black above, image moved left by 2.
    moved = shift_batch(images, np.array([[0.0, 0.999], [0.5, 0.5]]), 2)
    np.testing.assert_array_equal(moved[0, 2:, :4], images[0, :4, 2:])
    assert not moved[0, :2].any() and not moved[0, :, 4:].any()
    np.testing.assert_array_equal(moved[1], images[1])

    dots = np.zeros((COUNT, 9, 9, 3), np.uint8)
    dots[:, 4, 4] = 1
    draws = Draws.of(np.random.default_rng(1), COUNT)
    _, rows, columns = np.nonzero(shift_batch(dots, draws.place, 2)[..., 0])
    for counts in (np.bincount(rows)[2:7], np.bincount(columns)[2:7]):
        # Binomial with p = 1/5: 4 standard deviations are 160.
        assert counts.sum() == COUNT and (abs(counts - COUNT / 5) < 160).all()


def test_flip_mirrors_columns_of_the_drawn_half():
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 7, 3), dtype=np.uint8)
    kept = images.copy()
    flipped = flip_batch(images, np.array([0.49, 0.5]))
    np.testing.assert_array_equal(flipped[0], images[0, :, ::-1])
    np.testing.assert_array_equal(flipped[1], images[1])
    np.testing.assert_array_equal(images, kept)
    assert abs((Draws.of(np.random.default_rng(2), COUNT).flip < 0.5).mean() - 0.5) < 0.02


@pytest.mark.parametrize(("width", "height"), [(300, 200), (200, 300), (73, 73)])
def test_evaluation_scales_the_shorter_side_and_cuts_the_centre(width, height):
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    ramp = rows[:, None] * 100 / height + columns[None] * 100 / width
    image = np.repeat(ramp[..., None], 3, -1).round().astype(np.uint8)
    out = evaluation_image(image, 64)
    assert out.shape == (64, 64, 3) and out.dtype == np.uint8
    # The ramp's value at the centre is 100, and an odd margin puts the cut half a pixel (0.7)
    # before it. int(256 / 224 * 64) = 73 pixels of the short side are cut to 64, so the ramp
    # spans 63 of 73 steps along it.
    assert out[31:33, 31:33].mean() == pytest.approx(100, abs=2)
    short_is_row = height <= width
    edge = out[:, 32, 0] if short_is_row else out[32, :, 0]
    assert int(edge[-1]) - int(edge[0]) == pytest.approx(100 * 63 / 73, abs=2.5)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("shape", [(2000, 1), (1, 2000), (3000, 2)])
def test_of_a_long_strip_only_what_the_crop_keeps_is_resized(shape, channels):
    """All of the result would take 32 MB, and its sums four times as much."""
    strip = np.random.default_rng(0).integers(0, 256, (*shape, channels), dtype=np.uint8)
    tracemalloc.start()
    try:
        out = evaluation_image(strip, 64)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    scale = 73 / min(shape)  # int(256 / 224 * 64)
    height, width = (int(scale * side) for side in shape)
    top, left = round((height - 64) / 2), round((width - 64) / 2)
    whole = Image.fromarray(strip.squeeze(2) if channels == 1 else strip)
    whole = np.asarray(whole.resize((width, height), Image.Resampling.BICUBIC))
    part = whole[top : top + 64, left : left + 64].reshape(64, 64, channels)
    np.testing.assert_array_equal(out, part)


def test_grey_pictures_of_28_pixels_are_padded_to_32():
    grey = np.random.default_rng(0).integers(1, 256, (3, 28, 28), dtype=np.uint8)
    images = to_images(grey, 32)
    assert images.shape == (3, 32, 32, 3)
    np.testing.assert_array_equal(images[:, 2:30, 2:30, 1], grey)
    assert not images[:, :2].any() and not images[:, :, 30:].any()
    np.testing.assert_array_equal(to_images(grey, 28)[..., 2], grey)
    assert to_images(grey, 16).shape == (3, 16, 16, 3)


def test_every_crop_gives_images_of_the_wanted_size():
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    source = ArrayImageSource(images, np.arange(4), "abcd")
    draws = Draws.of(np.random.default_rng(0), 3)
    for crop in ("none", "shift", "random_resized"):
        out = training_images(
            source, np.array([3, 0, 1]), Augmentation(crop, 2, (0.08, 1.0), False), draws, 16
        )
        assert out.shape == (3, 16, 16, 3) and out.dtype == np.uint8
        assert (out == images[[3, 0, 1]]).all() == (crop == "none")


class CountingSource(ArrayImageSource):
    """Counts how often it decodes."""

    reads = 0

    def read(self, index, shrink=None):
        self.reads += 1
        return super().read(index, shrink)


def test_copies_of_an_image_are_decoded_once_and_cropped_apart():
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8)
    source = CountingSource(images, np.arange(4), "abcd")
    draws = Draws.of(np.random.default_rng(0), 7)
    augmentation = Augmentation("random_resized", 0, (0.08, 1.0), False)
    indices = np.array([2, 2, 2, 0, 3, 3, 2])
    together = training_images(source, indices, augmentation, draws, 16)
    assert source.reads == 4
    assert len({image.tobytes() for image in together}) == 7
    for i in range(7):
        alone = training_images(source, indices[i : i + 1], augmentation, draws[i : i + 1], 16)
        np.testing.assert_array_equal(alone[0], together[i])


def encoded(image, **options):
    file = io.BytesIO()
    Image.fromarray(image).save(file, **options)
    return file.getvalue()


def with_pillow(content):
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB")).astype(int)


PHOTO = load_sample_image("china.jpg")


@pytest.mark.parametrize(
    "content",
    [
        encoded(PHOTO, format="JPEG", quality=90),
        encoded(PHOTO, format="JPEG", progressive=True, subsampling=0),
        encoded(PHOTO[..., 0], format="JPEG"),
        encoded(
            PHOTO,
            format="JPEG",
            exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0",
        ),  # turned: not followed
        encoded(PHOTO, format="JPEG") + b"after the end",
        encoded(np.repeat(PHOTO[..., :1], 4, -1), format="PNG"),  # transparent
        encoded(PHOTO, format="WEBP", lossless=True),
        encoded(np.array(Image.fromarray(PHOTO).convert("CMYK")).view(), format="PNG"),
    ],
    ids=["jpeg", "progressive", "grey", "turned", "tail", "alpha", "webp", "png"],
)
def test_files_are_decoded_as_pillow_does(content):
    image = decode(content, "it")
    assert image.dtype == np.uint8 and image.shape == PHOTO.shape
    # The same library decodes for both, but maybe not in the same version.
    assert abs(image - with_pillow(content)).max() <= 2


@pytest.mark.parametrize(
    "options",
    [{"quality": 95}, {"progressive": True}, {"restart_marker_blocks": 10}],
    ids=["plain", "progressive", "restarts"],
)
def test_what_pillow_cannot_decode_is_damaged(options):
    """OpenCV alone gives pixels for most of it. Bytes in the middle were overwritten."""
    content = encoded(PHOTO[:200, :300], format="JPEG", **options)
    assert whole_jpeg(content) == (200, 300)
    rng, refused = np.random.default_rng(0), 0
    for _ in range(60):
        count = rng.choice([3, 20, 300])
        place = rng.integers(650, len(content) - count - 2)
        broken = content[:place] + rng.bytes(count) + content[place + count :]
        try:
            expected = with_pillow(broken)
        except OSError:
            refused += 1
            with pytest.raises(DamagedImage):
                decode(broken, "it")
        else:
            assert abs(decode(broken, "it") - expected).max() <= 2
    assert refused > 1


@pytest.mark.parametrize(("asked", "given"), [(1, 1), (1.9, 1), (2, 2), (7, 4), (8, 8), (99, 8)])
def test_a_large_jpeg_may_come_smaller_but_never_than_asked(asked, given):
    sizes = []
    image = decode(encoded(PHOTO, format="JPEG"), "it", lambda *size: sizes.append(size) or asked)
    assert sizes == [PHOTO.shape[:2]]
    assert image.shape[:2] == (-(-427 // given), -(-640 // given))


def test_a_crop_of_a_reduced_image_is_nearly_that_of_the_whole():
    """640x427 to 32 pixels: crops of 128 pixels and more are taken at a half or less."""
    content = encoded(PHOTO, format="JPEG", quality=95)

    class Whole(ArrayImageSource):
        def read(self, index, shrink=None):
            return decode(content, "it")

    class Reduced(ArrayImageSource):
        def read(self, index, shrink=None):
            image = decode(content, "it", shrink)
            self.reduced = self.reduced or image.shape[0] < 427
            return image

        reduced = False

    draws = Draws.of(np.random.default_rng(0), 12)
    augmentation = Augmentation("random_resized", 0, (0.08, 1.0), False)
    results = []
    reduced = Reduced(PHOTO[None], [0], "a")
    for source in (Whole(PHOTO[None], [0], "a"), reduced):
        images = [
            training_images(source, np.array([0]), augmentation, draws[i : i + 1], 32)[0]
            for i in range(12)
        ]
        results.append(np.stack(images).astype(int))
    assert reduced.reduced
    apart = abs(results[0] - results[1])
    assert 0 < apart.mean() < 1.5 and np.percentile(apart, 99) < 12


def test_rand_augment_comes_after_the_flip_and_to_every_image_its_own():
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 16, 3), dtype=np.uint8)
    source = ArrayImageSource(np.repeat(images, 40, 0), np.zeros(40), "a")
    policy = Policy.parse("rand-m9-mstd0.5-inc1")
    draws = Draws.of(np.random.default_rng(0), 40, policy.layers)
    augmentation = Augmentation("none", 0, (0.08, 1.0), True, policy, 0.4)
    out = training_images(source, np.arange(40), augmentation, draws, 16)
    flipped = flip_batch(source.images, draws.flip)
    for i in range(40):
        expected = apply(flipped[i], operations(policy, draws.choices[i]))
        np.testing.assert_array_equal(out[i], expected)
    assert len({image.tobytes() for image in out}) > 25
    assert (source.images == images).all()


def test_colour_jitter_acts_only_without_a_policy():
    images = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), dtype=np.uint8)
    source = ArrayImageSource(images, np.zeros(2), "a")
    draws = Draws.of(np.random.default_rng(0), 2, 1)
    # A policy whose draws are never applied.
    draws.choices.applied[:] = 0.9
    for policy, strength, same in ((None, 0.0, True), (None, 0.4, False), (Policy(), 0.4, True)):
        augmentation = Augmentation("none", 0, (0.08, 1.0), False, policy, strength)
        out = training_images(source, np.arange(2), augmentation, draws, 16)
        assert (out == images).all() == same


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("crop", "random_resize", 'did you mean "random_resized"'),
        ("shift", 16, "use 0 to 15"),
        ("scale", (0.5, 0.1), "within"),
        ("rand_augment", "rand-m9-k2", 'cannot read "k2" at position 8'),
        ("color_jitter", 1.5, "color_jitter is 1.5"),
        ("erase", -0.1, "use a probability"),
    ],
)
def test_wrong_augmentation_is_a_user_error(field, value, words):
    config = ConfigDict(
        {
            "image_size": 16,
            "augment": {
                "crop": "shift",
                "shift": 2,
                "scale": (0.08, 1.0),
                "flip": True,
                "rand_augment": "",
                "color_jitter": 0.0,
                "erase": 0.0,
            },
        }
    )
    config.augment[field] = value
    with pytest.raises(UserError) as error:
        Augmentation.from_config(config)
    assert words in str(error.value) and "\n" not in str(error.value)
