"""Numbers from samples: quantiles, ratios of neighbours in time, and what is noise."""
from __future__ import annotations

import math
import random
from collections.abc import Sequence

_RESAMPLES = 400
_SEED = 7


def quantile(samples: Sequence[float], q: float) -> float:
    """Return the q-quantile, interpolated between neighbours; NaN of nothing."""
    ordered = sorted(samples)
    if not ordered:
        return math.nan
    at = q * (len(ordered) - 1)
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def median(samples: Sequence[float]) -> float:
    """Return the middle; NaN of nothing."""
    return quantile(samples, 0.5)


def spread(samples: Sequence[float]) -> float:
    """Return the median absolute deviation, scaled to the standard deviation of a normal distribution."""
    middle = median(samples)
    return 1.4826 * median([abs(sample - middle) for sample in samples])


def thin(samples: Sequence[float], most: int) -> list:
    """Return at most `most` of the samples that have about the same quantiles, in ascending order."""
    ordered = sorted(samples)
    if len(ordered) <= most:
        return ordered
    last = len(ordered) - 1
    return [ordered[round(index * last / (most - 1))] for index in range(most)]


def change(before: Sequence[float], after: Sequence[float], confidence: float = 0.99) -> tuple[float, float, float]:
    """Compare two sets of samples.

    Returns
    -------
    tuple of float
        median(after) / median(before), and the bootstrap interval of that ratio.
    """
    if not before or not after or median(before) == 0:
        return math.nan, math.nan, math.nan
    rng = random.Random(_SEED)
    ratios = []
    for _ in range(_RESAMPLES):
        low = median(rng.choices(before, k=len(before)))
        high = median(rng.choices(after, k=len(after)))
        if low > 0:
            ratios.append(high / low)
    tail = (1 - confidence) / 2
    return median(after) / median(before), quantile(ratios, tail), quantile(ratios, 1 - tail)


def slope(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Fit a line by least squares; return (intercept, slope)."""
    count = len(points)
    mean_x, mean_y = sum(x for x, _ in points) / count, sum(y for _, y in points) / count
    spread_x = sum((x - mean_x) ** 2 for x, _ in points)
    if spread_x == 0:
        return mean_y, 0.0
    rate = sum((x - mean_x) * (y - mean_y) for x, y in points) / spread_x
    return mean_y - rate * mean_x, rate
