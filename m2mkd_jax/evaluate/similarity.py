"""Similarity of what two networks compute for the same images.

Axes: N images, C channels.
"""

from __future__ import annotations

import numpy as np


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear centred kernel alignment of two sets of features.

    ||Y^T X||^2 / (||X^T X|| ||Y^T Y||) of centred columns, in Frobenius norms: 1 for features that
    are equal up to a rotation and a factor, about 0 for independent ones of many images.

    Args:
        x: (N, C).
        y: (N, C'), of the same images.

    Returns:
        0 to 1; 0 where one of them is the same for every image.

    Source: Kornblith et al. 2019 (arXiv 1905.00414), section 3.
    """
    x = np.asarray(x, np.float64)
    y = np.asarray(y, np.float64)
    x, y = x - x.mean(0), y - y.mean(0)
    scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(y.T @ x) ** 2 / scale) if scale > 0 else 0.0
