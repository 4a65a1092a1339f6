"""How engines wear: nothing to be seen at first, then faster and faster until they fail."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

SHORTEST, LONGEST = 128, 362
"""Lives in cycles, from first to last, as in FD001."""


WEARING = (70.0, 0.32, 0.09)
"""Cycles from onset to failure: this many, and this share of the life, with this standard deviation, as a share."""


@dataclass(frozen=True)
class Lives:
    """What decides an engine's life; hidden from whoever reads the files. All of shape ``(engines,)``.

    Attributes:
        cycles: Length of the life.
        onset: The cycle after which the engine wears.
        initial: Wear of the new engine, as a share of that at failure.
        growth: How fast wear feeds itself: after the onset it goes as ``exp(growth * share of the way to failure)``.
        fault: Fault mode: 0 high-pressure compressor, 1 fan.
    """

    cycles: Integers
    onset: Integers
    initial: Array
    growth: Array
    fault: Integers

    def wear(self, engine: Integers, cycle: Integers) -> Array:
        r"""Return the wear, 0 for a perfect engine and 1 at failure, of engines at cycles, arrays of one shape.

        .. math:: w(t) = w_0 + (1 - w_0)\frac{e^{g u} - 1}{e^g - 1}, \quad u = \max(0, t - o) / (T - o)

        with onset :math:`o`, life :math:`T` and growth :math:`g`.

        Example:
            >>> one = draw_lives(1, faults=1, stream=np.random.default_rng(0))
            >>> bool(one.wear(np.array([0]), one.cycles) == 1.0)
            True
        """
        onset, growth, initial = self.onset[engine], self.growth[engine], self.initial[engine]
        way = np.maximum(cycle - onset, 0) / (self.cycles[engine] - onset)
        worn: Array = initial + (1 - initial) * np.expm1(growth * way) / np.expm1(growth)
        return worn


def draw_lives(engines: int, faults: int, stream: np.random.Generator) -> Lives:
    """Draw the lives of some engines.

    Args:
        engines: How many.
        faults: Number of fault modes, 1 or 2.
        stream: Where the random numbers come from.
    """
    cycles = np.clip(np.rint(SHORTEST + stream.gamma(2.2, 36.0, engines)), SHORTEST, LONGEST).astype(np.int64)
    wearing = (WEARING[0] + WEARING[1] * cycles) * stream.normal(1.0, WEARING[2], engines)
    return Lives(
        cycles=cycles,
        onset=cycles - np.rint(np.minimum(wearing, 0.92 * cycles)).astype(np.int64),
        initial=stream.uniform(0.0, 0.08, engines),
        growth=stream.normal(3.0, 0.4, engines).clip(1.5, 4.5),
        fault=stream.integers(faults, size=engines),
    )
