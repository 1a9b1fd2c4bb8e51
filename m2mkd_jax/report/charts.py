"""Charts as inline SVG, in colours that follow the page's light or dark scheme.

matplotlib draws them: a static SVG needs no script and no network, prints as it is shown, and its
text stays text. It is an extra, since training does not need it. Colours are drawn as marks that
the style sheet (style.py) gives their values.
"""

from __future__ import annotations

import base64
import html
import importlib
import io
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from m2mkd_jax.data.channels import as_rgb
from m2mkd_jax.errors import UserError

SERIES = 8
# Colours as matplotlib is given them: the style sheet's --series-1 .. 8, --ink and --grid.
COLOURS = tuple(f"#0000{i:02x}" for i in range(1, SERIES + 1))
INK, GRID = "#00000a", "#00000b"
# Besides its colour a line has a dash pattern and its points a shape of their own.
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (8, 2)))
SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH, HEIGHT = 4.4, 2.9  # inches; a panel
_numbers = itertools.count()

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 9,
    "legend.fontsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.linewidth": 0.5,
    "grid.color": GRID,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "path.simplify_threshold": 0.5,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    ),
}


@dataclass(frozen=True)
class Figure:
    """A figure of the page.

    Attributes:
        title: what it shows.
        body: HTML.
        caption: how to read it.
        wide: takes the whole width of the page.
    """

    title: str
    body: str
    caption: str
    wide: bool = False


def require_matplotlib() -> None:
    """Refuses to go on without matplotlib.

    Raises:
        UserError: it is not installed.
    """
    try:
        importlib.import_module("matplotlib")
    except ImportError:
        raise UserError("the report needs matplotlib: pip install 'm2mkd_jax[report]'") from None


def draw(
    title: str,
    caption: str,
    alt: str,
    plot: Callable[[Any], None],
    *,
    size: tuple[float, float] = (WIDTH, HEIGHT),
    panels: tuple[int, int] = (1, 1),
    wide: bool = False,
) -> Figure:
    """Draws a chart.

    Args:
        title: what it shows.
        caption: how to read it.
        alt: what it shows, for those who do not see it.
        plot: given the axes, or an array of them where there are several panels.
        size: in inches.
        panels: rows and columns.
        wide: see `Figure`.
    """
    require_matplotlib()
    matplotlib: Any = importlib.import_module("matplotlib")
    figures: Any = importlib.import_module("matplotlib.figure")
    out = io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": title}):
        figure = figures.Figure(figsize=size, layout="constrained")
        axes = figure.subplots(*panels, squeeze=False)
        plot(axes[0, 0] if axes.size == 1 else axes)
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return Figure(title, _inline(out.getvalue(), alt), caption, wide)


def _inline(svg: str, alt: str) -> str:
    """A file of matplotlib's as a part of a page: names of its own, colours of the page."""
    prefix = f"f{next(_numbers)}-"
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = svg.replace("url(#", f"url(#{prefix}").replace('xlink:href="#', f'href="#{prefix}')
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)
    svg = svg.replace("xlink:href=", "href=")
    head = re.match(r'<svg [^>]*?width="([\d.]+)pt"', svg)
    width = float(head[1]) * 4 / 3 if head else 500.0
    svg = re.sub(r'(<svg [^>]*?) ?(width|height)="[\d.]+pt"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) ?(width|height)="[\d.]+pt"', r"\1", svg, count=1)
    label = html.escape(alt, quote=True)
    svg = svg.replace(
        "<svg ", f'<svg role="img" aria-label="{label}" style="max-width:{width:.0f}px" ', 1
    )
    for i, mark in enumerate(COLOURS, 1):
        svg = svg.replace(mark, f"var(--series-{i})")
    return svg.replace(INK, "var(--ink)").replace(GRID, "var(--grid)")


def legend_below(axes: Any, columns: int = 3) -> None:
    """A legend under the axes, where it hides no line."""
    handles, names = axes.get_legend_handles_labels()
    if names:
        axes.figure.legend(handles, names, loc="outside lower center", ncols=columns)


def image_tag(pixels: np.ndarray, alt: str, side: int = 96, shown: int = 72) -> str:
    """An image inside the page.

    Args:
        pixels: uint8 (H, W, C).
        alt: what it shows.
        side: pixels of its longer side at the most.
        shown: width and height on the page.
    """
    picture = Image.fromarray(as_rgb(pixels))
    if max(picture.size) > side:
        picture.thumbnail((side, side))
    out = io.BytesIO()
    picture.save(out, format="PNG", optimize=True)
    data = base64.b64encode(out.getvalue()).decode()
    return (
        f'<img src="data:image/png;base64,{data}" alt="{html.escape(alt, quote=True)}" '
        f'width="{shown}" height="{shown}">'
    )
