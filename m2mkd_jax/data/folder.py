"""Folders of image files: ImageNet's layout, and the original Tiny-ImageNet archive's.

    root/train/CLASS/*.JPEG          or   root/train/CLASS/images/*.JPEG
    root/val/CLASS/*.JPEG            or   root/val/images/*.JPEG with root/val/val_annotations.txt

Classes are the folder names of train/, sorted; the class of a file is its folder.
Axes: N images, B batch, H height, W width, C channels (3), S the wanted image size.
"""

import os
from pathlib import Path

import numpy as np
from PIL import Image

from m2mkd_jax.data import augment
from m2mkd_jax.errors import UserError

_SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".webp")
_FOLDERS = {"train": "train", "test": "val"}
_ANNOTATIONS = "val_annotations.txt"


class FolderSource:
    """Images that are decoded when they are asked for.

    Attributes: root, a path; files bytes (N,), paths below root; labels int32 (N,);
    class_names, a tuple of strings; size S, pixels of `evaluation_images`.
    """

    def __init__(self, root, files, labels, class_names, size):
        self.root = os.fspath(root)
        # Encoded, in one array: a million str objects take 150 MB in every worker.
        self.files = np.asarray(files)
        self.labels = np.asarray(labels, np.int32)
        self.class_names = tuple(class_names)
        self.size = size

    def __len__(self):
        return len(self.labels)

    def path(self, index):
        """Where an image lies."""
        return os.path.join(self.root, os.fsdecode(bytes(self.files[index])))

    def read(self, index):
        """One image as a PIL image in RGB, as large as the file has it.

        Raises: UserError for a file that cannot be decoded.
        """
        try:
            with Image.open(self.path(index)) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"cannot decode the image {self.path(index)} ({reason}): replace or remove it"
            ) from error

    def evaluation_images(self, indices):
        """The images at `indices` int (B,), resized and cut to the centre: uint8 (B, S, S, 3)."""
        return np.stack([augment.evaluation_image(self.read(i), self.size) for i in indices])

    def select(self, indices, labels=None, class_names=None):
        """A source of only these images, in this order; with other labels where given."""
        labels = self.labels[indices] if labels is None else labels
        return FolderSource(
            self.root, self.files[indices], labels, class_names or self.class_names, self.size
        )


def check_layout(root, classes, advice):
    """Looks whether a data set is there, by listing folders only.

    Args: root, a path; classes, how many there must be; advice, one phrase on how to get it.
    Returns: the class names, sorted.
    Raises: UserError for a missing folder, or another number of classes.
    """
    root = Path(root)
    for name in ("train", "val"):
        if not (root / name).is_dir():
            raise UserError(
                f"no data in {root}: there is no folder {name}/, and train/CLASS/*.JPEG and"
                f" val/CLASS/*.JPEG are expected (data.root says where to look); {advice}"
            )
    names = _class_folders(root / "train")
    if len(names) != classes:
        raise UserError(
            f"{root / 'train'} has {len(names)} class folders and data.classes is {classes}:"
            f" set data.classes={len(names)} or point data.root elsewhere; {advice}"
        )
    if not (root / "val" / _ANNOTATIONS).is_file():
        _check_same_classes(root / "val", names, _class_folders(root / "val"))
    return names


def list_images(root, split, names):
    """The files of a split, in a fixed order, without opening any.

    Args: root, a path that `check_layout` accepts; split 'train' or 'test'; names, the classes.
    Returns: files bytes (N,), paths below root; labels int32 (N,).
    Raises: UserError for a class without images or a broken annotation file.
    """
    root = Path(root)
    folder = _FOLDERS[split]
    if split == "test" and (root / folder / _ANNOTATIONS).is_file():
        return _annotated(root, names)
    files, labels = [], []
    for label, name in enumerate(names):
        below = os.path.join(folder, name)
        if (root / below / "images").is_dir():
            below = os.path.join(below, "images")
        found = sorted(_image_files(root / below))
        if not found:
            raise UserError(f"no image file in {root / below}: add some or remove the folder")
        files += [os.fsencode(os.path.join(below, file)) for file in found]
        labels += [label] * len(found)
    return np.array(files), np.array(labels, np.int32)


def _annotated(root, names):
    """Tiny-ImageNet's val/: flat, with lines of file name, tab, class, tab, box."""
    path = root / "val" / _ANNOTATIONS
    present = set(_image_files(root / "val" / "images"))
    numbers = {name: label for label, name in enumerate(names)}
    files, labels = [], []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        file, _, rest = line.partition("\t")
        name = rest.split("\t")[0].strip()
        if name not in numbers:
            raise UserError(
                f"{path} line {number}: class {name!r} has no folder in {root / 'train'}:"
                " unpack the archive again"
            )
        if file not in present:
            raise UserError(
                f"{path} line {number}: no image {file!r} in {root / 'val' / 'images'}:"
                " unpack the archive again"
            )
        files.append(os.fsencode(os.path.join("val", "images", file)))
        labels.append(numbers[name])
    _check_same_classes(path, names, [names[label] for label in sorted(set(labels))])
    return np.array(files), np.array(labels, np.int32)


def _check_same_classes(where, names, found):
    missing, unknown = sorted(set(names) - set(found)), sorted(set(found) - set(names))
    if missing:
        raise UserError(
            f"{where} lacks {len(missing)} of the {len(names)} classes of train/"
            f" (the first: {missing[0]}): validation needs every class once or more"
        )
    if unknown:
        raise UserError(
            f"{where} has {len(unknown)} classes that train/ lacks (the first: {unknown[0]}):"
            " remove them or add them to train/"
        )


def _class_folders(folder):
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _image_files(folder):
    if not os.path.isdir(folder):
        return []
    return [
        name for name in os.listdir(folder)
        if name.lower().endswith(_SUFFIXES) and not name.startswith(".")
    ]
