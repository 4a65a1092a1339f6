"""NASA's files are recognized by their numbers; a warning names the right file if one is altered or swapped."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from engine_files import lines, write_engines
from real_data import real_data

from lightning_gradnorm.experiments.problems.engines.cmapss import CMAPSS, SUBSETS, read_engines, read_rul
from lightning_gradnorm.experiments.problems.engines.cmapss.originals import ORIGINALS, Original, fingerprint

pytestmark = pytest.mark.filterwarnings("ignore:CMAPSS. sensors should vary")

TRAIN, TEST, RUL = (9, 8, 10, 12), (7, 6), (3, 30)
OTHER_TRAIN, OTHER_TEST = (8, 11, 9, 9), (9, 5)
FIRST_RUL = {  # of NASA's RUL files, as they were read by hand
    "FD001": [112, 98, 69, 82, 91], "FD002": [18, 79, 106, 110, 15],
    "FD003": [44, 51, 27, 120, 101], "FD004": [22, 39, 107, 75, 149],
}  # fmt: skip
SHORTEST_TEST = {"FD001": 31, "FD002": 21, "FD003": 38, "FD004": 19}
PUBLISHED = {  # rows and engines of the train and the test file
    "FD001": (20631, 100, 13096, 100), "FD002": (53759, 260, 33991, 259),
    "FD003": (24720, 100, 16596, 100), "FD004": (61249, 249, 41214, 248),
}  # fmt: skip

ALL_SUBSETS = pytest.mark.parametrize(
    "subset", [pytest.param(one, marks=[pytest.mark.slow] if one != "FD001" else []) for one in SUBSETS]
)


def known(file: Path) -> Original:
    if file.name.startswith("RUL"):
        rul = read_rul(file)
        return Original(len(rul), len(rul), fingerprint(rul))
    engines = read_engines(file)
    numbers = fingerprint(engines.of_rows(engines.units), engines.settings, engines.sensors)
    return Original(len(engines.settings), len(engines.units), numbers)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the small files of FD001 and, in `of_fd003`, of FD003, in place of NASA's."""
    folder = write_engines(tmp_path / "files", TRAIN, TEST, RUL)
    other = write_engines(tmp_path / "files" / "of_fd003", OTHER_TRAIN, OTHER_TEST, (44, 51), subset="FD003")
    for file in (*folder.glob("*.txt"), *other.glob("*.txt")):
        monkeypatch.setitem(ORIGINALS, file.name, known(file))
    return folder


def warnings_of(root: Path) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        CMAPSS(root, window=4, cap=8, health_thresholds=(5, 2), val_fraction=0.25).setup()
    return [str(one.message) for one in caught if "should be NASA's" in str(one.message)]


def test_the_originals_are_read_without_a_word(root: Path) -> None:
    assert warnings_of(root) == []


def test_blanks_a_header_and_line_ends_make_no_other_file(root: Path) -> None:
    for file in root.glob("*.txt"):
        text = [" ".join(line.split()) for line in file.read_text().splitlines()]
        header = "RUL" if file.name.startswith("RUL") else " ".join(f"c{i}" for i in range(26))
        file.write_bytes("\r\n".join([header, *text]).encode())
    assert warnings_of(root) == []


@pytest.mark.parametrize("kind", ["train", "test"])
def test_a_file_of_another_subset_is_named(kind: str, root: Path) -> None:
    (root / f"{kind}_FD001.txt").write_bytes((root / "of_fd003" / f"{kind}_FD003.txt").read_bytes())
    (warning,) = warnings_of(root)
    assert warning.startswith(
        f"CMAPSS: {kind}_FD001.txt in {root} should be NASA's, {ORIGINALS[f'{kind}_FD001.txt']}; "
    )
    assert f"it has the numbers of NASA's {kind}_FD003.txt. " in warning


def test_the_test_file_in_the_train_files_place_is_named(root: Path) -> None:
    (root / "train_FD001.txt").write_bytes((root / "test_FD001.txt").read_bytes())
    (warning,) = warnings_of(root)
    assert "train_FD001.txt" in warning
    assert "it has the numbers of NASA's test_FD001.txt" in warning


def test_one_other_number_is_enough(root: Path) -> None:
    file = root / "train_FD001.txt"
    text = file.read_text().splitlines()
    words = text[20].split()
    words[9] = f"{float(words[9]) + 0.0001:.4f}"
    file.write_text("\n".join([*text[:20], " ".join(words), *text[21:]]))
    (warning,) = warnings_of(root)
    assert "train_FD001.txt" in warning
    assert "39 rows of 4 engines; it has as many, but some numbers differ" in warning


def test_engines_moved_from_the_train_to_the_test_file_are_seen_and_the_test_file_is_blamed(root: Path) -> None:
    """As in a public copy: 90 training and 110 test engines, and NASA's RUL file of 100."""
    (root / "train_FD001.txt").write_text("\n".join(lines(TRAIN[:3])))
    (root / "test_FD001.txt").write_text("\n".join([*lines(TEST), *lines(TRAIN[3:], first=3)]))
    with (
        pytest.warns(UserWarning, match=r"train_FD001.txt .* 39 rows of 4 engines; it has 27 rows of 3 engines"),
        pytest.warns(UserWarning, match=r"test_FD001.txt .* 13 rows of 2 engines; it has 25 rows of 3 engines"),
        pytest.raises(
            ValueError,
            match=r"test_FD001.txt should have 2 engines, like NASA's RUL_FD001.txt; got 3. "
            r"Fetch test_FD001.txt again",
        ),
    ):
        CMAPSS(root, window=4, cap=8, health_thresholds=(5, 2)).setup()


def test_a_shorter_rul_file_is_blamed_where_the_test_file_is_nasas(root: Path) -> None:
    (root / "RUL_FD001.txt").write_text("3 \n")
    with (
        pytest.warns(UserWarning, match=r"RUL_FD001.txt .* should be NASA's, 2 rows; it has 1 rows"),
        pytest.raises(ValueError, match=r"RUL_FD001.txt should have a line for each of the 2 test engines"),
    ):
        CMAPSS(root, window=4, cap=8, health_thresholds=(5, 2)).setup()


@ALL_SUBSETS
def test_nasas_own_files_are_known(subset: str) -> None:
    root = real_data("cmapss", f"train_{subset}.txt").parent
    for kind in ("train", "test", "RUL"):
        assert known(root / f"{kind}_{subset}.txt") == ORIGINALS[f"{kind}_{subset}.txt"]
    train, test = read_engines(root / f"train_{subset}.txt"), read_engines(root / f"test_{subset}.txt")
    counts = (len(train.settings), len(train.units), len(test.settings), len(test.units))
    assert counts == PUBLISHED[subset]
    assert test.lengths.min() == SHORTEST_TEST[subset]
    rul = read_rul(root / f"RUL_{subset}.txt")
    assert (len(rul), rul[:5].tolist()) == (len(test.units), FIRST_RUL[subset])


@pytest.mark.slow
@ALL_SUBSETS
def test_nasas_own_engines_are_in_one_split_each_and_standardized_by_training_engines(subset: str) -> None:
    root = real_data("cmapss", f"train_{subset}.txt").parent
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = CMAPSS(root, subset=subset, short_engines="pad")
        data.setup()
    train, val = (set(split.units.tolist()) for split in (data.train_data, data.val_data))
    assert not train & val
    assert train | val == set(range(1, SUBSETS[subset].train_engines + 1))
    assert len(data.test_data) == SUBSETS[subset].test_engines
    # Within each condition, the training engines' sensors, and nobody else's, have mean 0 and standard deviation 1.
    cycles = data.train_data.cycles.numpy().astype(np.float64)
    sensors, flown_in = cycles[:, :14], cycles[:, 14:]
    groups = [flown_in[:, k] == 1 for k in range(flown_in.shape[1])] or [np.ones(len(cycles), dtype=bool)]
    assert sum(group.sum() for group in groups) == len(cycles)
    for group in groups:
        moves = sensors[group].std(axis=0) > 0
        assert np.abs(sensors[group].mean(axis=0)).max() < 1e-3
        assert np.abs(sensors[group][:, moves].std(axis=0) - 1).max() < 1e-3
    held_out = data.val_data.cycles.numpy()[:, :14]
    assert np.abs(held_out.mean(axis=0)).max() > 1e-3


def test_sensors_that_never_change_are_named(root: Path) -> None:
    with pytest.warns(UserWarning, match=r"in the training engines of FD001 these never .*: 1, 10, 16. Leave them out"):
        CMAPSS(root, window=4, cap=8, health_thresholds=(5, 2), sensors=(1, 2, 10, 3, 16)).setup()
