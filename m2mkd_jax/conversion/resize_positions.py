"""Position embeddings for another image size, by bicubic interpolation.

Axes: T tokens (class token, then S x S patches row by row), D width, N old and M new positions.
"""

from __future__ import annotations

import math

import numpy as np

_A = -0.75  # PyTorch's cubic kernel


def bicubic_weights(old: int, new: int) -> np.ndarray:
    """(M, N): the weight of each old position in each new one; edges are repeated.

    As torch.nn.functional.interpolate(mode="bicubic"), which the published program calls: pixel
    centres are aligned (align_corners=False), and nothing is smoothed when shrinking.
    """
    positions = (np.arange(new) + 0.5) * (old / new) - 0.5
    left = np.floor(positions).astype(int)
    result = np.zeros((new, old))
    for offset in range(-1, 3):
        d = np.abs(positions - (left + offset))
        near = (_A + 2) * d**3 - (_A + 3) * d**2 + 1
        far = _A * d**3 - 5 * _A * d**2 + 8 * _A * d - 4 * _A
        weight = np.where(d <= 1, near, np.where(d < 2, far, 0.0))
        np.add.at(result, (np.arange(new), np.clip(left + offset, 0, old - 1)), weight)
    return result


def resize_positions(embedding: np.ndarray, side: int) -> np.ndarray:
    """Resizes a position embedding; the class token's stays as it is.

    Args:
        embedding: (1, 1 + S*S, D).
        side: patches on a side of the new image.

    Returns:
        (1, 1 + side*side, D), of the same type.
    """
    token, patches = embedding[:, :1], embedding[:, 1:]
    old = math.isqrt(patches.shape[1])
    weights = bicubic_weights(old, side)
    grid = patches.astype(np.float64).reshape(old, old, -1)
    grid = np.einsum("ui,vj,ijd->uvd", weights, weights, grid, optimize=True)
    resized = grid.reshape(1, side * side, -1).astype(embedding.dtype)
    return np.concatenate([token, resized], axis=1)
