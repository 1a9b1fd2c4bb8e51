"""Shards: tar files that hold the images of a split, read in place, never unpacked.

    root/*train*.tar, root/*val*.tar        (or in root/train/, root/val/; "test" for "val")

The class of an image is the folder that it lies in inside the tar (CLASS/name.JPEG or
CLASS/images/name.JPEG), or the number in a file of the same name beside it (name.jpg, name.cls),
then named by line in root/classes.txt where that is there. Axes: N images.
"""

import os
import re
import tarfile
from pathlib import Path

import numpy as np

from m2mkd_jax.data.decode import SUFFIXES
from m2mkd_jax.data.formats.folder import check_same_classes
from m2mkd_jax.errors import UserError

_EXPECTED = {"train": ("*train*.tar",), "test": ("*val*.tar", "*test*.tar")}
_CLASS_BYTES = 1024  # of a .cls file that are looked at
_SPLITS = {"train": re.compile("train"), "test": re.compile("val|test")}


class TarFiles:
    """Members of tar files.

    shards, paths; shard int (N,), which of them; start, size int64 (N,), bytes of the member.
    """

    def __init__(self, shards, shard, start, size):
        self.shards = [os.fspath(path) for path in shards]
        self.shard, self.start, self.size = shard, start, size

    def __len__(self):
        return len(self.shard)

    def name(self, index):
        """Where a member lies: tar file and byte."""
        return f"{self.shards[self.shard[index]]} at byte {self.start[index]}"

    def content(self, index):
        """A member's bytes."""
        # Opened anew: a thousand open shards are more than a process may have.
        with open(self.shards[self.shard[index]], "rb") as file:
            file.seek(self.start[index])
            return file.read(self.size[index])

    def take(self, indices):
        """Only these members, in this order."""
        return TarFiles(self.shards, *(a[indices] for a in (self.shard, self.start, self.size)))


def shards(root, split):
    """The sorted tar files of a split below `root`, by their names."""
    root, pattern = Path(root), _SPLITS[split]
    found = [path for path in root.glob("*.tar") if pattern.search(path.name)]
    for folder in root.iterdir():
        if folder.is_dir() and pattern.fullmatch(folder.name):
            found += folder.glob("*.tar")
    return sorted(found)


def list_images(root, split):
    """The members of a split, in the order of class, then path; reads headers only.

    About 50 us per image. Returns: TarFiles, labels int32 (N,), class names.
    A test set may lie there alone. Raises: UserError for a split without tar files, for tar files
    that are broken, or have no classes, or not those of train.
    """
    if not shards(root, split):
        raise UserError(f"{root} has no {split} shards: {' or '.join(_EXPECTED[split])} expected")
    members, classes = _members(root, split)
    names = sorted(classes)
    if split == "test" and shards(root, "train"):
        names = sorted(_members(root, "train")[1])
        check_same_classes(f"{root} (test shards)", names, sorted(classes))
    number = {name: label for label, name in enumerate(names)}
    members.sort(key=lambda member: (number[member[0]], member[1]))
    labels = np.array([number[member[0]] for member in members], np.int32)
    shard, start, size = (np.array([member[i] for member in members], np.int64) for i in (2, 3, 4))
    return TarFiles(shards(root, split), shard, start, size), labels, _titles(root, names)


def _members(root, split):
    """[(class, path, shard, start, size)] and the set of classes."""
    members = []
    for number, path in enumerate(shards(root, split)):
        try:
            with tarfile.open(path, "r:") as tar:
                members += _shard_members(tar, number, path)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"cannot read the shard {path} ({error}): copy it again") from error
    return members, {member[0] for member in members}


def _shard_members(tar, number, path):
    classes, found = {}, []
    for member in tar:
        stem, suffix = os.path.splitext(member.name)
        if not member.isfile() or os.path.basename(stem).startswith("."):
            continue
        if suffix == ".cls":
            text = tar.extractfile(member).read(_CLASS_BYTES)
            classes[stem] = text.decode(errors="replace").strip()
        elif suffix.lower() in SUFFIXES:
            folders = [part for part in member.name.split("/")[:-1] if part != "images"]
            found.append((folders[-1] if folders else "", stem, member))
    for folder, stem, member in found:
        name = classes.get(stem, folder)
        if not name:
            raise UserError(
                f"{path}: {member.name} has no class: it must lie in a folder of its class's name,"
                f" or have its number beside it in {stem}.cls"
            )
        # Numbers as equally wide text, so that they sort as numbers do.
        name = name.zfill(6) if stem in classes and name.isdecimal() else name
        yield name, member.name, number, member.offset_data, member.size


def _titles(root, names):
    titles = Path(root) / "classes.txt"
    if titles.is_file() and all(name.isdecimal() for name in names):
        lines = titles.read_text().splitlines()
        if len(lines) < int(names[-1]) + 1:
            raise UserError(f"{titles} has {len(lines)} lines and the shards class {names[-1]}")
        return tuple(lines[int(name)] for name in names)
    return tuple(names)
