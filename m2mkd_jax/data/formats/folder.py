"""Folders of image files, as in ImageNet, the Tiny-ImageNet archive and ImageNet-R.

    root/train/CLASS/*.JPEG          or in folders below CLASS, such as CLASS/images/*.JPEG
    root/val/CLASS/*.JPEG            or   root/val/images/*.JPEG with root/val/val_annotations.txt,
                                     or   root/val/*.JPEG with a list (flat_list.py)

    root/train, root/test            likewise; test/ beside val/, as of ImageNet, is left alone

    root/CLASS/*.jpg                 a test split only (ImageNet-R)

Classes are the folder names, sorted. Files that are images by their names count, and in a folder
without any those that are arrays (.npy); others are left out, and named but for texts. So
are images in no folder of a class.
Axes: N images.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from m2mkd_jax.data.decode import ARRAY_SUFFIX, SUFFIXES
from m2mkd_jax.data.formats import flat_list
from m2mkd_jax.errors import UserError, printable

_ANNOTATIONS = "val_annotations.txt"
_TEXTS = (".txt", ".csv", ".tsv", ".json", ".xml", ".md", ".ini", ".db")  # beside images
_NO_IMAGE = f"no image by its name ({', '.join(SUFFIXES)})"
_NAMED = 10  # classes that a message names
EXPECTED = "train/CLASS/*.JPEG and val/CLASS/*.JPEG"


class FolderFiles:
    """`EncodedFiles` that are image files below one folder."""

    def __init__(self, root: str | Path, paths: np.ndarray) -> None:
        """Refers to files below a folder.

        Args:
            root: the folder.
            paths: bytes (N,), the files' paths below it.
        """
        self.root = os.fspath(root)
        # Encoded, in one array: a million str objects take 150 MB in every worker.
        self.paths = np.asarray(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """The path of a file."""
        return os.path.join(self.root, os.fsdecode(bytes(self.paths[index])))

    def content(self, index: int) -> bytes:
        """A file's bytes."""
        with open(self.name(index), "rb") as file:
            return file.read()

    def take(self, indices: np.ndarray) -> "FolderFiles":
        """The files at `indices`, in this order."""
        return FolderFiles(self.root, self.paths[indices])


def check_layout(root: str | Path) -> list[str]:
    """Checks that train/ and val/ (or test/) have the same classes, by listing folders only.

    Returns:
        The class names, sorted.

    Raises:
        UserError: a missing folder, a val/ without classes, or with other classes than train/.
    """
    root, names = Path(root), train_classes(root)
    if test_folder(root) == "test":
        check_same_classes(root / "test", names, class_folders(root / "test"))
        return names
    _require_folder(root, "val")
    if not (root / "val" / _ANNOTATIONS).is_file() and not flat_list.find(root):
        found = class_folders(root / "val")
        flat = not found or found == ["images"]
        loose = image_files(root / "val") or image_files(root / "val" / "images")
        if flat and loose:
            raise UserError(
                f"{root / 'val'} is flat, {len(loose)} images without their classes:"
                f" val/CLASS/*.JPEG, val/{_ANNOTATIONS} (Tiny-ImageNet's) or a list"
                f" ({' or '.join(flat_list.NAMES)}) is expected"
            )
        check_same_classes(root / "val", names, found)
    return names


def test_folder(root: str | Path) -> str:
    """The folder of the test images: val, or test where there is no val; "" if there is neither."""
    return next((name for name in ("val", "test") if (Path(root) / name).is_dir()), "")


def train_classes(root: str | Path) -> list[str]:
    """The class names of train/, sorted; val/ is not looked at.

    Raises:
        UserError: train/ is missing or has no class folders.
    """
    _require_folder(root, "train")
    names = class_folders(Path(root) / "train")
    if not names:
        raise UserError(f"{Path(root) / 'train'} has no class folders: {EXPECTED} are expected")
    return names


def _require_folder(root: str | Path, name: str) -> None:
    if not (Path(root) / name).is_dir():
        alone = ", or data.validation=0.1 with train/ alone" if name == "val" else ""
        raise UserError(f"{root} has no folder {name}/: {EXPECTED} are expected{alone}")


def list_images(
    root: str | Path, split: str, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Lists the files of a split, in a fixed order, without opening any.

    Args:
        root: the folder of train/ and val/.
        split: 'train' or 'test'.
        names: the classes.

    Returns:
        Paths below root, bytes (N,), and labels, int32 (N,).

    Raises:
        UserError: a class without images or a broken annotation file.
    """
    root = Path(root)
    if split == "test" and (root / "val" / _ANNOTATIONS).is_file():
        return _annotated(root, names)
    if split == "test" and (path := flat_list.find(root)):
        return _listed(root, path, names)
    return list_classes(root, test_folder(root) if split == "test" else "train", names)


def list_classes(
    root: str | Path, folder: str, names: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Lists the files of the class folders `names` in root/folder.

    Returns:
        Paths below root, bytes (N,), and labels, int32 (N,).

    Raises:
        UserError: a class without images.
    """
    root = Path(root)
    files: list[bytes] = []
    labels: list[int] = []
    left_out: list[str] = []
    for label, name in enumerate(names):
        below = os.path.join(folder, name)
        found, others = files_below(root / below)
        if not found:
            raise UserError(f"no image file in {root / below}: add some or remove the folder")
        left_out += [os.path.join(below, file) for file in others]
        files += [os.fsencode(os.path.join(below, file)) for file in found]
        labels += [label] * len(found)
    say_left_out(root, left_out)
    loose = [os.path.join(folder, name) for name in image_files(root / folder)]
    say_left_out(root, loose, "in no folder of a class")
    return np.array(files), np.array(labels, np.int32)


def files_below(folder: str | Path) -> tuple[list[str], list[str]]:
    """Paths below a folder, at any depth: image files, sorted, and others that are no texts.

    Raises:
        UserError: a link leads back to a folder that holds it: its images would count again.
    """
    images, others = list[str](), list[str]()
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in folders:
            _check_link(os.path.join(parent, name))
        prefix = os.path.relpath(parent, folder)
        for name in names:
            path = name if prefix == "." else os.path.join(prefix, name)
            if is_image(name):
                images.append(path)
            elif not name.startswith(".") and not is_text(name):
                others.append(path)
    if not images:
        images = [path for path in others if path.lower().endswith(ARRAY_SUFFIX)]
        others = [path for path in others if not path.lower().endswith(ARRAY_SUFFIX)]
    return sorted(images), others


def is_text(name: str) -> bool:
    """Whether a file beside images is a text by its name, which is left out without a word."""
    return name.lower().endswith(_TEXTS)


def say_left_out(root: Path, paths: Sequence[str], reason: str = _NO_IMAGE) -> None:
    """Names files below a folder, or in a tar file, that are left out, if any.

    Args:
        root: the folder.
        paths: below it.
        reason: why they are left out.
    """
    if paths:
        more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
        named = ", ".join(printable(str(root / path)) for path in sorted(paths)[:3])
        print(f"warning: left out, {reason}: {named}{more}", file=sys.stderr)


def _annotated(root: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Tiny-ImageNet's flat val/, whose table has lines of file name, tab, class, tab, box."""
    path = root / "val" / _ANNOTATIONS
    present = set(image_files(root / "val" / "images"))
    numbers = {name: label for label, name in enumerate(names)}
    files, labels = [], []
    # File names are bytes, in whatever encoding.
    lines = os.fsdecode(path.read_bytes()).splitlines()
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
                f"{path} line {number}: no image {file!r} in {root / 'val' / 'images'}, or named"
                " before: unpack the archive again"
            )
        present.remove(file)  # a second line finds it missing
        files.append(os.fsencode(os.path.join("val", "images", file)))
        labels.append(numbers[name])
    check_same_classes(path, names, [names[label] for label in sorted(set(labels))])
    if present:
        raise UserError(
            f"{path} has no line for {len(present)} of the images beside it (the first:"
            f" {min(present)!r}): unpack the archive again"
        )
    return np.array(files), np.array(labels, np.int32)


def _listed(root: Path, path: Path, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """A flat val/ whose classes a list gives."""
    folder = "val" if image_files(root / "val") else os.path.join("val", "images")
    rows = flat_list.read(path, image_files(root / folder), names)
    labels = np.array([label for _, label in rows], np.int32)
    check_same_classes(path, names, [names[label] for label in np.unique(labels)])
    return np.array([os.fsencode(os.path.join(folder, file)) for file, _ in rows]), labels


def check_same_classes(where: str | Path, names: Sequence[str], found: Sequence[str]) -> None:
    """Checks that a test split has the classes of the training split.

    Args:
        where: the place of the test split, for messages.
        names: the training classes.
        found: the test classes.

    Raises:
        UserError: a class is missing or unknown.
    """
    missing, unknown = sorted(set(names) - set(found)), sorted(set(found) - set(names))
    if missing:
        raise UserError(
            f"{where} lacks {len(missing)} of the {len(names)} classes of train/"
            f" (the first: {_some(missing)}): validation needs every class once or more"
        )
    if unknown:
        raise UserError(
            f"{where} has {len(unknown)} classes that train/ lacks (the first: {_some(unknown)}):"
            " remove them or add them to train/"
        )


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED])


def _check_link(path: str) -> None:
    """Refuses a link to a folder that holds it."""
    if not os.path.islink(path):
        return
    target, parent = os.path.realpath(path), os.path.realpath(os.path.dirname(path))
    if os.path.commonpath([target, parent]) == target:
        raise UserError(f"{path} is a link to {target}, which holds it: remove the link")


def class_folders(folder: str | Path) -> list[str]:
    """The names of the folders in a folder, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def image_files(folder: str | Path) -> list[str]:
    """The names of the image files in a folder, without hidden ones; [] if it does not exist."""
    if not os.path.isdir(folder):
        return []
    names = os.listdir(folder)
    return [n for n in names if is_image(n)] or [n for n in names if is_image(n, (ARRAY_SUFFIX,))]


def is_image(name: str, suffixes: tuple[str, ...] = SUFFIXES) -> bool:
    """Whether a file is an image by its name."""
    return name.lower().endswith(suffixes) and not name.startswith(".")
