"""The known layouts of a data set on disk: telling them apart, and opening a split.

Each layout is read by a file of formats/. Axes: N images, K classes.
"""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from m2mkd_jax.data.encoded_source import EncodedImageSource
from m2mkd_jax.data.formats import cifar, cub, folder, huggingface, idx, tables, tar, tfds
from m2mkd_jax.data.formats.tables import FOUND, Columns
from m2mkd_jax.data.formats.text import readable
from m2mkd_jax.data.image_source import ImageSource
from m2mkd_jax.errors import UserError, printable
from m2mkd_jax.files.paths import as_path, check_bucket, in_bucket

LAYOUTS = {
    "huggingface": huggingface.EXPECTED,
    "tables": tables.EXPECTED,
    "prepared": "a directory that TensorFlow Datasets prepared (dataset_info.json, *.array_record)",
    "cifar": "CIFAR-100's archive (train.bin, test.bin or train, test, meta)",
    "cub": "CUB-200-2011's archive (images.txt, train_test_split.txt, images/)",
    "idx": "IDX files (train-images-idx3-ubyte, ...)",
    "shards": "tar files (*train*.tar, *val*.tar)",
    "folders": folder.EXPECTED,
    "classes": "CLASS/*.jpg, one set of images",
}
IDX_FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")


def detect(root: str | Path) -> str | None:
    """The layout of a directory, a key of LAYOUTS; None if it has no known layout."""
    root = as_path(root)
    if in_bucket(root):  # where members of shards alone can be read in place
        found = root.is_dir() and (tar.shards(root, "train") or tar.shards(root, "test"))
        return "shards" if found else None
    if tables.find(root):
        return "tables"
    if not root.is_dir():
        return None
    if huggingface.find(root):
        return "huggingface"
    if tfds.prepared_in(root):
        return "prepared"
    if cifar.find(root):
        return "cifar"
    if cub.find(root):
        return "cub"
    if any(idx.find_idx(root, name) for name in IDX_FILES):
        return "idx"
    if tar.shards(root, "train") or tar.shards(root, "test"):
        return "shards"
    if (root / "train").is_dir() or (root / "val").is_dir():
        return "folders"
    names = folder.class_folders(root)
    if any(folder.image_files(root / name) for name in names[:10]):
        return "classes"
    return None


def require(root: str | Path, wanted: Sequence[str]) -> str:
    """The layout of a directory, which must be one of `wanted`.

    Raises:
        UserError: another layout; names what is expected, and a nearby folder that has it. Or a
            directory that cannot be read.
    """
    check_bucket(as_path(root))
    try:
        found = detect(root)
    except OSError as error:  # a name that is too long, a folder that is locked
        reason = error.strerror or error
        raise UserError(f"{root} cannot be read ({reason}; data.root says where to look)") from None
    if found is not None and found in wanted:
        return found
    if in_bucket(root):
        raise UserError(
            f"no data in {root} (data.root says where to look): from a bucket {LAYOUTS['shards']} "
            "are read; pack the images so"
        )
    expected = " or ".join(LAYOUTS[name] for name in wanted)
    near = next((place for place in _nearby(root) if _readable(place) in wanted), None)
    hint = f"; did you mean {near}?" if near else f"; expected: {expected}"
    if not Path(root).is_dir():
        held = "is no directory"
    else:
        held = f"holds {LAYOUTS[found]}" if found else "holds nothing that is known"
    raise UserError(f"no data in {root} (data.root says where to look): it {held}{hint}")


def _readable(place: Path) -> str | None:
    """`detect` of a directory; None where it cannot be read, or is refused."""
    try:
        return detect(place)
    except (OSError, UserError):
        return None


def _nearby(root: str | Path) -> Iterator[Path]:
    """The parent of a folder and the first folders in it."""
    root = Path(root)
    yield root.parent
    if root.is_dir():
        yield from (path for path in sorted(root.iterdir())[:50] if path.is_dir())


def class_names(root: str | Path, layout: str, train_alone: bool = False) -> list[str] | None:
    """The class names, if listing folders is enough to know them; else None.

    Args:
        root: the directory.
        layout: its layout.
        train_alone: a folder of training images without val/ will do.

    Raises:
        UserError: folders that are missing, or with other classes than those of train/.
    """
    if layout == "folders":
        if train_alone and not has_test(root, layout):
            return folder.train_classes(root)
        return folder.check_layout(root)
    if layout == "classes":
        return folder.class_folders(root)
    return None


def has_test(root: str | Path, layout: str) -> bool:
    """Whether a directory has a test split beside its training images."""
    if layout == "folders":
        return bool(folder.test_folder(root))
    if layout == "shards":
        return bool(tar.shards(root, "test"))
    if layout == "prepared":
        return tfds.has_split(prepared(root), "test")
    if layout == "tables":
        return tables.has_test(root)
    if layout == "huggingface":
        return huggingface.has_test(root)
    return layout != "classes"


def test_only(root: str | Path, layout: str) -> bool:
    """Whether a directory has a test split but no training split, as renditions do."""
    if layout == "shards":
        return not tar.shards(root, "train")
    if layout == "prepared":
        return not tfds.has_split(prepared(root), "train")
    return layout == "classes"


def open_split(root: str | Path, layout: str, split: str, columns: Columns = FOUND) -> ImageSource:
    """Opens a split of a directory.

    Args:
        root: the directory.
        layout: its layout, from `require`.
        split: 'train' or 'test'; of class folders alone ("classes") both are the same.
        columns: where images and classes are, in layouts that have columns or keys.

    Raises:
        UserError: files that are missing or broken, or a split without images.
    """
    source = _open(root, layout, split, columns)
    if not len(source):
        raise UserError(f"{root} has no {split} images: unpack or prepare it again")
    _check_spelling(root, source.class_names)
    return source


def _check_spelling(root: str | Path, names: Sequence[str]) -> None:
    """Refuses classes that are one name in two forms of Unicode, as file systems write it."""
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise UserError(
                f"{root} has the classes {other!a} and {name!a}, one name in two forms "
                "of Unicode: give both one form"
            )


def prepared(root: str | Path) -> Path:
    """The directory that TFDS prepared, in `root` or below it.

    Raises:
        UserError: there is none, or there are several data sets.
    """
    directory = tfds.find_prepared(root)
    if directory is None:
        raise UserError(f"{root} does not hold {LAYOUTS['prepared']}")
    return directory


def _open_prepared(root: str | Path, split: str) -> ImageSource:
    files, names = tfds.list_images(prepared(root), split)
    return EncodedImageSource(files, tfds.RecordLabels(files), names)


def _open_folders(root: str | Path, split: str) -> ImageSource:
    # A fault in val/ does not keep train/ from being read.
    names = folder.train_classes(root) if split == "train" else folder.check_layout(root)
    paths, labels = folder.list_images(root, split, names)
    return EncodedImageSource(folder.FolderFiles(root, paths), labels, map(readable, names))


def _open_classes(root: str | Path, split: str) -> ImageSource:
    names = folder.class_folders(root)
    paths, labels = folder.list_classes(root, "", names)
    return EncodedImageSource(folder.FolderFiles(root, paths), labels, map(readable, names))


def _open(root: str | Path, layout: str, split: str, columns: Columns) -> ImageSource:
    if layout == "shards":
        return EncodedImageSource(*tar.list_images(root, split, columns.image))
    if layout == "tables":
        return EncodedImageSource(*tables.list_images(root, split, columns))
    if layout == "huggingface":
        return EncodedImageSource(*huggingface.list_images(root, split, columns))
    return _OPENERS[layout](root, split)


_OPENERS: dict[str, Callable[[str | Path, str], ImageSource]] = {
    "prepared": _open_prepared,
    "cifar": cifar.open_split,
    "cub": cub.open_split,
    "idx": idx.open_split,
    "folders": _open_folders,
    "classes": _open_classes,
}


def in_numeric_order(source: ImageSource) -> ImageSource:
    """The same images with their classes, all of which are whole numbers, in that order.

    Raises:
        UserError: a class with another name.
    """
    for name in source.class_names:
        if not name.isdecimal():
            raise UserError(
                f"data.numeric_order: class {printable(name)!r} is no whole number; leave it False"
            )
    return reordered(source, sorted(source.class_names, key=int))


def reordered(source: ImageSource, names: Sequence[str]) -> ImageSource:
    """Renumbers a source's labels so that they follow `names`.

    TFDS, for example, numbers the classes of ImageNet-R within ImageNet's 1000.

    Args:
        source: images whose classes may be others, or in another order.
        names: (K,), the class names in the order of the new labels.

    Raises:
        UserError: an image of another class.
    """
    if source.class_names == tuple(names):
        return source
    place = {name: label for label, name in enumerate(names)}
    new = np.array([place.get(name, -1) for name in source.class_names], np.int32)
    if isinstance(source, EncodedImageSource) and isinstance(source.labels, tfds.RecordLabels):
        # The labels are in the records, and are checked when they are read.
        return EncodedImageSource(source.files, source.labels.renumbered(new), names, source.form)
    old = np.asarray(source.labels)
    labels = new[old]
    if (labels < 0).any():
        first = int(np.argmin(labels))
        unknown = source.class_names[old[first]]
        raise UserError(
            f"{source.name(first)} is of class {unknown}, not one of the {len(names)} expected"
        )
    return source.select(np.arange(len(source)), labels, names)
