"""Heat maps, and attention over images."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from m2mkd_jax.report.charts import COLOURS, image_tag

CELLS = 900  # of a heat map that is drawn cell by cell
LONGEST = 12  # characters of a name beside it
DARKEST, LIGHTEST = 0.3, 1.0  # brightness of an image where nothing and where most is read


def heat_map(
    axes: Any,
    shares: np.ndarray,
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    counts: np.ndarray | None = None,
) -> None:
    """A heat map in one colour, the deeper the larger the share.

    Args:
        axes: to draw on.
        shares: (rows, columns), 0 to 1.
        rows: their names; (): numbers.
        columns: likewise.
        counts: (rows, columns), written into the cells; None: none.
    """
    height, width = shares.shape
    depth = 0.6 * np.clip(np.asarray(shares, np.float64), 0, 1)
    collections: Any = importlib.import_module("matplotlib.collections")
    if height * width <= CELLS:
        squares, strengths = [], []
        for i, j in zip(*np.nonzero(depth > 0.002), strict=True):
            squares.append(
                [(j - 0.5, i - 0.5), (j + 0.5, i - 0.5), (j + 0.5, i + 0.5), (j - 0.5, i + 0.5)]
            )
            strengths.append(depth[i, j])
        axes.add_collection(
            collections.PolyCollection(
                squares, facecolors=COLOURS[0], alpha=strengths or None, linewidths=0
            )
        )
    else:  # as an image: grey of the same depth in both schemes
        rgba = np.full((height, width, 4), 0.5)
        rgba[..., 3] = np.clip(shares, 0, 1)
        axes.imshow(rgba, aspect="auto", interpolation="nearest")
    if counts is not None:
        for i, j in zip(*np.nonzero(counts), strict=True):
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=8)
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(height - 0.5, -0.5)
    axes.grid(False)
    if columns:
        axes.set_xticks(range(width), [short(n) for n in columns], rotation=90 if width > 6 else 0)
    if rows:
        axes.set_yticks(range(height), [short(n) for n in rows])


def short(name: str) -> str:
    """A name that fits beside a heat map."""
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def overlay_tag(image: np.ndarray, weights: np.ndarray | None, alt: str) -> str:
    """An image, as bright as it is read.

    Args:
        image: uint8 (H, W, C).
        weights: (h, w), from 0; None: the image as it is.
        alt: what it shows.
    """
    if weights is not None:
        share = (255 * weights / max(float(weights.max()), 1e-9)).astype(np.uint8)
        size = (image.shape[1], image.shape[0])
        mask = np.asarray(Image.fromarray(share).resize(size, Image.Resampling.BILINEAR)) / 255
        bright = DARKEST + (LIGHTEST - DARKEST) * mask[..., None]
        image = (image * bright).round().astype(np.uint8)
    return image_tag(image, alt)
