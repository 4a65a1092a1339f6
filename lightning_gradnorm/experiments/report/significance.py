"""Tests if a difference between two methods is more than chance: the paired t-test, in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

LEVEL = 0.05
FEWEST = 5
"""The smallest number of pairs for which a difference can be called significant."""


@dataclass(frozen=True)
class PairedTest:
    """Differences between pairs: their mean and, from two pairs on, its 95 % interval and the p value of Student's t."""

    mean: float
    count: int
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def is_significant(self) -> bool:
        """True if p < 0.05 with five pairs or more, without correction for other tests."""
        return self.has_enough and self.p is not None and self.p < LEVEL

    @property
    def has_enough(self) -> bool:
        """True if there are enough pairs to call a difference significant."""
        return self.count >= FEWEST


def paired_test(differences: Sequence[float]) -> PairedTest:
    """Return the two-sided paired t-test of differences against 0.

    One pair gives only the difference. If all differences are 0, there is no p value, because there is nothing to test.

    Args:
        differences: one per pair, at least one.

    Raises:
        ValueError: there are no differences.

    Example:
        >>> test = paired_test([1.0, 2.0, 3.0])
        >>> round(test.mean, 3), round(test.low, 3), round(test.high, 3), round(test.p, 4)
        (2.0, -0.484, 4.484, 0.0742)
    """
    if not differences:
        raise ValueError("paired_test: differences should be one or more; got none.")
    count = len(differences)
    if not all(map(math.isfinite, differences)):
        return PairedTest(math.nan, count)
    mean = fmean(differences)
    if count == 1 or not any(differences):
        return PairedTest(mean, count)
    error = deviation(differences) / math.sqrt(count)
    half = t_quantile(0.95, count - 1) * error
    p = t_two_sided(mean / error, count - 1) if error else 0.0
    return PairedTest(mean, count, mean - half, mean + half, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p values corrected for multiple tests: Holm, *A simple sequentially rejective multiple test procedure*.

    If no true difference exists, the probability that any corrected value is below 0.05 is at most 0.05.

    Example:
        >>> [round(p, 3) for p in holm([0.04, 0.01, 0.03])]
        [0.06, 0.03, 0.06]
    """
    ordered = sorted(range(len(p_values)), key=p_values.__getitem__)
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(ordered):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of a sample of two or more values; NaN if one is not finite.

    Example:
        >>> deviation([1.0, 2.0, 3.0])
        1.0
    """
    if not all(map(math.isfinite, values)):
        return math.nan
    mean = fmean(values)
    return math.hypot(*(value - mean for value in values)) / math.sqrt(len(values) - 1)


def t_two_sided(t: float, dof: int) -> float:
    """Return P(|T| ≥ |t|) of Student's t, from the finite sums for integer degrees of freedom.

    The sums are 26.7.3 and 26.7.4 in Abramowitz and Stegun's Handbook of Mathematical Functions.

    Args:
        t: the statistic.
        dof: degrees of freedom, 1 or more.

    Example:
        >>> round(t_two_sided(12.7062, 1), 5), round(t_two_sided(2.0, 10), 5)
        (0.05, 0.07339)
    """
    if dof < 1:
        raise ValueError(f"t_two_sided: dof should be 1 or more; got {dof}")
    angle = math.atan2(abs(t), math.sqrt(dof))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = dof % 2
    term = math.cos(angle) if odd else 1.0
    total = 0.0
    for number in range(dof // 2):
        total += term
        # 2/3, 4/5, … if dof is odd; 1/2, 3/4, … if it is even
        term *= square * (2 * number + 1 + odd) / (2 * number + 2 + odd)
    inside = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return min(1.0, max(0.0, 1.0 - inside))


def t_quantile(inside: float, dof: int) -> float:
    """Return the t for which Student's t lies within ±t with probability ``inside``.

    Args:
        inside: between 0 and 1, such as 0.95.
        dof: degrees of freedom, 1 or more.

    Example:
        >>> round(t_quantile(0.95, 2), 3), round(t_quantile(0.95, 30), 3)
        (4.303, 2.042)
    """
    low, high = 0.0, 1.0
    while t_two_sided(high, dof) > 1 - inside:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_two_sided(middle, dof) > 1 - inside else (low, middle)
    return high
