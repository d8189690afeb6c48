"""What the values of a step are made into before the estimate: themselves, their ranks, or z-scores."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence


def centred_ranks(values: Sequence[float]) -> list[float]:
    """rank / (n - 1) - 1/2, from -1/2 for the smallest to 1/2 for the largest; equal values share the mean of their ranks.

    Only the order counts, so that one outlier does not make the step (Salimans et al. 2017, arXiv 1703.03864).
    """
    order, last = sorted(values), len(values) - 1
    return [(bisect_left(order, value) + bisect_right(order, value) - 1 - last) / (2 * max(1, last)) for value in values]


def z_scores(values: Sequence[float]) -> list[float]:
    """(value - mean) / standard deviation over the points of the step; zeros where all are equal (ES at scale, arXiv 2509.24372)."""
    mean = math.fsum(values) / len(values)
    deviation = math.hypot(*(value - mean for value in values)) / math.sqrt(len(values))
    return [(value - mean) / deviation if deviation > 0 else 0.0 for value in values]


FITNESS: dict[str, Callable[[Sequence[float]], Sequence[float]]] = {"values": list, "ranks": centred_ranks, "z-scores": z_scores}
"""The choices of `fitness=`, by name."""
