"""A grid of captioned images, to look at a batch.

Axes: N images, S image size in pixels, C channels, K classes.
"""

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from m2mkd_jax.data.channels import as_rgb

_SMALLEST = 112  # smallest side of a tile in pixels, for a readable caption
_LINE = 12  # height of a caption line in pixels; there are two more below the last
_LETTERS = 18  # longest line of a caption


def draw_grid(images: np.ndarray, captions: Sequence[str]) -> Image.Image:
    """Draws images in a square grid, each with its caption below.

    Args:
        images: uint8 (N, S, S, C).
        captions: (N,), each of one or more lines.
    """
    columns = math.ceil(math.sqrt(len(images)))
    times = math.ceil(_SMALLEST / images.shape[1])
    side = images.shape[1] * times
    lines = 1 + max(caption.count("\n") for caption in captions)
    step = side + _LINE * lines + 2
    grid = Image.new("RGB", (columns * side, math.ceil(len(images) / columns) * step), "white")
    draw = ImageDraw.Draw(grid)
    for number, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(number, columns)
        tile = Image.fromarray(as_rgb(image)).resize((side, side), Image.Resampling.NEAREST)
        grid.paste(tile, (column * side, row * step))
        for line, text in enumerate(caption.split("\n")):
            draw.text((column * side + 2, row * step + side + _LINE * line), text, fill="black")
    return grid


def caption(share: np.ndarray, class_names: Sequence[str]) -> str:
    """The one or two main classes of a mixed image, one per line, with percentages if two.

    Args:
        share: (K,), the share of each class in the image.
        class_names: (K,).
    """
    shown = [number for number in np.argsort(-share)[:2] if share[number] > 0.005]
    if len(shown) == 1:
        return class_names[shown[0]][:_LETTERS]
    return "\n".join(f"{share[k]:.0%} {class_names[k]}"[:_LETTERS] for k in shown)
