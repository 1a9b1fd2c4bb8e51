"""Means over repetitions with other seeds, with Student intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit


def interval(values: Sequence[float]) -> dict[str, Any]:
    """Mean and half-width of the 95% Student interval over seeds (None for one seed)."""
    half = None
    if len(values) > 1:
        spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
        half = float(stdtrit(len(values) - 1, 0.975)) * spread
    return {"mean": float(np.mean(values)), "interval95": half, "values": list(values)}


def paired_gap(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[str, Any] | None:
    """The interval of the differences of two networks, seed by seed.

    Two networks of one seed start from the same draws and see the same batches, so their difference
    varies less than either.

    Args:
        ours: accuracy by seed.
        theirs: accuracy by seed.

    Returns:
        As `interval`, of ours minus theirs over the seeds that both have; None: there are none.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    return interval([ours[seed] - theirs[seed] for seed in seeds]) if seeds else None
