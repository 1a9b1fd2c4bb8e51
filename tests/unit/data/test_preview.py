"""The picture of a job's first images."""

from types import SimpleNamespace

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from m2mkd_jax.data.array_source import ArrayImageSource
from m2mkd_jax.data.pipeline import first_images, train_batches
from m2mkd_jax.data.preview import caption, draw_grid
from m2mkd_jax.jobs.inputs import draw_images

SIZE = 28


def config(**augment):
    return ConfigDict(
        {
            "image_size": SIZE,
            "workers": 0,
            "repeated_augmentation": 1,
            "damaged_share": 0.0,
            "classes": 20,
            "mean": (0.5, 0.4, 0.3),
            "std": (0.25, 0.2, 0.3),
            "augment": {
                "crop": "shift",
                "shift": 3,
                "scale": (0.08, 1.0),
                "flip": True,
                "rand_augment": "",
                "color_jitter": 0.0,
                "erase": 0.0,
                **augment,
            },
        }
    )


def noise():
    images = np.random.default_rng(0).integers(0, 256, (20, SIZE, SIZE, 3), dtype=np.uint8)
    return ArrayImageSource(images, np.arange(20), [f"class {i}" for i in range(20)])


def tiles(path):
    """The 16 images of a drawn grid, back at their size."""
    picture = np.asarray(Image.open(path))
    side = 112
    return np.stack(
        [
            picture[
                row * (side + 14) + 2 : row * (side + 14) + side : 4,
                column * side + 2 : (column + 1) * side : 4,
            ]
            for row in range(4)
            for column in range(4)
        ]
    )


def test_the_first_images_are_those_of_the_first_batch():
    batch = next(train_batches(noise(), config(), batch_size=18, total_steps=1, seed=3))
    first = first_images(noise(), config(), batch_size=18, seed=3)
    assert first.keys() == {"image", "label"}
    np.testing.assert_array_equal(first["image"], batch["image"][:16])
    np.testing.assert_array_equal(first["label"], batch["label"][:16])


def test_a_grid_holds_every_image_with_its_caption():
    images = noise().images
    picture = np.asarray(draw_grid(images[:5], ["a"] * 5))
    assert picture.shape == (2 * (112 + 14), 3 * 112, 3)
    np.testing.assert_array_equal(picture[126:238:4, 112:224:4], images[4])
    assert (picture[112:126, :112] < 128).any() and (picture[238:, 224:] == 255).all()
    picture = np.asarray(draw_grid(images[:2], ["a", "a\nb"]))
    assert picture.shape == (112 + 26, 2 * 112, 3)
    assert (picture[126:, 112:] < 128).any() and (picture[126:, :112] == 255).all()


def test_captions():
    names = ["a long name of a class", "b", "c"]
    assert caption(np.array([1.0, 0.0, 0.0]), names) == "a long name of a c"
    assert caption(np.array([0.0, 0.251, 0.749]), names) == "75% c\n25% b"
    # WordNet ids whole: their first letters do not tell them apart.
    names = ["n03970156", "n02795169"]
    assert caption(np.array([0.6, 0.4]), names) == "60% n03970156\n40% n02795169"


def test_a_job_draws_what_its_step_sees(tmp_path):
    data, recipe = config(), SimpleNamespace(mixup=0.0, cutmix=0.0, smoothing=0.1)
    draw_images(tmp_path / "plain.png", noise(), data, recipe, 18, 3)
    expected = first_images(noise(), data, batch_size=18, seed=3)["image"]
    np.testing.assert_array_equal(tiles(tmp_path / "plain.png"), expected)
    draw_images(tmp_path / "erased.png", noise(), config(erase=1.0), recipe, 18, 3)
    changed = (tiles(tmp_path / "erased.png") != expected).any(-1).mean((1, 2))
    # Every box covers 2% to 33%, here rounded to pixels.
    assert (changed > 0.01).all() and (changed < 0.4).all()
