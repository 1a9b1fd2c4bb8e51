"""Converted weights: trees that are made on demand, and what they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from m2mkd_jax.conversion.report import Report

# The normalisation that all published networks are trained with (docs/reference.md#normalisation).
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

Tree = dict[str, Any]


class Trees(Mapping[str, Tree]):
    """Trees by name. Each is made anew whenever it is looked up, and none is kept.

    Args:
        makers: name -> function that makes the tree.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Tree]]):
        self.makers = makers

    def __getitem__(self, name: str) -> Tree:
        return self.makers[name]()

    def __iter__(self) -> Iterator[str]:
        return iter(self.makers)

    def __len__(self) -> int:
        return len(self.makers)


@dataclasses.dataclass
class Converted:
    """Converted weights.

    Attributes:
        description: of the network (models/registry.py).
        trees: made on demand.
        report: complete once every tree was made.
        assumed_normalisation: whether mean and std of the pixels are ImageNet's because nothing
            says what they are.
    """

    description: dict[str, Any]
    trees: Trees
    report: Report
    assumed_normalisation: bool = False
