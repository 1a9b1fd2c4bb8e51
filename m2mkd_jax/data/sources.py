"""The data sets a config can name: where they are looked for, and how they are loaded.

Source: docs/reference.md#data.
"""

import contextlib
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.arguments import at_home
from m2mkd_jax.data import layouts
from m2mkd_jax.data.array_source import ArrayImageSource, to_images
from m2mkd_jax.data.channels import channels_of
from m2mkd_jax.data.class_lists import wordnet_ids
from m2mkd_jax.data.decode import RGB, DamagedImage, Form
from m2mkd_jax.data.digits_scene import load_digits
from m2mkd_jax.data.encoded_source import EncodedImageSource
from m2mkd_jax.data.formats import idx
from m2mkd_jax.data.formats.tables import Columns
from m2mkd_jax.data.image_source import ImageSource
from m2mkd_jax.data.indices import class_balanced_order, held_out
from m2mkd_jax.errors import UserError, did_you_mean
from m2mkd_jax.files.paths import as_path

SPLITS = ("train", "validation", "test")
_FASHION_ROOT = "/usr/share/datasets/fashion-mnist"


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set on disk.

    Attributes:
        advice: how to get it, for messages.
        folder: its folder below $M2MKD_DATA.
        tfds: its prepared folder below $TFDS_DATA_DIR.
        layouts: the layouts it may have, keys of layouts.LAYOUTS.
        renditions: whether it is a test set with some classes of another data set.
    """

    advice: str
    folder: str = ""
    tfds: str = ""
    layouts: tuple[str, ...] = ("folders", "shards", "prepared")
    renditions: bool = False


DATA_SETS = {
    "fashion_mnist": DataSet(
        "get it with `apt-get install dataset-fashion-mnist`, or put the four Fashion-MNIST IDX"
        " files there",
        layouts=("idx",),
    ),
    "image_folder": DataSet(
        "use one folder per class",
        layouts=("folders", "shards", "prepared", "classes", "tables", "huggingface"),
    ),
    "imagenet": DataSet(
        "register at image-net.org, download ILSVRC2012 and unpack it into one folder per class",
        "imagenet",
        "imagenet2012",
    ),
    "tiny_imagenet": DataSet(
        "download tiny-imagenet-200.zip of Stanford's cs231n and unpack it there",
        "tiny-imagenet-200",
        "tiny_imagenet",
    ),
    "imagenet_r": DataSet(
        "download imagenet-r.tar (github.com/hendrycks/imagenet-r) and unpack it there",
        "imagenet-r",
        "imagenet_r",
        ("classes", "shards", "prepared"),
        True,
    ),
    "tiny_imagenet_r": DataSet(
        "download Tiny-ImageNet-R (zenodo.org/records/6653675) and unpack it there",
        "tiny-imagenet-r",
        "tiny_imagenet_r",
        ("classes", "shards", "prepared"),
        True,
    ),
    "cifar100": DataSet(
        "download cifar-100-binary.tar.gz (cs.toronto.edu/~kriz/cifar.html) and unpack it there",
        "cifar-100",
        "cifar100",
        ("cifar", "prepared"),
    ),
    "cub": DataSet(
        "download CUB_200_2011.tgz (vision.caltech.edu) and unpack it there",
        "CUB_200_2011",
        "caltech_birds2011",
        ("cub", "prepared"),
    ),
}
NAMES = ("digits", *DATA_SETS)


def data_root(config: Any) -> Path | None:
    """The directory where a data set is looked for; None for the embedded digits.

    `config.root` if it is set. By default Fashion-MNIST is looked for where its Debian package
    installs it, the others below $M2MKD_DATA (~/data), then, prepared by TFDS, below
    $TFDS_DATA_DIR (~/tensorflow_datasets).

    Raises:
        UserError: an unknown name, or an image folder without a root.
    """
    if config.name not in NAMES:
        hint = did_you_mean(str(config.name), NAMES, f"use one of {', '.join(NAMES)}")
        raise UserError(f"data.name is {config.name!r}: {hint}")
    if config.name == "digits":
        return None
    if config.root:
        return as_path(config.root)
    if config.name == "fashion_mnist":
        return Path(_FASHION_ROOT)
    data_set = DATA_SETS[config.name]
    if not data_set.folder:
        raise UserError(
            f"data.root is empty: data.name='{config.name}' needs the folder that holds train/"
            " and val/"
        )
    own = _below("M2MKD_DATA", "~/data") / data_set.folder
    prepared = _below("TFDS_DATA_DIR", "~/tensorflow_datasets") / data_set.tfds
    return prepared if prepared.is_dir() and not own.is_dir() else own


def _below(variable: str, default: str) -> Path:
    """The directory that an environment variable names, or the default."""
    return at_home(os.environ.get(variable) or default)


def describe_missing(config: Any) -> str | None:
    """What keeps the config's data from being loaded, in one line; None if nothing does.

    Lists folders but opens no image: broken images, class folders without images and subsets larger
    than the data set are found on loading.
    """
    try:
        _check_present(config)
        if not has_test(config):
            _require_validation(config)
    except UserError as error:
        return str(error)
    return None


def load_source(config: Any, split: str) -> ImageSource:
    """Opens a split of the data set that a config names.

    With `config.validation` = 0 the validation images are the test images. Above 0 they are that
    share of the training images, and stand for the test images where there are none (`has_test`).

    With `config.train_images` (or `test_images`) = n > 0: the first n images of a fixed,
    class-balanced order, so that a smaller subset is part of every larger one.

    Args:
        config: fields name, root, image_size, classes, train_images and test_images, and those of
            channels, validation, validation_seed, numeric_order, orientation, image_column and
            label_column that are not as config.data has them by default.
        split: 'train', 'validation' or 'test'.

    Raises:
        UserError: data that is missing, broken or not what the config says.
        ValueError: another split.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: use one of {', '.join(SPLITS)}")
    layout = _check_present(config)
    share = config.get("validation", 0.0)
    if split == "validation" and not share:
        split = "test"
    if split == "test" and not has_test(config):
        _require_validation(config)
        split = "validation"
    source = _whole(config, layout, "test" if split == "test" else "train")
    if share and split != "test":
        kept, held = _held_out(config, source, share)
        source = source.select(held if split == "validation" else kept)
    if split == "validation":
        return source
    return _subset(source, f"{split}_images", config[f"{split}_images"])


def has_test(config: Any) -> bool:
    """Whether the data of a config, which are there, have test images of their own."""
    root = data_root(config)
    layout = None if root is None else layouts.detect(root)
    if root is None or layout is None or DATA_SETS[config.name].renditions:
        return True
    return layouts.has_test(root, layout)


def _require_validation(config: Any) -> None:
    """Raises UserError where nothing is held out of the only images there are."""
    if not config.get("validation", 0.0):
        raise UserError(
            f"{data_root(config)} has training images alone: set data.validation=0.1 to hold out a"
            " tenth of them, or add test images"
        )


def _held_out(config: Any, source: ImageSource, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The images of a whole training split that train, and those that validate."""
    try:
        return held_out(np.asarray(source.labels), share, config.get("validation_seed", 0))
    except UserError as error:
        raise UserError(f"{data_root(config) or config.name}: {error}") from None


def _whole(config: Any, layout: str | None, split: str) -> ImageSource:
    """All images of a split on disk: 'train' or 'test'."""
    root = data_root(config)
    channels = channels_of(config)
    if root is None or layout is None:
        return _digits(split, config.image_size, channels)
    if config.name == "fashion_mnist":
        grey = idx.open_split(root, split)
        if not len(grey):
            raise UserError(f"{root} has no {split} images: download them again")
        images = to_images(grey.images[..., 0], config.image_size)
        return ArrayImageSource(images[..., :channels], grey.labels, grey.class_names)
    source = _in_form(config, _open(config, root, layout, split))
    return layouts.in_numeric_order(source) if config.get("numeric_order", False) else source


def _in_form(config: Any, source: ImageSource) -> ImageSource:
    """The images with the channels of a config, upright where it says so.

    Raises:
        UserError: the images have other channels; of files the first one is looked at.
    """
    form = Form(channels_of(config), config.get("orientation", False))
    if form == RGB:
        return source
    if not isinstance(source, EncodedImageSource):
        if form.channels != RGB.channels:
            raise UserError(
                f"data.channels is {form.channels}: {config.name} is read in RGB; set it to 3"
            )
        return source
    source = source.with_form(form)
    if form.channels != RGB.channels:
        with contextlib.suppress(DamagedImage):  # which are counted where they are read
            source.read(0)
    return source


def _open(config: Any, root: Path, layout: str, split: str) -> ImageSource:
    data_set = DATA_SETS[config.name]
    if data_set.renditions and split == "train":
        raise UserError(f"data.name is {config.name!r}, which has test images only")
    columns = Columns(config.get("image_column", ""), config.get("label_column", ""))
    source = layouts.open_split(root, layout, split, columns)
    if data_set.renditions:  # data.classes is the network's class count, which is larger
        return layouts.reordered(source, wordnet_ids(config.name))
    if len(source.class_names) != config.classes:
        raise _wrong_classes(config, root, len(source.class_names))
    return source


def _wrong_classes(config: Any, root: Path, found: int) -> UserError:
    return UserError(
        f"{root} has {found} classes and data.classes is {config.classes}: set"
        f" data.classes={found} or point data.root elsewhere; {DATA_SETS[config.name].advice}"
    )


def _check_present(config: Any) -> str | None:
    """Raises UserError for missing data; returns the layout on disk, None for the digits."""
    root = data_root(config)
    if config.image_size < 1:
        raise UserError(f"data.image_size is {config.image_size}: use a number of pixels above 0")
    if config.name in ("digits", "fashion_mnist") and config.classes != 10:
        raise UserError(f"data.classes is {config.classes} and {config.name} has 10: set it to 10")
    if root is None:
        return None
    data_set = DATA_SETS[config.name]
    try:
        layout = layouts.require(root, data_set.layouts)
        if config.name == "fashion_mnist":
            idx.check_present(root)
        alone = bool(config.get("validation", 0.0))
        names = layouts.class_names(root, layout, alone)
    except UserError as error:
        raise UserError(f"{error}; {data_set.advice}") from error
    if names is not None and not data_set.renditions and len(names) != config.classes:
        raise _wrong_classes(config, root, len(names))
    return layout


def _digits(split: str, size: int, channels: int) -> ArrayImageSource:
    """Scikit-learn's 1,797 digits of 8x8 pixels in 0-16: 1,437 for training, 360 for testing.

    The test split is the first fifth of a fixed class-balanced order. Enlarged to `size`, bicubic.
    """
    images, classes = load_digits()
    order = class_balanced_order(classes)
    cut = round(len(order) / 5) + 1  # 360 is a multiple of the 10 classes, 359 is not
    chosen = np.sort(order[:cut] if split == "test" else order[cut:])
    grey = np.round(images[chosen] * 255).astype(np.uint8)
    return ArrayImageSource(to_images(grey, size)[..., :channels], classes[chosen], "0123456789")


def _subset(source: ImageSource, field: str, wanted: int) -> ImageSource:
    """The first `wanted` images of the class-balanced order; 0: all."""
    if not 0 <= wanted <= len(source):
        raise UserError(
            f"data.{field} is {wanted} and there are {len(source)} images: use 1 to {len(source)},"
            " or 0 for all"
        )
    return (
        source.select(class_balanced_order(np.asarray(source.labels))[:wanted])
        if wanted
        else source
    )
