"""Simulated engines wear, fail and are recorded as is said, in files like NASA's."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_gradnorm.experiments.problems.engines.cmapss import SUBSETS, Standardisation, read_engines, read_rul
from lightning_gradnorm.experiments.problems.engines.turbofan import cut_short, simulate, write_turbofan
from lightning_gradnorm.experiments.problems.engines.turbofan.engine import CONDITIONS, HEALTHY, NOISE, RELATIVE, WORN


def digest(folder: Path) -> str:
    content = b"".join(file.name.encode() + file.read_bytes() for file in sorted(folder.iterdir()))
    return hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("subset", SUBSETS)
def test_the_same_arguments_give_the_same_bytes_and_others_do_not(subset: str, tmp_path: Path) -> None:
    def written(name: str, engines: int = 4, test_engines: int = 3, seed: int = 0) -> Path:
        return write_turbofan(tmp_path / name, subset, engines, test_engines, seed)

    one, again, other = written("one"), written("again"), written("other", seed=1)
    assert digest(one) == digest(again)
    for kind in ("train", "test", "RUL"):
        assert (one / f"{kind}_{subset}.txt").read_bytes() != (other / f"{kind}_{subset}.txt").read_bytes()
    more = written("more", engines=6)  # how many engines there are in one file changes nothing in another
    for kind in ("test", "RUL"):
        assert (one / f"{kind}_{subset}.txt").read_bytes() == (more / f"{kind}_{subset}.txt").read_bytes()


@pytest.mark.slow
def test_another_process_gives_the_same_bytes(tmp_path: Path) -> None:
    here = write_turbofan(tmp_path / "here", "FD004", 3, 3, seed=5)
    code = "from lightning_gradnorm.experiments.problems.engines.turbofan.files import write_turbofan; import sys; "
    code += "write_turbofan(sys.argv[1], 'FD004', 3, 3, seed=5)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True)
    assert digest(here) == digest(tmp_path / "there")


@pytest.mark.parametrize("subset", SUBSETS)
def test_the_files_are_laid_out_as_nasas(subset: str, tmp_path: Path) -> None:
    root = write_turbofan(tmp_path / "made", subset, 3, 3)
    for kind in ("train", "test"):
        text = (root / f"{kind}_{subset}.txt").read_bytes().decode("ascii")
        for line in text.removesuffix("\n").split("\n"):
            assert line.endswith("  ")
            words = line.removesuffix("  ").split(" ")
            assert len(words) == 26
            decimals = [len(word.partition(".")[2]) for word in words]
            assert decimals == [0, 0, 4, 4, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 4, 2, 0, 0, 2, 2, 4]
    left = (root / f"RUL_{subset}.txt").read_text().split("\n")
    assert left[-1] == ""
    assert all(line.endswith(" ") and line[:-1].isdigit() for line in left[:-1])


@pytest.mark.parametrize("subset", ["FD001", "FD004"])
def test_what_is_read_is_what_was_simulated(subset: str, tmp_path: Path) -> None:
    root = write_turbofan(tmp_path / "made", subset, 3, 5, seed=2)
    flown = {
        "train": simulate(subset, 3, 2, "train").engines,
        "test": cut_short(simulate(subset, 5, 2, "test"), subset, 2)[0],
    }
    for kind, expected in flown.items():
        read = read_engines(root / f"{kind}_{subset}.txt")
        assert read.units.tolist() == list(range(1, len(expected.lengths) + 1))
        assert read.lengths.tolist() == expected.lengths.tolist()
        assert np.array_equal(read.sensors, expected.sensors)  # they are rounded before, as they are written
        assert np.abs(read.settings - expected.settings).max() <= 5.1e-5
    assert (
        read_rul(root / f"RUL_{subset}.txt").tolist()
        == cut_short(simulate(subset, 5, 2, "test"), subset, 2)[1].tolist()
    )


@pytest.mark.parametrize("subset", SUBSETS)
def test_training_engines_run_to_failure_and_test_engines_are_cut_before(subset: str) -> None:
    train = simulate(subset, 200, kind="train")
    lives = train.lives.cycles
    assert 128 <= lives.min() < 150
    assert 300 < lives.max() <= 362
    assert 190 < lives.mean() < 220
    ends = np.cumsum(lives) - 1
    assert np.allclose(train.wear[ends], 1)
    assert train.wear[np.setdiff1d(np.arange(lives.sum()), ends)].max() < 1
    test = simulate(subset, 200, kind="test")
    assert not np.array_equal(test.lives.cycles, lives)
    recorded, left = cut_short(test, subset)
    assert (recorded.lengths + left == test.lives.cycles).all()
    assert recorded.lengths.min() >= 31
    assert 6 <= left.min() < 15
    assert 130 < left.max() <= (194 if SUBSETS[subset].conditions == 6 else 145)
    start, whole = 0, 0
    for length, life in zip(recorded.lengths, test.lives.cycles, strict=True):
        assert np.array_equal(recorded.sensors[start : start + length], test.engines.sensors[whole : whole + length])
        start, whole = start + length, whole + life


def test_wear_begins_at_the_onset_and_grows_exponentially() -> None:
    lives = simulate("FD003", 30).lives
    for engine in range(30):
        life, onset = int(lives.cycles[engine]), int(lives.onset[engine])
        initial, growth = lives.initial[engine], lives.growth[engine]
        assert 10 <= onset < 200
        cycles = np.arange(1, life + 1)
        wear = lives.wear(np.full(life, engine), cycles)
        for cycle, found in zip(cycles.tolist(), wear.tolist(), strict=True):
            way = max(0, cycle - onset) / (life - onset)
            expected = initial + (1 - initial) * (math.exp(growth * way) - 1) / (math.exp(growth) - 1)
            assert found == pytest.approx(expected, rel=1e-12)
    assert len(set(lives.onset.tolist())) > 20
    assert np.std(lives.initial) > 0.01


@pytest.mark.parametrize("subset", SUBSETS)
def test_engines_fly_in_the_conditions_of_their_subset(subset: str) -> None:
    flights = simulate(subset, 30)
    places = CONDITIONS[: SUBSETS[subset].conditions]
    distance = np.abs(flights.engines.settings[:, None] - places).max(axis=2)
    assert distance.min(axis=1).max() < 0.02
    nearest = distance.argmin(axis=1)
    assert np.array_equal(nearest, flights.conditions)
    shares = np.bincount(nearest, minlength=len(places)) / len(nearest)
    assert np.abs(shares - 1 / len(places)).max() < 0.03
    found = Standardisation.fit(flights.engines.settings, flights.engines.sensors, len(places))
    assert np.array_equal(found.conditions_of(flights.engines.settings), flights.conditions)


@pytest.mark.parametrize("subset", SUBSETS)
def test_sensors_show_the_condition_the_wear_and_noise_of_the_size_given(subset: str) -> None:
    """Least squares of each engine's sensors on its wear gives back level, answer and noise, on average over engines."""
    flights = simulate(subset, 150)
    conditions = flights.conditions
    # In units of the first condition, from which the others differ by a level and a scale.
    shown = (flights.engines.sensors - HEALTHY[conditions]) / RELATIVE[conditions]
    engine = np.repeat(np.arange(150), flights.lives.cycles)
    fits, residuals = np.empty((150, 2, 21)), np.empty((150, 21))
    for number in range(150):
        own = engine == number
        design = np.stack([np.ones(own.sum()), flights.wear[own]], axis=1)
        fits[number] = np.linalg.lstsq(design, shown[own], rcond=None)[0]
        residuals[number] = (shown[own] - design @ fits[number]).std(axis=0)
    rounding = np.array([0.003] * 14 + [0.00003, 0.003, 0.3, 0.3, 0.003, 0.003, 0.00003])
    moving = NOISE > 0.01
    assert np.abs(residuals.mean(axis=0)[moving] / np.hypot(NOISE, rounding)[moving] - 1).max() < 0.1
    for fault in range(SUBSETS[subset].faults):
        own = flights.lives.fault == fault
        assert own.sum() > 50
        answer = fits[own, 1].mean(axis=0)
        steady = moving & (np.arange(21) != 8) & (np.arange(21) != 13)
        assert np.abs(answer / np.where(WORN[fault] == 0, 1, WORN[fault]) - 1)[steady].max() < 0.1
        assert np.ptp(np.sign(fits[own, 1, 8])) == 2  # the core's speed rises in some engines and falls in others
    constant = [0, 4, 9, 15, 17, 18]
    level = {condition: shown[conditions == condition][:, constant] for condition in set(conditions.tolist())}
    assert all(np.ptp(values, axis=0).max() == 0 for values in level.values())


@pytest.mark.parametrize("sensor", [7, 12, 15, 20, 21])
def test_the_two_fault_modes_can_be_told_apart(sensor: int) -> None:
    assert WORN[0, sensor - 1] * WORN[1, sensor - 1] < 0


def test_most_of_the_variance_is_between_conditions_as_in_fd002() -> None:
    """On NASA's FD002 it is 98.9 %."""
    flights = simulate("FD002", 30)
    sensors = flights.engines.sensors[:, [1, 2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 16, 19, 20]]
    within = np.stack(
        [sensors[flights.conditions == c].var(axis=0) * (flights.conditions == c).mean() for c in range(6)]
    )
    assert 0.97 < np.mean(1 - within.sum(axis=0) / sensors.var(axis=0)) < 0.9999
