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

GROWTH = np.array([[3.0, 4.8], [4.5, 6.0]])
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

    # A quasi-random sequence, shifted and shuffled: a few engines cover all combinations as evenly as many would.
    steps = 1.1347241384015194 ** -np.arange(1.0, 6.0)
    points = (stream.permutation(engines)[:, None] * steps + stream.random(5)) % 1
    fault = ((points[:, 0] < FAN) & (faults > 1)).astype(np.int64)
    built = 2 * points[:, 1] - 1
    lasting = points[:, 2] - 0.11 * built  # those built worse fail earlier
    cycles = np.empty(engines, dtype=np.int64)
    for mode, lives in enumerate(LIVES):
        own = np.flatnonzero(fault == mode)
        rank = (np.argsort(np.argsort(lasting[own])) + 0.5) / max(len(own), 1)
        cycles[own] = np.rint(np.interp(rank, QUANTILES, lives))
    least, most = GROWTH[fault].T
    return Lives(
        cycles=cycles,
        growth=least + (most - least) * points[:, 3],
        fault=fault,
        built=built,
        mix=points[:, 4] ** 2 - 1 / 3,
    )
