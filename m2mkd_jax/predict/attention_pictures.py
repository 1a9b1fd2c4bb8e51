"""Pictures of what a network attends to: the brighter, the more.

Axes: B images, S side of an image, A heads, N tokens, G side of the grid of patches, U latents.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image

from m2mkd_jax.data.channels import as_rgb
from m2mkd_jax.errors import UserError
from m2mkd_jax.inference import Model
from m2mkd_jax.predict.images import Batch

DARKEST = 0.25  # brightness of what is not attended to


def attention_over_image(model: Model, inputs: np.ndarray) -> np.ndarray:
    """What a network attends to, (B, G, G), the largest of each image 1.

    Of a transformer: what the class token attends to in the last block, the mean over its heads,
    its own share left out. Of a NAC: what its input latents read, the mean over latents and heads.

    Raises:
        UserError: the network has no such attention.
    """
    maps = model.attention(inputs)
    if "blocks" in maps:
        shares = np.asarray(maps["blocks"][-1], np.float32)[:, :, 0, 1:].mean(1)  # (B, N - 1)
    elif "read_in" in maps:
        shares = np.asarray(maps["read_in"], np.float32).mean((1, 2))
    else:
        raise UserError("--attention: this network has no attention maps")
    side = math.isqrt(shares.shape[1])
    if side * side != shares.shape[1]:
        raise UserError(f"--attention: {shares.shape[1]} tokens are not a square of patches")
    return shares.reshape(-1, side, side) / shares.max(1)[:, None, None]


def draw(folder: Path, batch: Batch, maps: np.ndarray, first: int) -> None:
    """Writes a picture for every image of a batch: FOLDER/NUMBER_NAME.png.

    Args:
        folder: that exists.
        batch: the images.
        maps: (B, G, G), see `attention_over_image`.
        first: number of the batch's first image.
    """
    for i, (path, pixels) in enumerate(zip(batch.paths, as_rgb(batch.pixels), strict=True)):
        side = pixels.shape[0]
        small = Image.fromarray((255 * maps[i]).astype(np.uint8))
        shares = np.asarray(small.resize((side, side), Image.Resampling.BILINEAR), np.float32) / 255
        bright = pixels * (DARKEST + (1 - DARKEST) * shares)[..., None]
        lit = Image.fromarray(bright.astype(np.uint8))
        both = Image.new("RGB", (2 * side, side))
        both.paste(Image.fromarray(pixels), (0, 0))
        both.paste(lit, (side, 0))
        both.save(folder / f"{first + i}_{Path(path).stem}.png")
