"""Simulated engines wear, fail and are recorded as documented, in files like NASA's."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lightning_gradnorm.experiments.problems.engines.cmapss import SUBSETS, Standardization, read_engines, read_rul
from lightning_gradnorm.experiments.problems.engines.turbofan import cut_short, simulate, write_turbofan
from lightning_gradnorm.experiments.problems.engines.turbofan.engine import (
    BUILT,
    CONDITIONS,
    HEALTHY,
    MIX,
    NEW,
    NOISE,
    RELATIVE,
    WORN,
)


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
            fields = line.removesuffix("  ").split(" ")
            assert len(fields) == 26
            decimals = [len(field.partition(".")[2]) for field in fields]
            assert decimals == [0, 0, 4, 4, 1, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 4, 2, 0, 0, 2, 2, 4]
    left = (root / f"RUL_{subset}.txt").read_text().split("\n")
    assert left[-1] == ""
    assert all(line.endswith(" ") and line[:-1].isdigit() for line in left[:-1])


@pytest.mark.parametrize("subset", ["FD001", "FD004"])
def test_the_reader_returns_the_simulated_numbers(subset: str, tmp_path: Path) -> None:
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
    longest = 362 if SUBSETS[subset].faults == 1 else 543
    assert 128 <= lives.min() < 150
    assert 0.9 * longest < lives.max() <= longest
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


def test_wear_grows_exponentially_from_nothing_to_failure() -> None:
    lives = simulate("FD003", 30).lives
    for engine in range(30):
        life, growth = int(lives.cycles[engine]), lives.growth[engine]
        cycles = np.arange(life + 1)
        wear = lives.wear(np.full(life + 1, engine), cycles)
        for cycle, found in zip(cycles.tolist(), wear.tolist(), strict=True):
            expected = (math.exp(growth * cycle / life) - 1) / (math.exp(growth) - 1)
            assert found == pytest.approx(expected, rel=1e-12)
        assert (wear[0], wear[-1]) == (0, 1)


@pytest.mark.parametrize("subset", ["FD001", "FD003"])
@pytest.mark.parametrize("engines", [40, 200])
def test_few_engines_differ_as_much_as_many_in_all_that_decides_their_lives(subset: str, engines: int) -> None:
    lives = simulate(subset, engines, seed=3).lives
    fans = lives.fault == 1
    assert fans.mean() == pytest.approx(0.44 if subset == "FD003" else 0, abs=0.02)
    for own in (fans, ~fans) if subset == "FD003" else (~fans,):
        for values, least, most in ((lives.built, -1, 1), (np.sqrt(lives.mix + 1 / 3), 0, 1)):
            evenly = least + (most - least) * (np.arange(own.sum()) + 0.5) / own.sum()
            assert np.abs(np.sort(values[own]) - evenly).max() < 0.15 * (most - least)
        if engines == 200:
            assert -0.35 < np.corrcoef(lives.built[own], lives.cycles[own])[0, 1] < -0.05
            assert abs(np.corrcoef(lives.built[own], lives.mix[own])[0, 1]) < 0.1
    if subset == "FD003":
        assert lives.cycles[fans].mean() > 1.3 * lives.cycles[~fans].mean()


@pytest.mark.parametrize("subset", SUBSETS)
def test_engines_fly_in_the_conditions_of_their_subset(subset: str) -> None:
    flights = simulate(subset, 30)
    places = CONDITIONS[: SUBSETS[subset].conditions]
    distance = np.abs(flights.engines.settings[:, None] - places).max(axis=2)
    assert distance.min(axis=1).max() < 0.02
    nearest = distance.argmin(axis=1)
    assert np.array_equal(nearest, flights.conditions)
    shares = np.bincount(nearest, minlength=len(places)) / len(nearest)
    expected = [1] if len(places) == 1 else [0.15] * 5 + [0.25]
    assert np.abs(shares - expected).max() < 0.02
    found = Standardization.fit(flights.engines.settings, flights.engines.sensors, len(places))
    assert np.array_equal(found.conditions_of(flights.engines.settings), flights.conditions)


@pytest.mark.parametrize("subset", SUBSETS)
def test_sensors_show_the_condition_the_wear_and_noise_of_the_size_given(subset: str) -> None:
    """Least squares of each engine's sensors on its wear gives back a new engine, a worn one and the noise."""
    flights, count = simulate(subset, 60), 60
    lives, conditions = flights.lives, flights.conditions
    shown = flights.engines.sensors - HEALTHY[conditions]
    engine = np.repeat(np.arange(count), lives.cycles)
    moving = np.flatnonzero(NOISE[0] > 0.01)
    new, worn, noise = np.empty((3, count, len(moving)))
    for number in range(count):
        own = engine == number
        for place, sensor in enumerate(moving):
            scale = RELATIVE[conditions[own], sensor]
            design = np.stack([scale * (1 - flights.wear[own]), scale * flights.wear[own]], axis=1)
            fit = np.linalg.lstsq(design, shown[own, sensor], rcond=None)[0]
            new[number, place], worn[number, place] = fit
            noise[number, place] = (shown[own, sensor] - design @ fit).std()
    rounding = np.array([0.003] * 14 + [0.00003, 0.003, 0.3, 0.3, 0.003, 0.003, 0.00003])[moving]
    change = np.abs(WORN - NEW)[:, moving]
    for fault in range(SUBSETS[subset].faults):
        own = lives.fault == fault
        assert np.abs(noise[own].mean(axis=0) / np.hypot(NOISE[fault, moving], rounding) - 1).max() < 0.1
        built = NEW[fault, moving] + BUILT[fault, moving] * lives.built[own, None]
        assert (np.abs(new[own] - built).mean(axis=0) < 0.15 * change[fault]).all()
        expected = WORN[fault, moving] + MIX[fault, moving] * lives.mix[own, None]
        assert (np.abs((worn[own] - expected).mean(axis=0)) < 0.1 * change[fault]).all()


REAL = {  # of NASA's training files: mean, standard deviation, correlation with the remaining life, capped at 125 and not
    "FD001": {
        2: (642.681, 0.5000, -0.678, -0.606), 3: (1590.523, 6.1310, -0.655, -0.585), 4: (1408.934, 9.0004, -0.757, -0.679),
        6: (21.610, 0.0014, -0.108, -0.128), 7: (553.368, 0.8851, 0.733, 0.657), 8: (2388.097, 0.0710, -0.625, -0.564),
        9: (9065.243, 22.0823, -0.462, -0.390), 11: (47.541, 0.2671, -0.775, -0.696), 12: (521.413, 0.7375, 0.749, 0.672),
        13: (2388.096, 0.0719, -0.624, -0.563), 14: (8143.753, 19.0757, -0.370, -0.307), 15: (8.442, 0.0375, -0.721, -0.643),
        17: (393.211, 1.5487, -0.681, -0.606), 20: (38.816, 0.1807, 0.705, 0.629), 21: (23.290, 0.1082, 0.707, 0.636),
    },
    "FD003": {
        2: (642.458, 0.5230, -0.682, -0.591), 3: (1588.079, 6.8103, -0.696, -0.624), 4: (1404.471, 9.7730, -0.770, -0.657),
        6: (21.596, 0.0181, -0.096, -0.215), 7: (555.144, 3.4373, -0.357, -0.315), 8: (2388.072, 0.1583, -0.634, -0.655),
        9: (9064.111, 19.9799, -0.644, -0.552), 10: (1.301, 0.0035, -0.495, -0.363), 11: (47.416, 0.3001, -0.805, -0.689),
        12: (523.051, 3.2552, -0.375, -0.329), 13: (2388.072, 0.1581, -0.635, -0.656), 14: (8144.203, 16.5038, -0.564, -0.482),
        15: (8.396, 0.0605, -0.002, -0.017), 17: (392.567, 1.7614, -0.726, -0.649), 20: (38.989, 0.2489, 0.050, 0.038),
        21: (23.393, 0.1492, 0.042, 0.033),
    },
}  # fmt: skip
QUARTILES = {"FD001": (177, 199, 229.25), "FD003": (189.75, 220.5, 279.75)}


@pytest.mark.parametrize("subset", REAL)
def test_sensors_are_as_in_nasas_files(subset: str) -> None:
    """Within what ``scripts/compare_turbofan.py`` states; with NASA's files that script is run in its own test."""
    engines = simulate(subset, 100).engines
    assert np.percentile(engines.lengths, (25, 50, 75)) == pytest.approx(QUARTILES[subset], rel=0.1)
    left = np.concatenate([np.arange(length)[::-1] for length in engines.lengths])
    moving = {sensor + 1 for sensor in range(21) if np.ptp(engines.sensors[:, sensor]) > 0}
    assert moving == set(REAL[subset])
    for sensor, (mean, std, capped, uncapped) in REAL[subset].items():
        shown = engines.sensors[:, sensor - 1]
        assert shown.mean() == pytest.approx(mean, abs=0.25 * std + 0.0005), sensor
        assert shown.std() == pytest.approx(std, rel=0.1, abs=0.001 if sensor in (6, 10) else None), sensor
        assert np.corrcoef(shown, np.minimum(left, 125))[0, 1] == pytest.approx(capped, abs=0.05), sensor
        assert np.corrcoef(shown, left)[0, 1] == pytest.approx(uncapped, abs=0.05), sensor


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
