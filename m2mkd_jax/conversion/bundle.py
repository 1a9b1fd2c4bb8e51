"""Weights as two files that people share: model.safetensors and config.json.

Arrays are called TREE/params/..., as in a directory of weights; config.json holds the description
of the network (models/registry.py) and the checksum of every tree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.checkpoint.files import read_json, read_record, write_record
from m2mkd_jax.checkpoint.trees import checksum, flatten, nested
from m2mkd_jax.conversion.safetensors_file import read_safetensors, write_safetensors
from m2mkd_jax.errors import UserError

CONFIG, WEIGHTS = "config.json", "model.safetensors"
LIBRARY = "m2mkd_jax"
_FORMAT = 1


def is_bundle(directory: Path) -> bool:
    """Whether a directory holds weights in this form.

    Raises:
        UserError: its config.json is damaged.
    """
    if not ((directory / CONFIG).is_file() and (directory / WEIGHTS).is_file()):
        return False
    content = read_json(directory / CONFIG)
    return isinstance(content, dict) and content.get("library_name") == LIBRARY


def write_bundle(
    directory: Path, description: Mapping[str, Any], trees: Mapping[str, Mapping[str, Any]]
) -> None:
    """Writes both files.

    Args:
        directory: that they are written into.
        description: of the network.
        trees: {"params", "fixed"} of every stage, by name.

    Raises:
        UserError: a file cannot be written.
    """
    arrays: dict[str, np.ndarray] = {}
    sums: dict[str, str] = {}
    for name in trees:
        flat = {key: np.asarray(leaf) for key, leaf in flatten(dict(trees[name])).items()}
        sums[name] = checksum(nested(flat))
        arrays |= {f"{name}/{key}": array for key, array in flat.items()}
    write_safetensors(directory / WEIGHTS, arrays.items(), {"format": LIBRARY})
    content = {"library_name": LIBRARY, "format": _FORMAT, "description": dict(description)}
    write_record(directory / CONFIG, {**content, "trees": sums})


class BundleTrees(Mapping[str, dict[str, Any]]):
    """The trees of a bundle; each is read, and its checksum compared, when it is looked up.

    Args:
        directory: of the bundle.
        sums: checksum by name of the tree.

    Raises:
        UserError: the file of arrays is damaged.
    """

    def __init__(self, directory: Path, sums: Mapping[str, str]):
        self._path, self._sums = directory / WEIGHTS, sums
        self._tensors, _ = read_safetensors(self._path)

    def __getitem__(self, name: str) -> dict[str, Any]:
        start = f"{name}/"
        own = {n.removeprefix(start): t for n, t in self._tensors.items() if n.startswith(start)}
        tree = nested({key: np.array(tensor.read()) for key, tensor in own.items()})
        if checksum(tree) != self._sums[name]:
            raise UserError(
                f"{self._path} is damaged: the checksum of {name} is not the one in {CONFIG}; "
                "download it again"
            )
        return tree

    def __iter__(self) -> Iterator[str]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)


def read_bundle(directory: Path) -> tuple[dict[str, Any], BundleTrees]:
    """The description of a bundle's network, and its trees.

    Raises:
        UserError: it is damaged, or of another format.
    """
    content = read_record(directory / CONFIG)
    version, description, sums = (content.get(k) for k in ("format", "description", "trees"))
    if version != _FORMAT or not isinstance(description, dict) or not isinstance(sums, dict):
        raise UserError(f"{directory / CONFIG} has format {version}; this program reads {_FORMAT}")
    return description, BundleTrees(directory, sums)
