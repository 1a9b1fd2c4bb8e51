"""Images of one channel, of four, and of many from arrays."""

import io

import numpy as np
import pytest
from PIL import Image

from m2mkd_jax.data import augment, check, pipeline, resample, sources
from m2mkd_jax.data.channels import as_rgb
from m2mkd_jax.data.decode import DamagedImage, Form, OtherChannels, decode
from tests.data_files import make_config, message, write_folders

SIZE = 16


def array_file(array, path=None):
    content = io.BytesIO()
    np.save(content, array)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.getvalue())
    return content.getvalue()


@pytest.fixture(scope="module")
def bands(tmp_path_factory):
    """Three images of five bands in each of two classes, and what they hold."""
    root, generator = tmp_path_factory.mktemp("bands"), np.random.default_rng(0)
    held = generator.integers(0, 256, (12, 24, 20, 5), np.uint8)
    for i, array in enumerate(held):
        folder = root / ("train", "val")[i % 2] / "ab"[i // 6]
        array_file(array if i % 3 else array.astype(np.uint16) * 256 + 7, folder / f"{i:02d}.npy")
    return root, held


def test_grey_images_are_read_in_one_channel(tmp_path):
    write_folders(tmp_path, per_class=2)
    config = make_config("image_folder", tmp_path, 3, channels=1)
    for split in ("train", "test"):
        rgb = sources.load_source(make_config("image_folder", tmp_path, 3), split)
        grey = sources.load_source(config, split)
        with Image.open(grey.name(0)) as picture:
            np.testing.assert_array_equal(grey.read(0)[..., 0], np.asarray(picture.convert("L")))
        assert rgb.read(0).shape[2] == 3
    digits = [
        sources.load_source(make_config("digits", "", 10, **fields), "test").images
        for fields in ({}, {"channels": 1})
    ]
    np.testing.assert_array_equal(digits[0][..., :1], digits[1])


def test_arrays_of_many_bands_go_through_augmentation_band_by_band(bands):
    root, held = bands
    fields = {"channels": 5, "workers": 0, "damaged_share": 0.0}
    config = make_config("image_folder", root, 2, **fields)
    train = sources.load_source(config, "train")
    for i in range(len(train)):
        np.testing.assert_array_equal(train.read(i), held[int(train.name(i)[-6:-4])])
    for crop in ("random_resized", "shift"):
        setting = augment.Augmentation(crop, 2, (0.3, 1.0), True, channels=5)
        draws = augment.Draws.of(np.random.default_rng(1), 6)
        images = augment.training_images(train.reader(), np.arange(6), setting, draws, SIZE)
        for band in range(5):
            grey = sources.ArrayImageSource(
                held[[0, 2, 4, 6, 8, 10]][..., band : band + 1], [0] * 6, "a"
            )
            alone = augment.Augmentation(crop, 2, (0.3, 1.0), True, channels=1)
            theirs = augment.training_images(grey, np.arange(6), alone, draws, SIZE)
            np.testing.assert_array_equal(images[..., band : band + 1], theirs)
    batch = next(iter(pipeline.eval_batches(train, config, batch_size=4)))
    assert batch["image"].shape == (4, SIZE, SIZE, 5)


@pytest.mark.parametrize("channels", [1, 4, 6])
def test_resizing_is_pillows_in_every_channel(channels):
    image = np.random.default_rng(2).integers(0, 256, (30, 41, channels), np.uint8)
    found = resample.resize(image, 12, 17, (2.5, 1, 38, 29))
    for c in range(channels):
        plane = Image.fromarray(image[..., c])
        theirs = plane.resize((17, 12), Image.Resampling.BICUBIC, (2.5, 1, 38, 29))
        np.testing.assert_array_equal(found[..., c], np.asarray(theirs))


def test_arrays_that_do_not_fit_are_named():
    five = Form(5)
    for array, words in (
        (np.zeros((4, 4, 3), np.uint8), r"\(4, 4, 3\) and data.channels is 5"),
        (np.zeros((4, 4), np.uint8), r"\(4, 4, 1\) and data.channels is 5"),
    ):
        with pytest.raises(OtherChannels, match=words):
            decode(array_file(array), "a.npy", form=five)
    with pytest.raises(DamagedImage, match="float32: uint8 and uint16 are read"):
        decode(array_file(np.zeros((4, 4, 5), np.float32)), "a.npy", form=five)
    for content in (array_file(np.zeros((4, 4, 5), np.uint8))[:-7], b"\x93NUMPY\x01\x00"):
        with pytest.raises(DamagedImage, match=r"cannot decode the image a\.npy"):
            decode(content, "a.npy", form=five)
    objects = np.empty((1, 1, 5), object)
    with pytest.raises(DamagedImage, match="cannot decode"):
        decode(array_file(objects), "a.npy", form=five)


def test_pictures_where_arrays_are_needed_are_refused_before_work(tmp_path, bands, capsys):
    write_folders(tmp_path, per_class=2)
    config = make_config("image_folder", tmp_path, 3, channels=6)
    assert "is a picture: write arrays (H, W, 6) to .npy" in message(
        sources.load_source, config, "train"
    )
    root, _ = bands
    config = make_config("image_folder", root, 2)
    assert check.main([str(root), "--channels=5"]) == 0
    assert "train: 6 images of 2 classes" in capsys.readouterr().out
    assert check.main([str(root)]) == 2
    assert "data.channels is 3" in capsys.readouterr().err
    # Arrays beside pictures are no images.
    array_file(np.zeros((4, 4, 3), np.uint8), tmp_path / "train" / "n01" / "depth.npy")
    train = sources.load_source(make_config("image_folder", tmp_path, 3), "train")
    assert len(train) == 6 and "left out" in capsys.readouterr().err


def test_what_can_be_shown_has_three_channels():
    image = np.arange(2 * 2 * 5, dtype=np.uint8).reshape(2, 2, 5)
    np.testing.assert_array_equal(as_rgb(image), image[..., :3])
    np.testing.assert_array_equal(as_rgb(image[..., :2]), image[..., [0, 0, 0]])
