"""Which split a file of many images is of, by the words of its name."""

import re
from pathlib import Path

from m2mkd_jax.errors import UserError

# "val" stands for the test split where there is no "test".
WORDS = {
    "train": ("train", "training"),
    "test": ("test", "testing", "validation", "valid", "val"),
}


def words_of(name: str) -> set[str]:
    """The words of a file's name, in lower case: runs of letters."""
    return set(re.findall("[^\\W\\d_]+", name.lower()))


def split_of(path: Path, name: str) -> str | None:
    """The split that a file's name tells, by whole words; None: it tells none.

    Args:
        path: of the file, for the message.
        name: of the file, without its suffixes.

    Raises:
        UserError: words of both splits, or a word that only contains one of theirs.
    """
    words = words_of(name)
    splits = [split for split, own in WORDS.items() if words & set(own)]
    if len(splits) == 1:
        return splits[0]
    if splits or any(word in name.lower() for own in WORDS.values() for word in own):
        raise UserError(
            f"{path}: does its name mean training or test images? Call it train-... or val-..., "
            "or move it elsewhere"
        )
    return None
