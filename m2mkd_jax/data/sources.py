"""The data sets a config can name (reference section 7): where they lie, and how they load.

A source has `len`, `labels` int32 (N,), `class_names`, `read(index)` -> PIL image,
`evaluation_images(indices)` -> uint8 (B, S, S, 3) and `select(indices)`.
Axes: N images, B batch, S image size in pixels.
"""

import difflib
import os
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from m2mkd_jax.data import folder, idx
from m2mkd_jax.data.arrays import ArraySource, to_images
from m2mkd_jax.data.indices import class_balanced_order
from m2mkd_jax.errors import UserError

SPLITS = ("train", "test")
_FASHION_ROOT = "/usr/share/datasets/fashion-mnist"
_FASHION_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)
_FASHION_STEMS = {"train": "train", "test": "t10k"}
_FOLDER_NAMES = {"imagenet": "imagenet", "tiny_imagenet": "tiny-imagenet-200"}
_ADVICE = {
    "fashion_mnist": "get it with `apt-get install dataset-fashion-mnist`, or put the four"
    " Fashion-MNIST IDX files there",
    "image_folder": "use one folder per class",
    "imagenet": "register at image-net.org, download ILSVRC2012 and unpack it into one folder per"
    " class",
    "tiny_imagenet": "download tiny-imagenet-200.zip of Stanford's cs231n and unpack it there",
}
NAMES = ("digits", *_ADVICE)


def data_root(config):
    """Where a data set is looked for: a Path, or None for the embedded digits.

    `config.root`, or by default: Fashion-MNIST where its Debian package puts it, the ImageNets
    below $M2MKD_DATA, which defaults to ~/data.
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
    if config.name == "image_folder":
        raise UserError(
            "data.root is empty: data.name='image_folder' needs the folder that holds train/"
            " and val/"
        )
    return Path(os.environ.get("M2MKD_DATA") or "~/data").expanduser() / _FOLDER_NAMES[config.name]


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
    Returns: ArraySource (digits, fashion_mnist) or FolderSource.
    Raises: UserError where data is missing, broken or not what the config says; ValueError for
      another split.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}: use one of {', '.join(SPLITS)}")
    names = _check_present(config)
    if config.name == "digits":
        source = _digits(split, config.image_size)
    elif config.name == "fashion_mnist":
        source = _fashion_mnist(data_root(config), split, config.image_size)
    else:
        root = data_root(config)
        files, labels = folder.list_images(root, split, names)
        source = folder.FolderSource(root, files, labels, names, config.image_size)
    return _subset(source, f"{split}_images", config[f"{split}_images"])


def _check_present(config):
    """Raises UserError where data is missing; returns the class names of an image folder."""
    root = data_root(config)
    if config.image_size < 1:
        raise UserError(f"data.image_size is {config.image_size}: use a number of pixels above 0")
    if config.name not in ("digits", "fashion_mnist"):
        return folder.check_layout(root, config.classes, _ADVICE[config.name])
    if config.classes != 10:
        raise UserError(f"data.classes is {config.classes} and {config.name} has 10: set it to 10")
    if config.name == "fashion_mnist":
        for stem in _FASHION_STEMS.values():
            for name in _idx_names(stem):
                if idx.find_idx(root, name) is None:
                    raise UserError(
                        f"no data in {root}: there is no {name} or {name}.gz"
                        f" (data.root says where to look); {_ADVICE[config.name]}"
                    )
    return None


def _idx_names(stem):
    return f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte"


def _fashion_mnist(root, split, size):
    images_path, labels_path = (
        idx.find_idx(root, name) for name in _idx_names(_FASHION_STEMS[split])
    )
    images, labels = idx.read_idx(images_path), idx.read_idx(labels_path)
    if images.ndim != 3 or labels.shape != images.shape[:1] or labels.max(initial=0) > 9:
        raise UserError(
            f"{images_path} with shape {images.shape} and {labels_path} with {labels.shape} do not"
            " belong together: download both again"
        )
    return ArraySource(to_images(images, size), labels, _FASHION_CLASSES)


def _digits(split, size):
    """Scikit-learn's 1,797 digits of 8x8 pixels in 0-16: 1,437 to train on, 360 to test on.

    The first fifth of a fixed class-balanced order is the test split; enlarged by bicubic.
    """
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
