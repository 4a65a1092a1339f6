"""C-MAPSS returns the right cycles with the right remaining life, and no engine is in two splits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from engine_files import lines, place, row, write_engines
from torch import Tensor, nn

from lightning_gradnorm import GradNorm, MultiTaskModule, Task
from lightning_gradnorm.experiments.problems.engines.cmapss import CMAPSS, SUBSETS, Standardization, Windows, health_of

# Our files are not NASA's, and in them more sensors are constant.
pytestmark = [
    pytest.mark.filterwarnings("ignore:CMAPSS. .*_FD00.[.]txt in .* should be NASA's"),
    pytest.mark.filterwarnings("ignore:CMAPSS. sensors should vary"),
]

TRAIN, TEST, RUL = (12, 9, 15, 8, 10, 11, 14, 9), (7, 10, 5, 6), (3, 30, 0, 11)
SMALL: dict[str, Any] = {"window": 4, "cap": 8, "health_thresholds": (5, 2), "val_fraction": 0.25, "batch_size": 8}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_engines(tmp_path / "files", TRAIN, TEST, RUL)


def engines(root: Path, **options: Any) -> CMAPSS:
    made = CMAPSS(root, **{**SMALL, **options})
    made.setup()
    return made


def everything(windows: Windows) -> tuple[Tensor, dict[str, Tensor]]:
    return windows.__getitems__(range(len(windows)))


def units(windows: Windows) -> set[int]:
    return set(windows.units.tolist())


def window_by_hand(
    unit: int, last: int, data: CMAPSS, fitted_on: Iterable[int], lengths: tuple[int, ...], conditions: int = 1
) -> np.ndarray:
    """The window of `unit` that ends with its cycle `last`, standardized by cycles of the engines `fitted_on`."""
    columns = [4 + number for number in data.sensors]

    def condition(one: int, cycle: int) -> int:
        return place(one, cycle) if conditions > 1 else 0

    window = []
    for cycle in range(last - data.window + 1, last + 1):
        here = condition(unit, max(cycle, 1))
        same = [
            row(other, k, conditions)
            for other in fitted_on
            for k in range(1, lengths[other - 1] + 1)
            if condition(other, k) == here
        ]
        reference = np.array(same)[:, columns]
        spread = np.where(reference.min(0) < reference.max(0), reference.std(0), 1.0)
        sensors = (np.array(row(unit, max(cycle, 1), conditions))[columns] - reference.mean(0)) / spread
        flown_in = [float(number == here) for number in range(conditions)] if conditions > 1 else []
        window.append([*sensors, *flown_in])
    return np.array(window)


@pytest.mark.parametrize(("subset", "conditions"), [("FD001", 1), ("FD002", 6), ("FD003", 1), ("FD004", 6)])
def test_windows_and_targets_match_those_computed_by_hand(subset: str, conditions: int, tmp_path: Path) -> None:
    lengths = (40, 31, 36, 44, 38, 37)
    data = engines(write_engines(tmp_path, lengths, TEST, RUL, subset, conditions), subset=subset)
    fitted_on = units(data.train_data)
    for split in (data.train_data, data.val_data):
        windows, targets = everything(split)
        expected = [(unit, last) for unit in sorted(units(split)) for last in range(4, lengths[unit - 1] + 1)]
        assert len(windows) == len(expected)
        for i, (unit, last) in list(enumerate(expected))[::7]:
            left = min(lengths[unit - 1] - last, 8)
            assert split.units[i] == unit
            assert targets["rul"][i].tolist() == [left]
            assert targets["health"][i] == (0 if left > 5 else 1 if left > 2 else 2)
            hand = window_by_hand(unit, last, data, fitted_on, lengths, conditions)
            assert np.abs(windows[i].numpy() - hand).max() < 1e-4
    windows, targets = everything(data.test_data)
    assert data.test_data.units.tolist() == [1, 2, 3, 4]
    assert targets["rul"].tolist() == [[3], [8], [0], [8]]
    assert targets["health"].tolist() == [1, 0, 2, 0]
    for unit, length in enumerate(TEST, start=1):
        hand = window_by_hand(unit, length, data, fitted_on, lengths, conditions)
        assert np.abs(windows[unit - 1].numpy() - hand).max() < 1e-4


def test_batches_have_the_shapes_and_types_promised(root: Path) -> None:
    data = CMAPSS(root, window=5, val_fraction=0.25, batch_size=8)
    data.setup()
    assert (data.input_dim, data.window, data.health_classes) == (14, 5, 3)
    for loader, size in ((data.train_dataloader(), 8), (data.val_dataloader(), 8), (data.test_dataloader(), 4)):
        windows, targets = next(iter(loader))
        assert (windows.dtype, *windows.shape) == (torch.float32, size, 5, 14)
        assert [(task, target.dtype, *target.shape) for task, target in targets.items()] == [
            ("rul", torch.float32, size, 1),
            ("health", torch.int64, size),
        ]
    one, its_targets = data.test_data[2]
    windows, targets = everything(data.test_data)
    assert torch.equal(one, windows[2])
    assert its_targets["rul"].tolist() == targets["rul"][2].tolist()


def test_the_training_windows_are_all_seen_once_an_epoch(root: Path) -> None:
    data = engines(root)
    seen = torch.cat([windows for windows, _ in data.train_dataloader()])
    expected = everything(data.train_data)[0]
    assert sorted(map(str, seen.tolist())) == sorted(map(str, expected.tolist()))
    assert not torch.equal(seen, expected)


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("fraction", [0.01, 0.15, 0.5, 0.8])
def test_no_engine_is_in_two_splits_and_none_is_lost(seed: int, fraction: float, root: Path) -> None:
    data = engines(root, seed=seed, val_fraction=fraction)
    train, val = units(data.train_data), units(data.val_data)
    assert not train & val
    assert train | val == set(range(1, 9))
    assert len(val) == max(1, round(8 * fraction))
    assert len(data.train_data) + len(data.val_data) == sum(length - 3 for length in TRAIN)
    assert len(data.test_data) == len(TEST)


def test_no_window_reaches_over_the_end_of_an_engine(root: Path) -> None:
    """Each cycle of each engine is another number: the windows hold four of one engine, in order."""
    data = engines(root, sensors=[2])
    for split in (data.train_data, data.val_data):
        raw = split.cycles[:, 0]
        own = {unit: set() for unit in units(split)}
        for i, unit in enumerate(split.units.tolist()):
            window = split[i][0][:, 0]
            rows = [int((raw == value).nonzero()) for value in window]
            assert rows == list(range(rows[0], rows[0] + 4))
            own[unit] |= set(rows)
        assert sum(map(len, own.values())) == len(set.union(*own.values())) == len(raw)


def test_another_seed_holds_out_others(root: Path) -> None:
    held = {tuple(sorted(units(engines(root, seed=seed).val_data))) for seed in range(8)}
    assert len(held) > 3
    assert units(engines(root, seed=3).val_data) == units(engines(root, seed=3).val_data)


def fitted(data: CMAPSS) -> Standardization:
    assert data.standardization is not None
    return data.standardization


def same(one: Standardization, other: Standardization) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("centers", "scale", "mean", "std"))


@pytest.mark.parametrize(("subset", "conditions"), [("FD001", 1), ("FD002", 6)])
@pytest.mark.parametrize("kind", ["test", "validation", "training"])
def test_statistics_change_with_training_engines_and_with_no_others(
    subset: str, conditions: int, kind: str, tmp_path: Path
) -> None:
    root = write_engines(tmp_path, (40, 31, 36, 44, 38, 37), TEST, RUL, subset, conditions)
    before = engines(root, subset=subset)
    file = root / f"{'test' if kind == 'test' else 'train'}_{subset}.txt"
    changed = {"test": {1, 2, 3, 4}, "validation": units(before.val_data), "training": {min(units(before.train_data))}}[
        kind
    ]
    text = []
    for line in file.read_text().splitlines():
        fields = line.split()
        if int(fields[0]) in changed:
            fields[2:] = [f"{float(one) * 1.5 + 7:.4f}" for one in fields[2:]]
        text.append(" ".join(fields))
    file.write_text("\n".join(text))
    after = engines(root, subset=subset)
    assert same(fitted(before), fitted(after)) == (kind != "training")
    assert torch.equal(everything(before.train_data)[0], everything(after.train_data)[0]) == (kind != "training")
    other = {"test": "test_data", "validation": "val_data", "training": "train_data"}[kind]
    assert not torch.equal(everything(getattr(before, other))[0], everything(getattr(after, other))[0])


def test_the_test_engines_targets_match_the_file_if_they_are_not_capped(root: Path) -> None:
    data = engines(root, cap_test=False)
    assert everything(data.test_data)[1]["rul"].tolist() == [[3], [30], [0], [11]]
    assert everything(data.train_data)[1]["rul"].max() == 8


def test_without_a_cap_every_cycle_counts(root: Path) -> None:
    data = engines(root, cap=float("inf"), val_fraction=0)
    assert everything(data.train_data)[1]["rul"].max() == max(TRAIN) - 4


def test_health_classes_are_as_many_as_thresholds_and_one(root: Path) -> None:
    data = engines(root, cap=10, health_thresholds=(9, 6, 3, 0))
    assert data.health_classes == 5
    targets = everything(data.train_data)[1]
    expected = [
        0 if left > 9 else 1 if left > 6 else 2 if left > 3 else 3 if left > 0 else 4 for left in targets["rul"]
    ]
    assert targets["health"].tolist() == expected
    assert set(expected) == {0, 1, 2, 3, 4}
    assert health_of(torch.tensor([[80.5, 80.0, 30.0]]), (80, 30)).tolist() == [[0, 1, 2]]


def test_short_engines_repeat_their_first_cycle_if_they_are_padded(root: Path) -> None:
    data = engines(root, window=9, short_engines="pad")
    fitted_on = units(data.train_data)
    assert len(data.train_data) + len(data.val_data) == sum(max(1, length - 8) for length in TRAIN)
    windows, targets = everything(data.test_data)
    assert targets["rul"].tolist() == [[3], [8], [0], [8]]
    for unit, length in enumerate(TEST, start=1):
        hand = window_by_hand(unit, length, data, fitted_on, TRAIN)
        assert np.abs(windows[unit - 1].numpy() - hand).max() < 1e-4
    assert torch.equal(windows[2, :5], windows[2, :1].expand(5, -1))
    assert not torch.equal(windows[2, 4], windows[2, 5])


def test_other_sensors_are_in_the_order_asked_for(root: Path) -> None:
    both = engines(root, sensors=[14, 2])
    assert both.input_dim == 2
    for position, sensor in enumerate((14, 2)):
        alone = engines(root, sensors=[sensor])
        assert torch.equal(everything(both.val_data)[0][..., position], everything(alone.val_data)[0][..., 0])


def test_nothing_is_validated_on_if_no_engine_is_held_out(root: Path, quiet_trainer: Callable[..., L.Trainer]) -> None:
    data, net = CMAPSS(root, **{**SMALL, "val_fraction": 0}), model()
    quiet_trainer().fit(net, data)
    assert units(data.train_data) == set(range(1, 9))
    assert len(data.val_data) == 0


def model() -> MultiTaskModule:
    return MultiTaskModule(
        encoder=nn.Sequential(nn.Flatten(), nn.Linear(4 * 14, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU()),
        tasks={"rul": Task(nn.Linear(8, 1), nn.MSELoss()), "health": Task(nn.Linear(8, 3), nn.CrossEntropyLoss())},
    )


def test_a_trainer_trains_validates_and_tests_on_it(root: Path, quiet_trainer: Callable[..., L.Trainer]) -> None:
    data, net, gradnorm = CMAPSS(root, **SMALL), model(), GradNorm()
    trainer = quiet_trainer(max_epochs=2, callbacks=[gradnorm])
    trainer.fit(net, data)
    assert trainer.global_step == 2 * -(-len(data.train_data) // 8)
    assert sum(gradnorm.weights.values()) == pytest.approx(2)
    trainer.validate(net, data, verbose=False)
    assert {"val/loss/rul", "val/loss/health"} <= trainer.callback_metrics.keys()
    (tested,) = trainer.test(net, data, verbose=False)
    windows, targets = everything(data.test_data)
    with torch.no_grad():
        expected = nn.functional.mse_loss(net.eval()(windows)["rul"], targets["rul"])
    assert tested["test/loss/rul"] == pytest.approx(float(expected), rel=1e-5)


def rewrite(kind: str, change: Callable[[list[str]], list[str]]) -> Callable[[Path], None]:
    def harm(root: Path) -> None:
        file = root / f"{kind}_FD001.txt"
        file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")

    return harm


def move(root: Path) -> None:
    inner = root / "CMaps"
    inner.mkdir()
    for file in root.glob("*.txt"):
        file.rename(inner / file.name)


WRONG: dict[str, tuple[Callable[[Path], object], type[Exception], str]] = {
    "no folder": (shutil.rmtree, FileNotFoundError, r"root should be the folder with train_FD001.txt; .*files is not a folder"),
    "no train file": (
        lambda root: (root / "train_FD001.txt").unlink(), FileNotFoundError,
        r"the training engines of FD001 should be in .*/train_FD001.txt; no such file. data=turbofan simulates",
    ),
    "another subset's train file": (
        lambda root: (root / "train_FD001.txt").rename(root / "train_FD003.txt"), FileNotFoundError,
        r"should be in .*/train_FD001.txt; no such file. Found train_FD003.txt.$",
    ),
    "no test file": (
        lambda root: (root / "test_FD001.txt").unlink(), FileNotFoundError,
        r"the test engines of FD001 should be in .*/test_FD001.txt; no such file",
    ),
    "no RUL file": (
        lambda root: (root / "RUL_FD001.txt").unlink(), FileNotFoundError,
        r"the test engines' remaining useful life should be in .*/RUL_FD001.txt; no such file",
    ),
    "a folder further down": (move, FileNotFoundError, r"Found one in .*/files/CMaps: root=.*/files/CMaps$"),
    "25 columns": (
        rewrite("test", lambda text: [*text[:9], text[9].rsplit(maxsplit=1)[0], *text[10:]]), ValueError,
        r"line 10 of .*/test_FD001.txt should have 26 columns, separated by blanks; got 25",
    ),
    "a gap in a unit's cycles": (
        rewrite("train", lambda text: [*text[:14], *text[15:]]), ValueError,
        r"unit 2 in line 15 of .*/train_FD001.txt should be at cycle 3, .*; got cycle 4",
    ),
    "units not in order": (
        rewrite("test", lambda text: sorted(text, key=lambda line: -int(line.split()[0]))), ValueError,
        r"of .*/test_FD001.txt should belong to unit 4 or a later one, .*; got unit 3 after unit 4",
    ),
    "not a number": (
        rewrite("RUL", lambda text: ["three", *text[1:], "?"]), ValueError,
        r"remaining useful life in line 5 of .*/RUL_FD001.txt should be a number; got '\?'",
    ),
    "a RUL file one line short": (
        rewrite("RUL", lambda text: text[1:]), ValueError,
        r"/RUL_FD001.txt should have a line for each of the 4 test engines in test_FD001.txt; got 3.$",
    ),
    "a RUL file as long as another subset's": (
        rewrite("RUL", lambda text: ["7"] * 259), ValueError,
        r"each of the 4 test engines in .*; got 259. That is the number of FD002: is it the file of another subset\?",
    ),
    "the RUL file of another subset of NASA's": (
        rewrite("RUL", lambda text: [str(left) for left in SUBSETS["FD003"].first_rul]), ValueError,
        r"/RUL_FD001.txt should belong to FD001; got the numbers of NASA's RUL_FD003.txt",
    ),
    "a training engine shorter than a window": (
        rewrite("train", lambda text: text + lines([3], first=9)), ValueError,
        r"unit 9 in .*/train_FD001.txt should have at least as many cycles as a window, 4; got 3, the shortest of 9 engines",
    ),
    "a test engine shorter than a window": (
        rewrite("test", lambda text: [line for line in text if line.split()[0] != "3" or int(line.split()[1]) < 3]), ValueError,
        r"unit 3 in .*/test_FD001.txt should have .* window, 4; got 2, .* Use window=2 or less, or short_engines=pad",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("harm", "kind", "message"), WRONG.values(), ids=WRONG)
def test_the_error_for_wrong_files_comes_before_training(
    harm: Callable[[Path], object],
    kind: type[Exception],
    message: str,
    root: Path,
    quiet_trainer: Callable[..., L.Trainer],
) -> None:
    harm(root)
    with pytest.raises(kind, match=message) as error:
        quiet_trainer().fit(model(), CMAPSS(root, **SMALL))
    assert str(error.value).startswith("CMAPSS: ")


def test_two_subsets_with_equally_many_engines_are_distinguished_by_nasas_numbers(tmp_path: Path) -> None:
    """FD001 and FD003 both have a hundred test engines."""
    numbers = {name: (*subset.first_rul, 3, 4) for name, subset in SUBSETS.items()}
    root = write_engines(tmp_path, TRAIN, [6] * 12, numbers["FD001"])
    engines(root)
    write_engines(root, TRAIN, [6] * 12, numbers["FD003"])
    with pytest.raises(
        ValueError, match=r"RUL_FD001.txt should belong to FD001; got the numbers of NASA's RUL_FD003.txt"
    ):
        engines(root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subset": "FD005"}, "subset should be one of 'FD001', .*; got 'FD005'. Did you mean"),
        ({"window": 0}, "window should be at least 1; got 0"),
        ({"cap": 0}, "cap should be a positive number of cycles; got 0"),
        ({"cap": float("nan")}, "cap should be a positive number of cycles; got nan"),
        (
            {"health_thresholds": (30, 80)},
            r"health_thresholds should be falling numbers .* below cap, 125, .*; got \[30, 80\]",
        ),
        (
            {"health_thresholds": (125, 50)},
            r"health_thresholds should be .* or a class would be empty; got \[125, 50\]",
        ),
        ({"health_thresholds": (50, -1)}, "health_thresholds should be falling"),
        ({"health_thresholds": ()}, "health_thresholds should be falling"),
        ({"sensors": [0, 2]}, r"sensors should be different numbers of 1 to 21; got \[0, 2\]"),
        ({"sensors": [2, 2]}, "sensors should be different numbers"),
        ({"sensors": []}, "sensors should be different numbers"),
        ({"conditions": 0}, "conditions should be at least 1; got 0"),
        ({"val_fraction": 1.0}, "val_fraction should be at least 0 and less than 1; got 1.0"),
        ({"short_engines": "padd"}, "short_engines should be one of 'error', 'pad'; got 'padd'. Did you mean 'pad'"),
    ],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"CMAPSS: {message}"):
        CMAPSS("anywhere", **options)


def test_at_least_one_engine_stays_to_train_on(root: Path) -> None:
    with pytest.raises(ValueError, match=r"val_fraction should leave training engines; 0.97 of 8 leaves none"):
        engines(root, val_fraction=0.97)
