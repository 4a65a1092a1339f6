"""C-MAPSS as a data module."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lightning_gradnorm._messages import check, is_integer, is_number
from lightning_gradnorm.experiments.loading.splits import SplitsDataModule
from lightning_gradnorm.experiments.problems.engines.cmapss.columns import ALL_SENSORS, SENSORS, SUBSETS
from lightning_gradnorm.experiments.problems.engines.cmapss.errors import wrong
from lightning_gradnorm.experiments.problems.engines.cmapss.files import Array, Engines, read_engines, read_rul
from lightning_gradnorm.experiments.problems.engines.cmapss.normalization import Standardization
from lightning_gradnorm.experiments.problems.engines.cmapss.originals import (
    ORIGINALS,
    Original,
    difference,
    fingerprint,
)
from lightning_gradnorm.experiments.problems.engines.cmapss.windows import Windows, health_of

SHORT_ENGINES = ("error", "pad")


class CMAPSS(SplitsDataModule[Windows]):
    """Remaining useful life and health of turbofan engines: NASA's C-MAPSS, in its original files.

    ``root`` contains ``train_FD001.txt``, ``test_FD001.txt`` and ``RUL_FD001.txt``, or the files of another subset. Training
    engines run to failure. Test engines are cut short, and the RUL file gives the cycles that each had left.

    A batch is ``(windows, targets)``: windows ``float32`` ``(batch, window, features)``, the oldest cycle first. The features
    are the sensors, standardized within their operating condition. With several conditions, there is also one column per
    condition that is 1 in its cycles and 0 in others. The three settings are not inputs, because they are noise within a
    condition. Targets:

    - ``rul``: cycles left after the window's last one, at most ``cap``, ``float32``, ``(batch, 1)``;
    - ``health``: 0 healthy, 1 degrading, 2 critical, by ``health_thresholds`` of that number, ``int64``, ``(batch,)``.

    Training: every window of the training engines. Validation: every window of engines held out of the training file.
    We split by engine, not by window. Test: the last window of each test engine, so metrics are per engine.
    Conditions, means and standard deviations come from the training engines alone.

    If a file's numbers differ from NASA's file of that name, it is still used, and a warning describes the difference.

    Source: Saxena et al., Damage Propagation Modeling for Aircraft Engine Run-to-Failure Simulation, PHM 2008; the
    piecewise linear target after Heimes, PHM 2008.

    Args:
        root: The folder.
        subset: ``"FD001"`` to ``"FD004"``.
        window: Cycles in a window.
        cap: Upper limit of the remaining useful life, in cycles. Before that, an engine shows no wear.
        cap_test: Cap the targets of the test engines, too, like most published results; False for the numbers in the RUL file.
        health_thresholds: Decreasing, in cycles: the longest remaining lives that count as degrading and as critical. There
            is always one more class than thresholds.
        sensors: Numbers of the sensors, 1 to 21, in the order of the features; by default the 14 commonly used ones. A
            warning lists sensors that never change in the training engines.
        conditions: Number of operating conditions to find by k-means on the settings (several need scikit-learn); None for
            that of the subset, 6 in FD002 and FD004, 1 in FD001 and FD003.
        val_fraction: Share of the engines in the training file to hold out, at least one engine; 0 for none.
        short_engines: How to treat engines with fewer cycles than ``window``: ``"error"``, or ``"pad"`` to repeat the
            first cycle in front. NASA's FD002 and FD004 have test engines with 21 and 19 cycles.
        batch_size: Windows per batch and rank.
        num_workers: Worker processes per loader. The data are in memory, so 0 is the fastest.
        seed: Seed of the validation engines and of the order of the training batches.

    Raises:
        TypeError: An argument should be an integer but is not.
        ValueError: An argument is out of range, or at ``setup``: a file is invalid. The message names the file and the
            line or unit.
        FileNotFoundError: At ``setup``: a file is missing.
        ModuleNotFoundError: At ``setup``, with several conditions, if scikit-learn is not installed.
    """

    def __init__(
        self,
        root: str | Path,
        subset: str = "FD001",
        window: int = 30,
        cap: float = 125,
        cap_test: bool = True,
        health_thresholds: Sequence[float] = (80, 30),
        sensors: Sequence[int] = SENSORS,
        conditions: int | None = None,
        val_fraction: float = 0.15,
        short_engines: str = "error",
        batch_size: int = 256,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        owner = type(self).__name__
        self._check_choice("subset", subset, SUBSETS)
        self._check_integer("window", window, at_least=1)
        check(owner, is_number(cap) and cap > 0, "cap", "a positive number of cycles", cap)
        thresholds = self._numbers("health_thresholds", health_thresholds)
        falling = all(a > b for a, b in zip((cap, *thresholds), (*thresholds, -1), strict=True))
        expected = f"falling numbers of cycles from below cap, {cap:g}, to 0 or more, or a class would be empty"
        check(owner, len(thresholds) > 0 and falling, "health_thresholds", expected, list(health_thresholds))
        sensors = tuple(sensors)
        known = all(is_integer(sensor) and 1 <= sensor <= ALL_SENSORS for sensor in sensors)
        different = len(set(sensors)) == len(sensors) > 0
        check(owner, known and different, "sensors", f"different numbers of 1 to {ALL_SENSORS}", list(sensors))
        if conditions is not None:
            self._check_integer("conditions", conditions, at_least=1)
        fraction = is_number(val_fraction) and 0 <= val_fraction < 1
        check(owner, fraction, "val_fraction", "at least 0 and less than 1", val_fraction)
        self._check_choice("short_engines", short_engines, SHORT_ENGINES)
        self.root = Path(root)
        self.subset = subset
        self.window = window
        self.cap = cap
        self.cap_test = cap_test
        self.health_thresholds = thresholds
        self.sensors = sensors
        self.conditions = SUBSETS[subset].conditions if conditions is None else conditions
        self.val_fraction = val_fraction
        self.short_engines = short_engines
        self.standardization: Standardization | None = None
        """The standardization fitted on the training engines, after ``setup``."""
        if val_fraction == 0:
            self._validate_on_nothing()

    @property
    def input_dim(self) -> int:
        """Number of features of a cycle: the sensors, and the operating conditions if there are several."""
        return len(self.sensors) + (self.conditions if self.conditions > 1 else 0)

    @property
    def window_dim(self) -> int:
        """Number of values in a window: ``window`` times `input_dim`."""
        return self.window * self.input_dim

    @property
    def health_classes(self) -> int:
        """Number of health classes."""
        return len(self.health_thresholds) + 1

    def make_splits(self) -> dict[str, Windows]:
        """Read the files, hold out the validation engines, and standardize with the others."""
        train_file, test_file, rul_file = (self.root / f"{kind}_{self.subset}.txt" for kind in ("train", "test", "RUL"))
        recorded = read_engines(train_file, f"the training engines of {self.subset}")
        test = read_engines(test_file, f"the test engines of {self.subset}")
        rul = read_rul(rul_file)
        differences = self._compare_to_originals(recorded, test, rul)
        self._check_rul(rul, rul_file, len(test.units), test_file, differences)
        self._check_lengths(recorded, train_file)
        self._check_lengths(test, test_file)
        held = self._held_out(len(recorded.units))
        train, val = recorded.chosen(~held), recorded.chosen(held)
        self.standardization = Standardization.fit(train.settings, self._chosen_sensors(train), self.conditions)
        self._warn_of_constants(train)
        splits = {
            "train": self._windows(train, np.zeros(len(train.units)), self.cap),
            "val": self._windows(val, np.zeros(len(val.units)), self.cap),
            "test": self._windows(test, rul, self.cap if self.cap_test else float("inf"), only_last=True),
        }
        rank_zero_info(
            f"{type(self).__name__}: {self.subset}, {self.conditions} operating condition{'s' * (self.conditions > 1)}: "
            f"{len(splits['train']):,} windows of {len(train.units)} engines to train on, {len(splits['val']):,} of "
            f"{len(val.units)} to validate on, {len(splits['test']):,} test engines."
        )
        return splits

    def _chosen_sensors(self, engines: Engines) -> Array:
        return engines.sensors[:, [sensor - 1 for sensor in self.sensors]]

    def _warn_of_constants(self, train: Engines) -> None:
        assert self.standardization is not None
        constant = [sensor for sensor, moves in zip(self.sensors, self.standardization.moves, strict=True) if not moves]
        if constant:
            rank_zero_warn(
                f"{type(self).__name__}: sensors should vary; in the training engines of "
                f"{self.subset} these never change within an operating condition: {', '.join(map(str, constant))}. Leave "
                "them out: sensors=[…]."
            )

    def _held_out(self, engines: int) -> npt.NDArray[np.bool_]:
        """Draw the validation engines: a mask of shape ``(engines,)``."""
        count = 0 if self.val_fraction == 0 else max(1, round(self.val_fraction * engines))
        if count >= engines:
            raise ValueError(
                f"{type(self).__name__}: val_fraction should leave training engines; {self.val_fraction} of {engines} "
                "leaves none. Lower it, or use 0 for no validation."
            )
        held = np.zeros(engines, dtype=bool)
        held[self._stream("validation engines").permutation(engines)[:count]] = True
        return held

    def _windows(self, engines: Engines, left: Array, cap: float, only_last: bool = False) -> Windows:
        """Return windows of engines that have ``left`` more cycles, shape ``(engines,)``, after their records."""
        assert self.standardization is not None
        cycles = self.standardization(engines.settings, self._chosen_sensors(engines))
        if self.conditions > 1:
            flown_in = self.standardization.conditions_of(engines.settings)
            cycles = np.hstack([cycles, np.eye(self.conditions, dtype=np.float32)[flown_in]])
        starts = engines.of_rows(engines.starts)
        ends = engines.of_rows(engines.starts + engines.lengths - 1)
        rows = np.arange(len(starts))
        # An engine shorter than a window has one padded window.
        is_window = (rows == ends) | ((rows - starts >= self.window - 1) & (not only_last))
        rul = torch.from_numpy((engines.of_rows(left) + ends - rows)[is_window]).float().clamp_(max=cap)
        return Windows(
            torch.from_numpy(cycles),
            first=torch.from_numpy(starts[is_window]),
            last=torch.from_numpy(rows[is_window]),
            units=torch.from_numpy(engines.of_rows(engines.units)[is_window]),
            window=self.window,
            targets={"rul": rul[:, None], "health": health_of(rul, self.health_thresholds)},
        )

    def _check_lengths(self, engines: Engines, file: Path) -> None:
        shortest = int(np.argmin(engines.lengths))
        length = int(engines.lengths[shortest])
        if length < self.window and self.short_engines == "error":
            wrong(
                f"unit {engines.units[shortest]} in {file}",
                f"have at least as many cycles as a window, {self.window}",
                f"{length}, the shortest of {len(engines.units)} engines",
                f"Use window={length} or less, or short_engines=pad, which repeats the first cycle in front.",
            )

    def _compare_to_originals(self, train: Engines, test: Engines, rul: Array) -> dict[str, str]:
        """Warn about files that are not NASA's. Return how each of them differs, by name."""
        found = {f"RUL_{self.subset}.txt": Original(len(rul), len(rul), fingerprint(rul))}
        for kind, engines in (("train", train), ("test", test)):
            numbers = fingerprint(engines.of_rows(engines.units), engines.settings, engines.sensors)
            found[f"{kind}_{self.subset}.txt"] = Original(len(engines.settings), len(engines.units), numbers)
        told = {name: difference(name, original) for name, original in found.items()}
        differences = {name: what for name, what in told.items() if what is not None}
        for name, what in differences.items():
            rank_zero_warn(
                f"{type(self).__name__}: {name} in {self.root} should be NASA's, {ORIGINALS[name]}; {what}. Results on it are "
                "not comparable with published ones. Fetch the file again, unless it is your own."
            )
        return differences

    def _check_rul(self, rul: Array, file: Path, engines: int, test_file: Path, differences: dict[str, str]) -> None:
        """Refuse a RUL file of another subset, or with a different number of lines than test engines."""
        like = [name for name, subset in SUBSETS.items() if tuple(rul[: len(subset.first_rul)]) == subset.first_rul]
        if like and self.subset not in like:
            wrong(f"{file}", f"belong to {self.subset}", f"the numbers of NASA's RUL_{like[0]}.txt", "Fetch it again.")
        if len(rul) == engines:
            return
        if file.name not in differences and test_file.name in differences:
            expected = f"have {len(rul)} engines, like NASA's {file.name}"
            wrong(f"{test_file}", expected, f"{engines}", f"Fetch {test_file.name} again.")
        as_many = [name for name, subset in SUBSETS.items() if subset.test_engines == len(rul)]
        hint = f"That is the number of {' or '.join(as_many)}: is it the file of another subset?" if as_many else ""
        wrong(f"{file}", f"have a line for each of the {engines} test engines in {test_file.name}", f"{len(rul)}", hint)
