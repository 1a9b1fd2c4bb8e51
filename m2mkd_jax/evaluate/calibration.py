"""How far a network's probabilities can be believed.

Axes: N images, K classes, M bins.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import log_softmax

BINS = 15


class Reliability(NamedTuple):
    """Images in bins of equal count, by rising confidence; arrays of shape (M,).

    Attributes:
        confidence: mean probability of the class that is predicted.
        accuracy: share of the images whose class is predicted.
        images: how many.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    images: np.ndarray


def softmax(logits: np.ndarray) -> np.ndarray:
    """Logits (N, K) -> probabilities (N, K), float64."""
    shifted = np.asarray(logits, np.float64)
    powers = np.exp(shifted - shifted.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def reliability(probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS) -> Reliability:
    """Accuracy against confidence.

    The bins hold equally many images each (adaptive bins; Nixon et al. 2019, arXiv 1904.01685), so
    that none is empty where most images are predicted with near certainty.

    Args:
        probabilities: (N, K).
        labels: (N,).
        bins: how many at the most; never more than images.
    """
    return binned(probabilities.max(-1), probabilities.argmax(-1) == labels, bins)


def binned(confidence: np.ndarray, correct: np.ndarray, bins: int = BINS) -> Reliability:
    """`reliability`, from each image's confidence (N,) and whether it is correct (N,).

    Images of equal confidence count as correct in equal shares, wherever a bin divides them:
    their order says nothing of the network.
    """
    _, which = np.unique(confidence, return_inverse=True)
    correct = (np.bincount(which, correct) / np.bincount(which))[which]
    order = np.argsort(confidence, kind="stable")
    parts = np.array_split(order, min(bins, len(order)))
    return Reliability(
        np.array([confidence[part].mean() for part in parts]),
        np.array([correct[part].mean() for part in parts]),
        np.array([len(part) for part in parts]),
    )


def expected_calibration_error(
    probabilities: np.ndarray, labels: np.ndarray, bins: int = BINS
) -> float:
    """Mean distance of accuracy and confidence over the bins of `reliability`, by their counts."""
    return gap(reliability(probabilities, labels, bins))


def gap(found: Reliability) -> float:
    """Mean distance of accuracy and confidence over bins, by their images."""
    gaps = np.abs(found.accuracy - found.confidence)
    return float((gaps * found.images).sum() / found.images.sum())


def brier_score(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Mean squared distance of the probabilities (N, K) from the one-hot labels (N,): 0 to 2."""
    truth = np.eye(probabilities.shape[-1])[labels]
    return float(np.square(probabilities - truth).sum(-1).mean())


def negative_log_likelihood(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean of -log of the true class's probability, in nats, from logits (N, K)."""
    logs = log_softmax(np.asarray(logits, np.float64), -1)
    return float(-np.take_along_axis(logs, labels[:, None], -1).mean())


def top_k_accuracy(probabilities: np.ndarray, labels: np.ndarray, k: int) -> float:
    """Share of the images whose class is among the k likeliest."""
    best = np.argsort(-probabilities, axis=-1, kind="stable")[:, :k]
    return float((best == labels[:, None]).any(-1).mean())


def scores(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """What a network's logits say of it.

    Args:
        logits: (N, K).
        labels: (N,).

    Returns:
        top1, top5 (of more than 5 classes), ece, brier and nll.
    """
    probabilities = softmax(logits)
    found = {"top1": top_k_accuracy(probabilities, labels, 1)}
    if probabilities.shape[-1] > 5:
        found["top5"] = top_k_accuracy(probabilities, labels, 5)
    return found | {
        "ece": expected_calibration_error(probabilities, labels),
        "brier": brier_score(probabilities, labels),
        "nll": negative_log_likelihood(logits, labels),
    }
