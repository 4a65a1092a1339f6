"""How engines wear: hardly to be seen at first, then faster and faster until they fail."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

LIVES = np.array([[128, 155, 175, 197, 227, 272, 362], [161, 204, 232, 287, 344, 410, 543]])
"""Quantiles of the lives in cycles, by fault mode, at `QUANTILES`: as in FD001 to FD004."""
QUANTILES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 1)

FAN = 0.44
"""Share of the engines whose fan fails, where there are two fault modes."""

GROWTH = np.array([[3.0, 4.8], [4.6, 5.8]])
"""Least and greatest growth of the wear, by fault mode."""


@dataclass(frozen=True)
class Lives:
    """What decides an engine's life; hidden from whoever reads the files. All of shape ``(engines,)``.

    Attributes:
        cycles: Length of the life.
        growth: How fast wear feeds itself: it goes as ``exp(growth * share of the life)``.
        fault: Fault mode: 0 high-pressure compressor, 1 fan.
        built: How far from perfect the engine was when new: -1 for the best, 1 for the worst.
        mix: Of which kind the wear is, around 0: losing flow rather than efficiency.
    """

    cycles: Integers
    growth: Array
    fault: Integers
    built: Array
    mix: Array

    def wear(self, engine: Integers, cycle: Integers) -> Array:
        r"""Return the wear, 0 for a new engine and 1 at failure, of engines at cycles, arrays of one shape.

        .. math:: w(t) = \frac{e^{g t / T} - 1}{e^g - 1}

        with life :math:`T` and growth :math:`g`.

        Example:
            >>> one = draw_lives(1, faults=1, stream=np.random.default_rng(0))
            >>> bool(one.wear(np.array([0]), one.cycles) == 1.0)
            True
        """
        growth = self.growth[engine]
        worn: Array = np.expm1(growth * cycle / self.cycles[engine]) / np.expm1(growth)
        return worn


def draw_lives(engines: int, faults: int, stream: np.random.Generator) -> Lives:
    """Draw the lives of some engines.

    Args:
        engines: How many.
        faults: Number of fault modes, 1 or 2.
        stream: Where the random numbers come from.
    """

    def drawn() -> Array:
        """Numbers of 0 to 1, as evenly spread as can be, so that few engines differ as much as many."""
        return (stream.permutation(engines) + stream.random(engines)) / engines

    fault = ((drawn() < FAN) & (faults > 1)).astype(np.int64)
    built = 2 * drawn() - 1
    lasting = stream.normal(size=engines) - 0.4 * built
    cycles = np.empty(engines, dtype=np.int64)
    for mode, lives in enumerate(LIVES):
        own = np.flatnonzero(fault == mode)
        rank = (np.argsort(np.argsort(lasting[own])) + 0.5) / max(len(own), 1)
        cycles[own] = np.rint(np.interp(rank, QUANTILES, lives))
    least, most = GROWTH[fault].T
    return Lives(
        cycles=cycles,
        growth=least + (most - least) * drawn(),
        fault=fault,
        built=built,
        mix=drawn() ** 2 - 1 / 3,
    )
