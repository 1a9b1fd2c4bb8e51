"""Where the members of a shard in a bucket are: read once, and kept on this machine.

The headers of a tar file lie between its members, so that finding them reads much of the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

from m2mkd_jax.files.paths import file_system, in_bucket, local_directory, write_bytes

# (class, path, shard number, first byte, bytes)
Member = tuple[str, str, int, int, int]
_FORMAT = 1


def indexed(path: Path, number: int, field: str, read: Callable[[], list[Member]]) -> list[Member]:
    """The members of a shard.

    Args:
        path: of the shard.
        number: of the shard, which its members are given.
        field: of a WebDataset key, that holds the class.
        read: lists them, from the shard itself.
    """
    if not in_bucket(path):
        return read()
    # The generation changes with every object that is put in another's place.
    held = [_FORMAT, field, str(file_system(path).info(os.fspath(path))["generation"])]
    place = local_directory(path).with_suffix(".members.json")
    try:
        found = json.loads(place.read_bytes())
        if found["of"] == held:
            return [(name, own, number, start, size) for name, own, start, size in found["members"]]
    except (OSError, ValueError, KeyError, TypeError):  # none, or damaged
        pass
    members = read()
    rows = [[name, own, start, size] for name, own, _, start, size in members]
    write_bytes(place, json.dumps({"of": held, "members": rows}).encode())
    return members
