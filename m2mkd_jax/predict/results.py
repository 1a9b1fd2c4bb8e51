"""What was predicted: the likeliest classes of every image, printed and written.

Axes: B images, K classes.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from m2mkd_jax.errors import printable


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image.

    Attributes:
        name: of the image.
        classes: their numbers, likeliest first.
        probabilities: of these.
    """

    name: str
    classes: list[int]
    probabilities: list[float]


def likeliest(names: Sequence[str], logits: np.ndarray, top: int) -> Iterator[Prediction]:
    """The `top` likeliest classes of each image; `logits` is (B, K)."""
    shifted = np.exp(logits - logits.max(-1, keepdims=True))
    probabilities = shifted / shifted.sum(-1, keepdims=True)
    for name, row in zip(names, probabilities, strict=True):
        best = np.argsort(-row)[:top]
        yield Prediction(name, best.tolist(), row[best].tolist())


def line(found: Prediction, labels: Sequence[str]) -> str:
    """A prediction as a line of text."""
    pairs = zip(found.classes, found.probabilities, strict=True)
    shown = "  ".join(f"{labels[c] if labels else c} {share:.4f}" for c, share in pairs)
    return printable(f"{found.name}: {shown}")


def write_json(path: Path, found: Sequence[Prediction], labels: Sequence[str]) -> None:
    """A list of {"image", "classes": [{"class", "name", "probability"}]}."""
    content: list[dict[str, Any]] = [
        {
            "image": entry.name,
            "classes": [
                {"class": c, "name": labels[c] if labels else str(c), "probability": share}
                for c, share in zip(entry.classes, entry.probabilities, strict=True)
            ],
        }
        for entry in found
    ]
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def write_csv(path: Path, found: Sequence[Prediction], labels: Sequence[str]) -> None:
    """A row an image: its name, then class, name and probability of each of its classes.

    Names are UTF-8, but for those of files that are not: these keep their bytes.
    """
    count = len(found[0].classes)
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = csv.writer(file)
        titles = ("class", "name", "probability")
        rows.writerow(["image", *(f"{title}_{i + 1}" for i in range(count) for title in titles)])
        for entry in found:
            row: list[Any] = [entry.name]
            for c, share in zip(entry.classes, entry.probabilities, strict=True):
                row += [c, labels[c] if labels else c, f"{share:.6g}"]
            rows.writerow(row)
