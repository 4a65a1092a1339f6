"""Removes the operating conditions from the sensors: mean 0 and standard deviation 1 within each condition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lightning_gradnorm.experiments.problems.engines.cmapss.files import Array, Integers


@dataclass(frozen=True)
class Standardization:
    """``(x - mean) / std``, with mean and standard deviation of the cycle's operating condition.

    In FD002 and FD004, nearly all of a sensor's variance is between conditions. Wear is only visible within a condition.

    Attributes:
        centers: Settings of the conditions, by altitude, then Mach number, then throttle, shape ``(conditions, 3)``.
        scale: Divisor of each setting for distances, shape ``(3,)``.
        mean: Shape ``(conditions, features)``.
        std: Same shape; 1 for a feature that is constant within a condition.
        moves: Shape ``(features,)``: False for a feature that is constant within every condition.

    Example:
        >>> settings = np.array([[0, 0, 100], [0, 0, 100], [0, 0, 100.0]])
        >>> standardize = Standardization.fit(settings, np.array([[1.0], [2.0], [3.0]]), conditions=1)
        >>> standardize(settings[:1], np.array([[2.0]])).tolist()
        [[0.0]]
    """

    centers: Array
    scale: Array
    mean: Array
    std: Array
    moves: npt.NDArray[np.bool_]

    @classmethod
    def fit(cls, settings: Array, features: Array, conditions: int) -> Standardization:
        """Find the conditions and compute their statistics.

        Args:
            settings: Shape ``(cycles, 3)``.
            features: Shape ``(cycles, features)``.
            conditions: Number of conditions to find, by k-means on the settings, each divided by its range.

        Raises:
            ValueError: There are fewer different settings than conditions.
            ModuleNotFoundError: There are several conditions, but scikit-learn is not installed.
        """
        ranges = np.ptp(settings, axis=0)
        scale = np.where(ranges > 0, ranges, 1.0)
        labels = _clusters(settings / scale, conditions)
        groups = [labels == number for number in range(conditions)]
        centers = np.stack([settings[group].mean(axis=0) for group in groups])
        order = np.lexsort(centers.T[::-1])
        means, stds = [], []
        moves = np.zeros(features.shape[1], dtype=bool)
        for number in order:
            own = features[groups[number]]
            means.append(own.mean(axis=0))
            changes = np.ptp(own, axis=0) > 0
            # Do not scale the rounding errors of a constant up to standard deviation 1.
            stds.append(np.where(changes, own.std(axis=0), 1.0))
            moves |= changes
        return cls(centers[order], scale, np.stack(means), np.stack(stds), moves)

    def conditions_of(self, settings: Array) -> Integers:
        """Return the number of the nearest condition of each cycle: ``(cycles, 3)`` to ``(cycles,)``."""
        differences = (settings[:, None] - self.centers) / self.scale
        nearest: Integers = (differences**2).sum(axis=2).argmin(axis=1)
        return nearest

    def __call__(self, settings: Array, features: Array) -> npt.NDArray[np.float32]:
        """Standardize ``features``, shape ``(cycles, features)``, flown at ``settings``, shape ``(cycles, 3)``."""
        condition = self.conditions_of(settings)
        return ((features - self.mean[condition]) / self.std[condition]).astype(np.float32)


def _clusters(points: Array, count: int) -> Integers:
    """Return a number from 0 to ``count - 1`` for each point, shape ``(points, dimensions)`` to ``(points,)``."""
    if count == 1:
        return np.zeros(len(points), dtype=np.int64)
    different = len(np.unique(points, axis=0))
    if different < count:
        raise ValueError(
            f"CMAPSS: conditions should be at most the {different} different settings of the training engines; got {count}."
        )
    try:
        from sklearn.cluster import KMeans
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "CMAPSS: finding the operating conditions needs scikit-learn, which is not installed. Install it: pip install "
            "'lightning-gradnorm[cmapss]'"
        ) from None
    labels: Integers = KMeans(count, n_init=10, random_state=0).fit(points).labels_.astype(np.int64)
    return labels
