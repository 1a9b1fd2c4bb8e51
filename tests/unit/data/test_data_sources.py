"""Data sets on disk, written by the tests as small files; and what a user is told about them."""

import gzip
import shutil
import struct

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from m2mkd_jax.data import sources
from m2mkd_jax.data.encoded_source import EncodedImageSource
from m2mkd_jax.errors import UserError

CLASSES = ("n01", "n02", "n03")


def make_config(name, root="", **fields):
    return ConfigDict(
        {
            "name": name,
            "root": str(root),
            "image_size": 16,
            "classes": 3,
            "train_images": 0,
            "test_images": 0,
            **fields,
        }
    )


def write_image(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((20, 24, 3), value, np.uint8)).save(path)


def write_train(root, per_class=4, below=""):
    for label, name in enumerate(CLASSES):
        for number in range(per_class):
            write_image(root / "train" / name / below / f"{name}_{number}.JPEG", 80 * label + 10)
        (root / "train" / name / "boxes.txt").write_text("not an image")


def write_imagenet(root):
    write_train(root)
    for label, name in enumerate(CLASSES):
        write_image(root / "val" / name / f"v{label}.png", 80 * label + 10)


def write_tiny(root):
    write_train(root, below="images")
    lines = []
    for number, label in enumerate([2, 0, 1, 2]):
        write_image(root / "val" / "images" / f"val_{number}.JPEG", 80 * label + 10)
        lines.append(f"val_{number}.JPEG\t{CLASSES[label]}\t0\t0\t9\t9")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")


def write_idx(path, array, opener=open):
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    with opener(path, "wb") as file:
        file.write(header + array.astype(np.uint8).tobytes())


def write_fashion(root, count=30):
    rng = np.random.default_rng(0)
    arrays = {}
    for stem, opener, ending in (("train", gzip.open, ".gz"), ("t10k", open, "")):
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        write_idx(root / f"{stem}-images-idx3-ubyte{ending}", images, opener)
        write_idx(root / f"{stem}-labels-idx1-ubyte{ending}", labels, opener)
        arrays[stem] = images, labels
    return arrays


def message(call, *arguments):
    with pytest.raises(UserError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def check_colours(source):
    """Every test image is as bright as its class says (JPEG may be off by one)."""
    for index, label in enumerate(source.labels):
        image = source.reader().evaluation_images([index], 16)[0]
        assert image.shape == (16, 16, 3) and image.dtype == np.uint8
        assert abs(image.astype(int) - (80 * label + 10)).max() <= 2


def test_digits_are_split_by_class_and_fill_the_range():
    config = make_config("digits", classes=10)
    train, test = (sources.load_source(config, split) for split in ("train", "test"))
    assert (len(train), len(test)) == (1437, 360)
    assert train.images.shape == (1437, 16, 16, 3) and train.images.dtype == np.uint8
    assert (np.bincount(test.labels) == 36).all()
    assert train.labels.dtype == np.int32 and train.class_names == tuple("0123456789")
    assert train.images.min() == 0 and train.images.max() == 255
    rows = {image.tobytes() for image in train.images}
    assert not any(image.tobytes() in rows for image in test.images)


def test_fashion_mnist_plain_and_gzipped(tmp_path):
    arrays = write_fashion(tmp_path)
    config = make_config("fashion_mnist", tmp_path, classes=10, image_size=32)
    for split, stem in (("train", "train"), ("test", "t10k")):
        source = sources.load_source(config, split)
        np.testing.assert_array_equal(source.images[:, 2:30, 2:30, 0], arrays[stem][0])
        np.testing.assert_array_equal(source.labels, arrays[stem][1])
    assert sources.describe_missing(config) is None


@pytest.mark.parametrize("name", ["image_folder", "imagenet", "tiny_imagenet"])
@pytest.mark.parametrize("write", [write_imagenet, write_tiny])
def test_both_folder_layouts_under_every_name(tmp_path, write, name):
    write(tmp_path)
    config = make_config(name, tmp_path)
    assert sources.describe_missing(config) is None
    train = sources.load_source(config, "train")
    test = sources.load_source(config, "test")
    assert train.class_names == CLASSES
    np.testing.assert_array_equal(train.labels, np.repeat([0, 1, 2], 4))
    expected = [2, 0, 1, 2] if write is write_tiny else [0, 1, 2]
    np.testing.assert_array_equal(test.labels, expected)
    check_colours(train)
    check_colours(test)


def test_grey_and_palette_files_are_read_as_rgb(tmp_path):
    write_imagenet(tmp_path)
    Image.new("L", (30, 20), 90).save(tmp_path / "val" / "n02" / "v1.png")
    Image.new("RGBA", (30, 20), (10, 10, 10, 255)).save(tmp_path / "val" / "n01" / "v0.png")
    check_colours(sources.load_source(make_config("image_folder", tmp_path), "test"))


@pytest.mark.parametrize("name", ["digits", "image_folder"])
def test_subsets_are_balanced_and_nested(tmp_path, name):
    write_imagenet(tmp_path)
    classes = 10 if name == "digits" else 3
    larger = None
    for count in (12, 7, 3):
        config = make_config(name, tmp_path, classes=classes, train_images=count)
        source = sources.load_source(config, "train")
        counts = np.bincount(source.labels, minlength=classes)
        assert len(source) == count and counts.max() - counts.min() <= 1
        pictures = [
            source.name(i) if isinstance(source, EncodedImageSource) else source.images[i].tobytes()
            for i in range(count)
        ]
        assert larger is None or pictures == larger[:count]
        larger = pictures
    assert "use 1 to" in message(
        sources.load_source,
        make_config(name, tmp_path, classes=classes, train_images=9999),
        "train",
    )


def test_selected_images_keep_their_pictures(tmp_path):
    write_imagenet(tmp_path)
    source = sources.load_source(make_config("image_folder", tmp_path), "train")
    chosen = source.select(np.array([9, 1]), labels=[1, 0], class_names=("a", "b"))
    assert chosen.name(0) == source.name(9) and chosen.name(1) == source.name(1)
    np.testing.assert_array_equal(chosen.labels, [1, 0])
    assert chosen.class_names == ("a", "b")


def test_default_places(monkeypatch, tmp_path):
    monkeypatch.setenv("M2MKD_DATA", str(tmp_path))
    assert sources.data_root(make_config("imagenet")) == tmp_path / "imagenet"
    assert sources.data_root(make_config("tiny_imagenet")) == tmp_path / "tiny-imagenet-200"
    monkeypatch.delenv("M2MKD_DATA")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert sources.data_root(make_config("imagenet")) == tmp_path / "home" / "data" / "imagenet"
    assert sources.data_root(make_config("digits")) is None


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("imagenet", "image-net.org"),
        ("tiny_imagenet", "tiny-imagenet-200.zip"),
        ("fashion_mnist", "apt-get install dataset-fashion-mnist"),
        ("image_folder", "one folder per class"),
    ],
)
def test_missing_data_says_where_and_how(tmp_path, name, words):
    root = tmp_path / "nowhere"
    config = make_config(name, root, classes=10)
    text = sources.describe_missing(config)
    assert str(root) in text and words in text and "data.root" in text and "\n" not in text
    assert message(sources.load_source, config, "train") == text


def repeat_line(path):
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, lines[0]]))


def _remove_val_class(root):
    for path in (root / "val" / "n02").iterdir():
        path.unlink()
    (root / "val" / "n02").rmdir()


@pytest.mark.parametrize(
    ("write", "damage", "words"),
    [
        (write_imagenet, _remove_val_class, "lacks 1 of the 3 classes of train/ (the first: n02)"),
        (write_imagenet, lambda root: (root / "val" / "n09").mkdir(), "the first: n09"),
        (write_imagenet, lambda root: (root / "train" / "n04").mkdir(), "lacks 1 of the 4"),
        (write_tiny, lambda root: (root / "train" / "n04").mkdir(), "set data.classes=4"),
        (write_imagenet, lambda root: (root / "val").rename(root / "v"), "no folder val/"),
        (write_imagenet, lambda root: (root / "val/n02/v1.png").unlink(), "no image file in"),
        (write_tiny, lambda root: (root / "val/images/val_2.JPEG").unlink(), "line 3: no image"),
        (
            write_tiny,
            lambda root: (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn77\n"),
            "line 1: class 'n77'",
        ),
        (
            write_tiny,
            lambda root: (root / "val/val_annotations.txt").write_text("val_0.JPEG\tn03\n"),
            "lacks 2 of the 3 classes",
        ),
        (write_tiny, lambda root: repeat_line(root / "val/val_annotations.txt"), "line 5: no"),
        (
            write_tiny,
            lambda root: shutil.copy(root / "val/images/val_0.JPEG", root / "val/images/a.jpg"),
            "no line for 1 of the images beside it (the first: 'a.jpg')",
        ),
    ],
)
def test_damaged_folders_are_told_in_one_line(tmp_path, write, damage, words):
    write(tmp_path)
    damage(tmp_path)
    text = message(sources.load_source, make_config("image_folder", tmp_path), "test")
    assert words in text and str(tmp_path) in text


def test_an_image_that_cannot_be_decoded_is_named(tmp_path):
    write_imagenet(tmp_path)
    path = tmp_path / "val" / "n03" / "v2.png"
    source = sources.load_source(make_config("image_folder", tmp_path), "test")
    for content in (b"no image", path.read_bytes()[:60]):
        path.write_bytes(content)
        text = message(source.read, 2)
        assert str(path) in text and " object at 0x" not in text


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:40]), "cannot read"),
        (lambda path: path.write_bytes(gzip.compress(b"hello there")), "not an IDX file"),
        *(
            (
                lambda path, end=end: path.write_bytes(
                    gzip.compress(gzip.decompress(path.read_bytes())[:end])
                ),
                "not an IDX file",
            )
            for end in (0, 3, 4, 7, 15)
        ),
        (
            lambda path: path.write_bytes(
                gzip.compress(bytes((0, 0, 8, 3, *bytes(4), *b"\xff" * 8)))
            ),
            "says the shape",
        ),
        (lambda path: write_idx(path, np.zeros((5, 28, 28)), gzip.open), "do not belong together"),
        (
            lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1])),
            "its header says 23536",
        ),
    ],
)
def test_damaged_idx_files_are_told_in_one_line(tmp_path, damage, words):
    write_fashion(tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    damage(path)
    text = message(sources.load_source, make_config("fashion_mnist", tmp_path, classes=10), "train")
    assert words in text and str(path) in text


def test_fashion_mnist_without_an_image_is_refused(tmp_path):
    write_fashion(tmp_path, count=0)
    for split in ("train", "test"):
        config = make_config("fashion_mnist", tmp_path, classes=10)
        said = message(sources.load_source, config, split)
        assert said == f"{tmp_path} has no {split} images: download them again"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"name": "fashion-mnist"}, 'did you mean "fashion_mnist"'),
        ({"name": "xyz"}, "use one of digits"),
        ({"name": "digits", "classes": 100}, "data.classes is 100 and digits has 10"),
        ({"name": "image_folder"}, "data.root is empty"),
        ({"name": "digits", "classes": 10, "image_size": 0}, "data.image_size is 0"),
    ],
)
def test_wrong_configs_are_told_in_one_line(fields, words):
    config = make_config(**fields)
    assert words in message(sources.load_source, config, "train")
    assert words in sources.describe_missing(config)
