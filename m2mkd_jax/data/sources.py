"""The data sets a config can name (reference section 7): where they lie, and how they load.

A source has `len`, `labels` int32 (N,) or what gives them for `labels[indices]`, `class_names`,
`name(index)`, `read(index)` -> uint8 (H, W, 3), decoded on the call, and `select(indices)`. Batches
go through its `reader()`: `evaluation_images(indices, size)` -> uint8 (B, S, S, 3), `labels_of` and
`replaced`, the damaged images.
Axes: N images, B batch, H height, W width, S wanted image size in pixels.
"""

import dataclasses
import difflib
import os
from pathlib import Path

import numpy as np

from m2mkd_jax.data import layouts
from m2mkd_jax.data.arrays import ArraySource, to_images
from m2mkd_jax.data.class_lists import wordnet_ids
from m2mkd_jax.data.formats import idx
from m2mkd_jax.data.indices import class_balanced_order
from m2mkd_jax.errors import UserError

SPLITS = ("train", "test")
_FASHION_ROOT = "/usr/share/datasets/fashion-mnist"


@dataclasses.dataclass(frozen=True)
class DataSet:
    """A data set on disk: what its user has to do, where it is looked for, how it may lie there.

    folder: below $M2MKD_DATA; tfds: below $TFDS_DATA_DIR; layouts: keys of layouts.LAYOUTS;
    renditions: whether it is a test set of some classes of another.
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
    "image_folder": DataSet("use one folder per class"),
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


def data_root(config):
    """Where a data set is looked for: a Path, or None for the embedded digits.

    `config.root`, or by default: Fashion-MNIST where its Debian package puts it; the others below
    $M2MKD_DATA (~/data), or where they are not there, prepared below $TFDS_DATA_DIR
    (~/tensorflow_datasets).
    Raises: UserError for an unknown name, or an image folder without a root.
    """
    if config.name not in NAMES:
        close = difflib.get_close_matches(str(config.name), NAMES, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(NAMES)}"
        raise UserError(f"data.name is {config.name!r}: {hint}")
    if config.name == "digits":
        return None
    if config.root:
        return Path(config.root).expanduser()
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


def _below(variable, default):
    return Path(os.environ.get(variable) or default).expanduser()


def describe_missing(config):
    """What stands between this config and its data: one line, or None when all is there.

    Cheap: lists folders, opens no image. What can only be seen in the files' contents (a broken
    image, a class folder without images, a subset larger than the data set) is found on loading.
    """
    try:
        _check_present(config)
    except UserError as error:
        return str(error)
    return None


def load_source(config, split):
    """Opens a split of the data set that a config names.

    With `config.train_images` (or `test_images`) = n > 0: the first n images of a fixed,
    class-balanced order, so that a smaller subset is part of every larger one.

    Args: config (fields name, root, image_size, classes, train_images, test_images); split,
      'train' or 'test'.
    Returns: ArraySource (digits, fashion_mnist, CIFAR's archive) or EncodedSource.
    Raises: UserError where data is missing, broken or not what the config says; ValueError for
      another split.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: use one of {', '.join(SPLITS)}")
    layout = _check_present(config)
    root = data_root(config)
    if config.name == "digits":
        source = _digits(split, config.image_size)
    elif config.name == "fashion_mnist":
        source = idx.open_split(root, split)
        images = to_images(source.images[..., 0], config.image_size)
        source = ArraySource(images, source.labels, source.class_names)
    else:
        source = _open(config, root, layout, split)
    return _subset(source, f"{split}_images", config[f"{split}_images"])


def _open(config, root, layout, split):
    data_set = DATA_SETS[config.name]
    if data_set.renditions and split == "train":
        raise UserError(f"data.name is {config.name!r}, which has test images only")
    source = layouts.open_split(root, layout, split)
    if data_set.renditions:  # data.classes counts the network's, of which these are some
        return layouts.reordered(source, wordnet_ids(config.name))
    if len(source.class_names) != config.classes:
        raise _wrong_classes(config, root, len(source.class_names))
    return source


def _wrong_classes(config, root, found):
    return UserError(
        f"{root} has {found} classes and data.classes is {config.classes}: set"
        f" data.classes={found} or point data.root elsewhere; {DATA_SETS[config.name].advice}"
    )


def _check_present(config):
    """Raises UserError where data is missing; returns the layout of a data set on disk."""
    root = data_root(config)
    if config.image_size < 1:
        raise UserError(f"data.image_size is {config.image_size}: use a number of pixels above 0")
    if config.name in ("digits", "fashion_mnist") and config.classes != 10:
        raise UserError(f"data.classes is {config.classes} and {config.name} has 10: set it to 10")
    if config.name == "digits":
        return None
    data_set = DATA_SETS[config.name]
    try:
        layout = layouts.require(root, data_set.layouts)
        if config.name == "fashion_mnist":
            idx.check_present(root)
        names = layouts.class_names(root, layout)
    except UserError as error:
        raise UserError(f"{error}; {data_set.advice}") from error
    if names is not None and not data_set.renditions and len(names) != config.classes:
        raise _wrong_classes(config, root, len(names))
    return layout


def _digits(split, size):
    """Scikit-learn's 1,797 digits of 8x8 pixels in 0-16: 1,437 to train on, 360 to test on.

    The first fifth of a fixed class-balanced order is the test split; enlarged by bicubic.
    """
    # scikit-learn takes a second to import and only this data set needs it.
    from sklearn.datasets import load_digits  # noqa: PLC0415

    digits = load_digits()
    order = class_balanced_order(digits.target)
    cut = round(len(order) / 5) + 1  # 360 is a multiple of the 10 classes, 359 is not
    chosen = np.sort(order[:cut] if split == "test" else order[cut:])
    grey = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
    return ArraySource(to_images(grey, size), digits.target[chosen], "0123456789")


def _subset(source, field, wanted):
    if not 0 <= wanted <= len(source):
        raise UserError(
            f"data.{field} is {wanted} and there are {len(source)} images: use 1 to {len(source)},"
            " or 0 for all"
        )
    return source.select(class_balanced_order(source.labels)[:wanted]) if wanted else source
