"""Flies engines until they fail and records the sensor readings."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lightning_gradnorm.experiments.problems.engines.cmapss.columns import SUBSETS
from lightning_gradnorm.experiments.problems.engines.cmapss.files import Engines
from lightning_gradnorm.experiments.problems.engines.turbofan.engine import (
    AT_FAILURE,
    BUILT,
    CONDITIONS,
    DECIMALS,
    HEALTHY,
    MIX,
    NEW,
    NOISE,
    RELATIVE,
    SETTING_NOISE,
    SHARES,
    WORN,
)
from lightning_gradnorm.experiments.problems.engines.turbofan.wear import Array, Integers, Lives, draw_lives

SHORTEST_RECORD = 31
"""Minimum number of recorded cycles of a test engine."""
MOST_LEFT = {1: 145, 6: 194}
"""Maximum number of cycles left to a test engine, by number of conditions. The minimum is `LEAST_LEFT`."""
LEAST_LEFT = 6


@dataclass(frozen=True)
class Flights:
    """Engines flown to failure.

    Attributes:
        engines: The recorded cycles.
        lives: The hidden variables of the lives.
        conditions: Number of the condition of each cycle, shape ``(cycles,)``.
        wear: Wear in each cycle, shape ``(cycles,)``.
    """

    engines: Engines
    lives: Lives
    conditions: Integers
    wear: Array


def simulate(subset: str, engines: int, seed: int = 0, kind: str = "train") -> Flights:
    """Fly engines to failure.

    Args:
        subset: ``"FD001"`` to ``"FD004"``. It determines the number of conditions and fault modes.
        engines: Number of engines.
        seed: Seed of all random draws.
        kind: ``"train"`` or ``"test"``: different engines with the same seed.

    Example:
        >>> flights = simulate("FD002", engines=3)
        >>> flights.engines.sensors.shape == (flights.lives.cycles.sum(), 21)
        True
    """
    part = SUBSETS[subset]
    lives = draw_lives(engines, part.faults, _stream(subset, seed, kind, "lives"))
    engine = np.repeat(np.arange(engines), lives.cycles)
    cycle = np.arange(len(engine)) - np.repeat(np.cumsum(lives.cycles) - lives.cycles, lives.cycles) + 1
    flown = _stream(subset, seed, kind, "conditions")
    shares = SHARES[: part.conditions] / SHARES[: part.conditions].sum()
    conditions = flown.choice(part.conditions, size=len(engine), p=shares)
    settings = CONDITIONS[conditions] + SETTING_NOISE * flown.normal(size=(len(engine), 3))
    wear = lives.wear(engine, cycle)
    sensors = _show(lives, engine, conditions, wear, _stream(subset, seed, kind, "sensors"))
    recorded = Engines(np.arange(1, engines + 1), lives.cycles, settings, sensors)
    return Flights(recorded, lives, conditions, wear)


def _show(lives: Lives, engine: Integers, conditions: Integers, wear: Array, stream: np.random.Generator) -> Array:
    """Return the sensor readings, shape ``(cycles, 21)``, rounded as in NASA's files."""
    fault = lives.fault
    new = NEW[fault] + BUILT[fault] * lives.built[:, None]
    worn = WORN[fault] * stream.normal(1, AT_FAILURE, (len(fault), 1)) + MIX[fault] * lives.mix[:, None]
    moved = new[engine] + (worn - new)[engine] * wear[:, None]
    noise = NOISE[fault[engine]] * stream.normal(size=moved.shape)
    shown = HEALTHY[conditions] + RELATIVE[conditions] * moved + noise
    return np.stack([np.round(column, digits) for column, digits in zip(shown.T, DECIMALS, strict=True)], axis=1)


def cut_short(flights: Flights, subset: str, seed: int = 0) -> tuple[Engines, Integers]:
    """End each engine's record at a random cycle before its failure, as in the test files.

    Returns:
        The recorded cycles, and the number of cycles that each engine had left, shape ``(engines,)``.
    """
    engines = flights.engines
    most = np.minimum(MOST_LEFT[SUBSETS[subset].conditions], engines.lengths - SHORTEST_RECORD)
    left = _stream(subset, seed, "test", "cuts").integers(LEAST_LEFT, most, endpoint=True)
    lengths = engines.lengths - left
    kept = np.arange(len(engines.settings)) < engines.of_rows(engines.starts + lengths)
    return Engines(engines.units, lengths, engines.settings[kept], engines.sensors[kept]), left


def _stream(subset: str, seed: int, *names: str) -> np.random.Generator:
    """Return a separate generator for each random quantity, so no draw depends on the others."""
    return np.random.default_rng([seed, *(int.from_bytes(name.encode(), "little") for name in (subset, *names))])
