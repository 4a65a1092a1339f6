"""How engines wear: hardly visible at first, then faster and faster until they fail."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

LIVES = np.array([[128, 155, 175, 197, 227, 272, 362], [161, 204, 232, 287, 344, 410, 543]])
"""Quantiles of the lives in cycles, by fault mode, at `QUANTILES`. Same as in FD001 to FD004."""
QUANTILES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)

FAN = 0.44
"""Share of the engines with a failing fan, if there are two fault modes."""

GROWTH = np.array([[3.0, 4.8], [4.5, 6.0]])
"""Minimum and maximum growth of the wear, by fault mode."""

EARLIER = 0.09
"""How much earlier engines fail if they were worse when new. Gives a correlation of -0.2, as in FD001."""

STEPS = 1.1673039782614187 ** -np.arange(1.0, 5.0)[:, None]
"""Steps of the additive quasi-random sequence in four dimensions: powers of the inverse root of x^5 = x + 1."""


@dataclass(frozen=True)
class Lives:
    """The hidden variables of the engines' lives, which are not in the files. All have shape ``(engines,)``.

    Attributes:
        cycles: Length of the life.
        growth: Growth rate of the wear, which is proportional to ``exp(growth * share of the life)``.
        fault: Fault mode: 0 high-pressure compressor, 1 fan.
        built: Quality of the new engine: -1 for the best, 1 for the worst.
        mix: Kind of wear, around 0: loss of flow rather than of efficiency.
    """

    cycles: Integers
    growth: Array
    fault: Integers
    built: Array
    mix: Array

    def wear(self, engine: Integers, cycle: Integers) -> Array:
        r"""Return the wear of engines at cycles (arrays of the same shape): 0 for a new engine, 1 at failure.

        .. math:: w(t) = \frac{e^{g t / T} - 1}{e^g - 1}

        with life :math:`T` and growth :math:`g`.

        Example:
            >>> one = draw_lives(1, faults=1, stream=np.random.default_rng(0))
            >>> bool(one.wear(np.array([0]), one.cycles) == 1.0)
            True
        """
        growth, share = self.growth[engine], cycle / self.cycles[engine]
        worn: Array = np.expm1(growth * share) / np.expm1(growth)
        return worn


def draw_lives(engines: int, faults: int, stream: np.random.Generator) -> Lives:
    """Draw the lives of some engines.

    Args:
        engines: Number of engines.
        faults: Number of fault modes, 1 or 2.
        stream: Source of the random numbers.
    """
    fault = ((stream.permutation(engines) < FAN * engines) & (faults > 1)).astype(np.int64)
    cycles, growth, built, mix = (np.empty(engines) for _ in range(4))
    for mode in range(faults):
        own = stream.permutation(np.flatnonzero(fault == mode))
        # A quasi-random sequence with a random start: a few engines vary as much as many would.
        lasting, state, kind, share = (STEPS * np.arange(len(own)) + stream.random((4, 1))) % 1
        built[own] = 2 * state - 1
        # Engines of worse quality fail somewhat earlier.
        rank = (np.argsort(np.argsort(lasting - EARLIER * built[own])) + 0.5) / max(len(own), 1)
        cycles[own] = np.rint(np.interp(rank, QUANTILES, LIVES[mode]))
        growth[own] = np.interp(share, (0, 1), GROWTH[mode])
        mix[own] = kind**2 - 1 / 3
    return Lives(cycles.astype(np.int64), growth, fault, built, mix)
