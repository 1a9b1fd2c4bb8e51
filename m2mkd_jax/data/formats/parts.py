"""Data sets in several files, whose names say how many there are."""

import re
from collections.abc import Iterable
from pathlib import Path

from m2mkd_jax.errors import UserError

_PART = re.compile("(.*?)([0-9]+)-of-([0-9]+)(.*)")


def check_parts(paths: Iterable[Path]) -> None:
    """Refuses files such as train-00000-of-00004.tar without all the others of their set.

    Raises:
        UserError: names the first part that is missing.
    """
    found: dict[tuple[Path, str, str, str], set[int]] = {}
    for path in paths:
        if part := _PART.fullmatch(path.name):
            start, number, count, end = part.groups()
            found.setdefault((path.parent, start, count, end), set()).add(int(number))
    for (folder, start, count, end), numbers in found.items():
        # Counted from 0, or from 1: then one is the last of all.
        first = int(int(count) in numbers)
        if missing := sorted({*range(first, first + int(count))} - numbers):
            name = f"{start}{missing[0]:0{len(count)}d}-of-{count}{end}"
            raise UserError(
                f"{folder / name} is missing, {len(missing)} of {int(count)} parts in all: copy "
                "what is missing"
            )
