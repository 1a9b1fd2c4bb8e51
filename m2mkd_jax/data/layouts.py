"""What a directory holds: the layouts that are known, how they are told apart and opened."""

from pathlib import Path

import numpy as np

from m2mkd_jax.data.encoded import EncodedSource, FolderFiles
from m2mkd_jax.data.formats import cifar, cub, folder, idx, tar, tfds
from m2mkd_jax.errors import UserError

LAYOUTS = {
    "prepared": "a directory that TensorFlow Datasets prepared (dataset_info.json, *.array_record)",
    "cifar": "CIFAR-100's archive (train.bin, test.bin or train, test, meta)",
    "cub": "CUB-200-2011's archive (images.txt, train_test_split.txt, images/)",
    "idx": "IDX files (train-images-idx3-ubyte, ...)",
    "shards": "tar files (*train*.tar, *val*.tar)",
    "folders": folder.EXPECTED,
    "classes": "CLASS/*.jpg, a test set alone",
}
IDX_FILES = ("train-images-idx3-ubyte", "t10k-images-idx3-ubyte")


def detect(root):
    """The layout of a directory, a key of LAYOUTS; None where it is none of them."""
    root = Path(root)
    if not root.is_dir():
        return None
    if tfds.find_prepared(root):
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


def require(root, wanted):
    """The layout of a directory, one of `wanted`.

    Raises: UserError that says what was expected, and where it lies when that is close by.
    """
    found = detect(root)
    if found in wanted:
        return found
    expected = " or ".join(LAYOUTS[name] for name in wanted)
    near = next((place for place in _nearby(root) if detect(place) in wanted), None)
    hint = f"; did you mean {near}?" if near else f"; expected: {expected}"
    if not Path(root).is_dir():
        held = "is no directory"
    else:
        held = f"holds {LAYOUTS[found]}" if found else "holds nothing that is known"
    raise UserError(f"no data in {root} (data.root says where to look): it {held}{hint}")


def _nearby(root):
    root = Path(root)
    yield root.parent
    if root.is_dir():
        yield from (path for path in sorted(root.iterdir())[:50] if path.is_dir())


def class_names(root, layout):
    """The classes of a directory as far as listing folders tells: a list, or None."""
    if layout == "folders":
        return folder.check_layout(root)
    if layout == "classes":
        return folder.class_folders(root)
    return None


def test_only(root, layout):
    """Whether a directory holds a test split alone, as renditions do."""
    if layout == "shards":
        return not tar.shards(root, "train")
    if layout == "prepared":
        return not tfds.has_split(tfds.find_prepared(root), "train")
    return layout == "classes"


def open_split(root, layout, split):
    """A split of a directory as a source: 'train', or 'test'.

    Raises: UserError for what is missing or broken, and for a split without an image.
    """
    source = _open(root, layout, split)
    if not len(source):
        raise UserError(f"{root} has no {split} images: unpack or prepare it again")
    return source


def _open(root, layout, split):
    if layout == "cifar":
        return cifar.open_split(root, split)
    if layout == "idx":
        return idx.open_split(root, split)
    if layout == "cub":
        return cub.open_split(root, split)
    if layout == "shards":
        return EncodedSource(*tar.list_images(root, split))
    if layout == "prepared":
        files, names = tfds.list_images(tfds.find_prepared(root), split)
        return EncodedSource(files, tfds.RecordLabels(files), names)
    if layout == "folders":
        # What is wrong with val/ is no reason not to read train/.
        names = folder.train_classes(root) if split == "train" else folder.check_layout(root)
        paths, labels = folder.list_images(root, split, names)
    else:
        names = class_names(root, layout)
        paths, labels = folder.list_classes(root, "", names)
    return EncodedSource(FolderFiles(root, paths), labels, names)


def reordered(source, names):
    """A source whose labels follow `names`, though its own classes are others or ordered otherwise.

    TFDS numbers the classes of ImageNet-R within ImageNet's 1000, for example.
    Raises: UserError for an image of another class.
    """
    if source.class_names == tuple(names):
        return source
    place = {name: label for label, name in enumerate(names)}
    new = np.array([place.get(name, -1) for name in source.class_names], np.int32)
    if isinstance(source.labels, tfds.RecordLabels):
        labels = tfds.RecordLabels(source.files, new)
    else:
        labels = new[source.labels]
        if (labels < 0).any():
            first = int(np.argmin(labels))
            stranger = source.class_names[source.labels[first]]
            raise UserError(
                f"{source.name(first)} is of class {stranger}, not one of the {len(names)} expected"
            )
    return EncodedSource(source.files, labels, names)
