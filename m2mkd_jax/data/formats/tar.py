"""Shards: tar files with the images of a split, read in place without unpacking.

    root/*train*.tar, root/*val*.tar        (or in root/train/, root/val/; "test" for "val")

The class of an image is its folder inside the tar (CLASS/name.JPEG or CLASS/images/name.JPEG), or
the number in a file of the same name beside it (name.jpg, name.cls); line n of root/classes.txt, if
it exists, names class n. Axes: N images.
"""

import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from m2mkd_jax.data.decode import SUFFIXES
from m2mkd_jax.data.formats.folder import check_same_classes
from m2mkd_jax.errors import UserError

_EXPECTED = {"train": ("*train*.tar",), "test": ("*val*.tar", "*test*.tar")}
_CLASS_BYTES = 1024  # read of a .cls file
# (class, path, shard number, first byte, bytes)
_Member = tuple[str, str, int, int, int]
_SPLITS = {"train": re.compile("train"), "test": re.compile("val|test")}


class TarFiles:
    """`EncodedFiles` that are members of tar files."""

    def __init__(
        self,
        shards: Sequence[str | Path],
        shard: np.ndarray,
        start: np.ndarray,
        size: np.ndarray,
    ) -> None:
        """Refers to members of tar files.

        Args:
            shards: paths of the tar files.
            shard: int (N,), the tar file of each member, a position in `shards`.
            start: int64 (N,), the member's first byte.
            size: int64 (N,), its number of bytes.
        """
        self.shards = [os.fspath(path) for path in shards]
        self.shard, self.start, self.size = shard, start, size

    def __len__(self) -> int:
        return len(self.shard)

    def name(self, index: int) -> str:
        """The tar file and first byte of a member."""
        return f"{self.shards[self.shard[index]]} at byte {self.start[index]}"

    def content(self, index: int) -> bytes:
        """A member's bytes."""
        # Opened on each read: a thousand open shards would exceed the limit of open files.
        with open(self.shards[self.shard[index]], "rb") as file:
            file.seek(self.start[index])
            return file.read(self.size[index])

    def take(self, indices: np.ndarray) -> "TarFiles":
        """The members at `indices`, in this order."""
        return TarFiles(self.shards, *(a[indices] for a in (self.shard, self.start, self.size)))


def shards(root: str | Path, split: str) -> list[Path]:
    """The tar files of a split below `root`, by their names, sorted."""
    root, pattern = Path(root), _SPLITS[split]
    found = [path for path in root.glob("*.tar") if pattern.search(path.name)]
    for folder in root.iterdir():
        if folder.is_dir() and pattern.fullmatch(folder.name):
            found += folder.glob("*.tar")
    return sorted(found)


def list_images(root: str | Path, split: str) -> tuple[TarFiles, np.ndarray, tuple[str, ...]]:
    """Lists a split, sorted by class, then path; reads headers only, about 50 us per image.

    Args:
        root: the folder of the shards; train shards may be missing for a test split.
        split: 'train' or 'test'.

    Returns:
        The files, labels int32 (N,) and class names.

    Raises:
        UserError: no shards, broken shards, images without a class, or other classes than train.
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


def _members(root: str | Path, split: str) -> tuple[list[_Member], set[str]]:
    """The members of a split and the set of their classes."""
    members: list[_Member] = []
    for number, path in enumerate(shards(root, split)):
        try:
            with tarfile.open(path, "r:") as tar:
                members += _shard_members(tar, number, path)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"cannot read the shard {path} ({error}): copy it again") from error
    return members, {member[0] for member in members}


def _shard_members(tar: tarfile.TarFile, number: int, path: Path) -> Iterator[_Member]:
    """The images of one tar file."""
    classes: dict[str, str] = {}
    found = []
    for member in tar:
        stem, suffix = os.path.splitext(member.name)
        if not member.isfile() or os.path.basename(stem).startswith("."):
            continue
        if suffix == ".cls":
            file = tar.extractfile(member)
            text = file.read(_CLASS_BYTES) if file else b""
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
        # Zero-padded, so that the text sorts like the numbers.
        name = name.zfill(6) if stem in classes and name.isdecimal() else name
        yield name, member.name, number, member.offset_data, member.size


def _titles(root: str | Path, names: Sequence[str]) -> tuple[str, ...]:
    """The class names: for numbered classes the lines of classes.txt, if it exists."""
    titles = Path(root) / "classes.txt"
    if titles.is_file() and all(name.isdecimal() for name in names):
        lines = titles.read_text().splitlines()
        if len(lines) < int(names[-1]) + 1:
            raise UserError(f"{titles} has {len(lines)} lines and the shards class {names[-1]}")
        return tuple(lines[int(name)] for name in names)
    return tuple(names)
