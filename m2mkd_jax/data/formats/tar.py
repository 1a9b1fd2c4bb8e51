"""Shards: tar files with the images of a split, read in place without unpacking.

    root/train-000.tar, root/x_val_01.tar   ("train", and "val" or "test", as a word of the name)
    root/train/*.tar, root/val/*.tar

The class of an image is its folder inside the tar (CLASS/name.JPEG or CLASS/images/name.JPEG), or
the number in a file of the same name beside it (name.jpg, name.cls), or in one of the same
WebDataset key, which ends at the first dot of a name (name.image.jpg, name.cls); line n of
root/classes.txt, if it exists, names class n. Other files are left out, and named but for texts.
Axes: N images.
"""

import functools
import os
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from m2mkd_jax.data.decode import ARRAY_SUFFIX, SUFFIXES
from m2mkd_jax.data.formats.folder import check_same_classes, is_text, say_left_out
from m2mkd_jax.data.formats.member_index import Member, indexed
from m2mkd_jax.data.formats.parts import check_parts
from m2mkd_jax.data.formats.split_names import WORDS, split_of, words_of
from m2mkd_jax.data.formats.text import read_text
from m2mkd_jax.errors import UserError
from m2mkd_jax.files.paths import as_path, read_part

_EXPECTED = {"train": ("*train*.tar",), "test": ("*val*.tar", "*test*.tar")}
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_SUFFIXES = (".tar", ".tgz", ".txz", *(f".tar.{name}" for name in ("gz", "bz2", "xz", "zst")))
_BLOCK = 512  # bytes
_CLASS_BYTES = 1024  # read of a .cls file


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
        return read_part(self.shards[self.shard[index]], self.start[index], self.size[index])

    def take(self, indices: np.ndarray) -> "TarFiles":
        """The members at `indices`, in this order."""
        return TarFiles(self.shards, *(a[indices] for a in (self.shard, self.start, self.size)))


def shards(root: str | Path, split: str) -> list[Path]:
    """The tar files of a split below `root`, by their names, sorted.

    Raises:
        UserError: a name that tells no split, or two; shards that are compressed, or missing from
            a set whose names count its parts.
    """
    root = as_path(root)
    found = [path for path in _archives(root) if split_of(path, _stem(path)) == split]
    for folder in root.iterdir():
        if folder.is_dir() and folder.name.lower() in WORDS[split]:
            found += _archives(folder)
    packed = [path for path in found if path.suffix != ".tar"]
    found = [path for path in found if path.suffix == ".tar"]
    for path in packed if found else ():  # alone they may be what a folder was unpacked from
        if path.with_name(f"{_stem(path)}.tar") not in found:
            raise UserError(f"{path} is compressed, and members are read in place: decompress it")
    check_parts(found)
    if split == "test":  # "val" stands for it where there is no "test"
        found = [path for path in found if _words(path) & {"test", "testing"}] or found
    return sorted(found)


def _archives(folder: Path) -> list[Path]:
    """The tar files in a folder, compressed ones too."""
    return [path for path in folder.iterdir() if path.name.endswith(_SUFFIXES)]


def _stem(path: Path) -> str:
    """The name of a tar file up to .tar, or what stands for it."""
    return re.sub(r"\.(tar(\.[a-z0-9]+)?|t[gx]z)$", "", path.name)


def _words(path: Path) -> set[str]:
    """The words of a shard's name, and its folder's name."""
    return {*words_of(_stem(path)), path.parent.name.lower()}


def list_images(
    root: str | Path, split: str, field: str = ""
) -> tuple[TarFiles, np.ndarray, tuple[str, ...]]:
    """Lists a split, sorted by class, then path; reads headers only, about 50 us per image.

    Args:
        root: the folder of the shards; train shards may be missing for a test split.
        split: 'train' or 'test'.
        field: what follows the first dot in the names of the images, such as "image.jpg"; "": of
            all files that are images by their names.

    Returns:
        The files, labels int32 (N,) and class names.

    Raises:
        UserError: no shards, broken shards, images without a class, or other classes than train.
    """
    if not shards(root, split):
        raise UserError(f"{root} has no {split} shards: {' or '.join(_EXPECTED[split])} expected")
    left_out: list[str] = []
    members, classes = _members(root, split, field, left_out)
    say_left_out(as_path(root), left_out)
    names = sorted(classes)
    if split == "test" and shards(root, "train"):
        names = sorted(_members(root, "train", field, [])[1])
        check_same_classes(f"{root} (test shards)", names, sorted(classes))
    number = {name: label for label, name in enumerate(names)}
    members.sort(key=lambda member: (number[member[0]], member[1]))
    labels = np.array([number[member[0]] for member in members], np.int32)
    shard, start, size = (np.array([member[i] for member in members], np.int64) for i in (2, 3, 4))
    return TarFiles(shards(root, split), shard, start, size), labels, _titles(root, names)


def _members(
    root: str | Path, split: str, field: str, left_out: list[str]
) -> tuple[list[Member], set[str]]:
    """The members of a split and the set of their classes."""
    members: list[Member] = []
    for number, path in enumerate(shards(root, split)):
        try:
            read = functools.partial(_read_members, path, number, field, left_out)
            members += indexed(path, number, field, read)
        except (tarfile.TarError, OSError) as error:
            raise UserError(f"cannot read the shard {path} ({error}): copy it again") from error
    return members, {member[0] for member in members}


def _read_members(path: Path, number: int, field: str, left_out: list[str]) -> list[Member]:
    """The members of one tar file, from its headers."""
    _check_uncompressed(path)
    with path.open("rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
        members = list(_shard_members(tar, number, path, field, left_out))
        _check_end(tar, path)
    return members


def _check_uncompressed(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(6)
    for magic, name in _COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(
                f"{path} is compressed ({name}), and members are read in place: decompress it"
            )


def _check_end(tar: tarfile.TarFile, path: Path) -> None:
    """Raises UserError unless zeros, and nothing else, end the archive.

    Else it may be cut off between two members, or a header may be lost, and all that follows it.
    """
    with path.open("rb") as file:
        file.seek(tar.offset)
        if file.read(_BLOCK) != bytes(_BLOCK):
            raise UserError(f"the shard {path} has no end: it is cut off; copy it again")
        while rest := file.read(1 << 20):
            if rest.strip(b"\0"):
                raise UserError(
                    f"the shard {path} goes on after its end: it is damaged, or several archives "
                    "are joined; copy it again, or pack it as one"
                )


def _linked(tar: tarfile.TarFile, member: tarfile.TarInfo, path: Path) -> tarfile.TarInfo:
    """The file that a hard or symbolic link inside an archive means, or the member itself."""
    if not (member.islnk() or member.issym()):
        return member
    target = member.linkname
    if member.issym():
        target = posixpath.normpath(posixpath.join(posixpath.dirname(member.name), target))
    try:
        meant = tar.getmember(target)
    except KeyError:
        meant = member
    if not meant.isfile():
        raise UserError(
            f"{path}: {member.name} is a link to {member.linkname}, which is no file in it"
        )
    return meant


def _key(name: str) -> tuple[str, str]:
    """A member's key and field, as WebDataset cuts names: at the first dot after the folders."""
    folder, base = posixpath.split(name)
    key, _, field = base.partition(".")
    return posixpath.join(folder, key), field


def _is_wanted(suffix: str, own: str, field: str) -> bool:
    """Whether a member of field `own` is an image to read: arrays are where they are named."""
    if field:
        return own == field and suffix in (*SUFFIXES, ARRAY_SUFFIX)
    return suffix in SUFFIXES


def _shard_members(
    tar: tarfile.TarFile, number: int, path: Path, field: str, left_out: list[str]
) -> Iterator[Member]:
    """The images of one tar file; what is no image by its name is added to `left_out`."""
    classes: dict[str, str] = {}
    found: dict[str, tuple[str, str, tarfile.TarInfo]] = {}
    for member in tar:
        stem, suffix = os.path.splitext(member.name)
        if member.isdir() or os.path.basename(stem).startswith("."):
            continue
        if suffix == ".cls":
            if stem in classes:
                raise UserError(f"{path} has {member.name} twice: pack it again")
            file = tar.extractfile(member)
            text = file.read(_CLASS_BYTES) if file else b""
            classes[stem] = text.decode("utf-8-sig", "replace").strip()
        elif _is_wanted(suffix.lower(), _key(member.name)[1], field):
            if member.name in found:
                raise UserError(f"{path} has {member.name} twice: pack it again")
            parts = member.name.split("/")[:-1]
            folders = [part for part in parts if part not in ("images", ".")]
            folder = folders[-1] if folders else ""
            found[member.name] = (folder, stem, _linked(tar, member, path))
        elif not field and not is_text(member.name):
            left_out.append(os.path.join(path.name, member.name))
    sampled: dict[str, str] = {}  # by key, the image that has its class from there
    for own, (folder, stem, member) in found.items():
        key = _key(own)[0]
        if stem not in classes and key in classes:
            if key in sampled:
                fields = " and ".join(_key(image)[1] for image in (sampled[key], own))
                raise UserError(
                    f"{path}: sample {key} has the images {fields}: name one, "
                    f"data.image_column={_key(own)[1]}"
                )
            sampled[key], stem = own, key
        name = classes.get(stem, folder)
        if not name:
            raise UserError(
                f"{path}: {own} has no class: it must lie in a folder of its class's name,"
                f" or have its number beside it in {stem}.cls"
            )
        # Zero-padded, so that the text sorts like the numbers.
        name = name.zfill(6) if stem in classes and name.isdecimal() else name
        yield name, own, number, member.offset_data, member.size


def _titles(root: str | Path, names: Sequence[str]) -> tuple[str, ...]:
    """The class names: for numbered classes the lines of classes.txt, if it exists."""
    titles = as_path(root) / "classes.txt"
    if titles.is_file() and all(name.isdecimal() for name in names):
        lines = read_text(titles).splitlines()
        if len(lines) < int(names[-1]) + 1:
            raise UserError(f"{titles} has {len(lines)} lines and the shards class {names[-1]}")
        return tuple(lines[int(name)] for name in names)
    return tuple(names)
