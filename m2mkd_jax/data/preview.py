"""A picture of many pictures, with a caption below each.

Axes: N images, S image size in pixels, K classes.
"""

import math

import numpy as np
from PIL import Image, ImageDraw

_SMALLEST = 112  # pixels that a tile is enlarged to, so that its caption can be read
_LINE = 12  # pixels that a line of a caption takes, and two more below the last
_LETTERS = 18


def draw_grid(images, captions):
    """A PIL image of uint8 (N, S, S, 3), in as many columns as rows, captions (N,) below each.

    A caption may have several lines.
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
        tile = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
        grid.paste(tile, (column * side, row * step))
        for line, text in enumerate(caption.split("\n")):
            draw.text((column * side + 2, row * step + side + _LINE * line), text, fill="black")
    return grid


def caption(share, class_names):
    """An image's classes, one a line, with their shares (K,) of it; one class alone without."""
    shown = [number for number in np.argsort(-share)[:2] if share[number] > 0.005]
    if len(shown) == 1:
        return class_names[shown[0]][:_LETTERS]
    return "\n".join(f"{share[k]:.0%} {class_names[k]}"[:_LETTERS] for k in shown)
