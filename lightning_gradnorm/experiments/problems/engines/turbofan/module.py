"""Simulated engines as a data module: C-MAPSS's tasks without a download."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_info

from lightning_gradnorm.experiments.problems.engines.cmapss.columns import SENSORS, SUBSETS
from lightning_gradnorm.experiments.problems.engines.cmapss.files import Array, Engines
from lightning_gradnorm.experiments.problems.engines.cmapss.module import CMAPSS
from lightning_gradnorm.experiments.problems.engines.cmapss.windows import Windows
from lightning_gradnorm.experiments.problems.engines.turbofan.files import write_turbofan

VERSION = 2
"""Increases whenever the simulator's output changes, so files of earlier versions are not read."""


class TurbofanDataModule(CMAPSS):
    """Simulated turbofan engines with C-MAPSS's files, sensors and tasks, and nothing to download.

    The engines show little wear for some time, then wear faster and faster, with one of two fault modes in FD003 and FD004.
    They fail after 128 to 362 cycles, or up to 543 if the fan wears. They fly in one operating condition, or, in FD002 and
    FD004, in six that change from cycle to cycle. The sensors respond to the wear with noise, differently for each engine.
    One process writes the files once, and they are read like NASA's: see `CMAPSS` for the batches and the other arguments.

    This is not a model of a real engine. Results on it have the same order of magnitude as published ones but are not
    comparable with them. Each sensor resembles the one in NASA's FD001 and FD003 within the tolerance stated in
    ``scripts/compare_turbofan.py``. Root mean square errors on FD001 in cycles, NASA's files in brackets:
    ``gradnorm-train experiment=cmapss_small``, seeds 0 to 2 (0), 13.5 to 15.5 (14.2) on the validation engines in the best
    epoch and 17.6 to 18.8 (14.9) on the test engines; on these, ridge regression on the windows 15.5 to 17.4 (14.6), and
    the best constant 34 to 39 (40).

    Args:
        subset: ``"FD001"`` to ``"FD004"``.
        engines: Number of training engines, including those held out for validation; None for the number in NASA's subset.
        test_engines: Number of test engines; None for the number in NASA's subset.
        folder: Parent folder of the files. Each combination of subset, numbers of engines and seed has its own subfolder.
            None for ``lightning_gradnorm/turbofan`` in your cache (``$XDG_CACHE_HOME`` or ``~/.cache``).
        window: See `CMAPSS`.
        cap: See `CMAPSS`.
        cap_test: See `CMAPSS`.
        health_thresholds: See `CMAPSS`.
        sensors: See `CMAPSS`.
        conditions: See `CMAPSS`.
        val_fraction: See `CMAPSS`.
        short_engines: See `CMAPSS`. Simulated test engines have at least 31 cycles.
        batch_size: Windows per batch and rank.
        num_workers: Worker processes per loader. The data are in memory, so 0 is the fastest.
        seed: Seed of the engines, the choice of validation engines, and the order of the training batches.

    Raises:
        TypeError: An argument should be an integer but is not.
        PermissionError: At ``setup``: ``folder`` is not writable.
        FileExistsError: At ``setup``: the files' subfolder exists and contains other files.
        ValueError: An argument is out of range, or at ``setup``: a window is longer than the shortest engine's record.
        ModuleNotFoundError: At ``setup``, with several conditions, if scikit-learn is not installed.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     data = TurbofanDataModule(engines=4, test_engines=3, folder=folder, batch_size=8)
        ...     data.setup()
        >>> windows, targets = next(iter(data.train_dataloader()))
        >>> windows.shape, targets["rul"].shape, targets["health"].shape
        (torch.Size([8, 30, 14]), torch.Size([8, 1]), torch.Size([8]))
    """

    stands_in_for = ("cmapss", "Simulated engines stand in for C-MAPSS. With its files: data=cmapss data.root=FOLDER")
    """Prefix of the experiments whose data it replaces, and the message that such a run prints."""

    def __init__(
        self,
        subset: str = "FD001",
        engines: int | None = None,
        test_engines: int | None = None,
        folder: str | Path | None = None,
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
        super().__init__(
            root=_cache() if folder is None else folder,
            subset=subset,
            window=window,
            cap=cap,
            cap_test=cap_test,
            health_thresholds=health_thresholds,
            sensors=sensors,
            conditions=conditions,
            val_fraction=val_fraction,
            short_engines=short_engines,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        counts = {"engines": engines, "test_engines": test_engines}
        for parameter, count in counts.items():
            if count is not None:
                self._check_integer(parameter, count, at_least=1)
        self.engines = SUBSETS[subset].train_engines if engines is None else engines
        self.test_engines = SUBSETS[subset].test_engines if test_engines is None else test_engines
        self.root /= f"{subset}-{self.engines}-{self.test_engines}-seed{seed}-v{VERSION}"

    def prepare_data(self) -> None:
        """Write the files unless they exist."""
        if not self._is_written():
            rank_zero_info(
                f"TurbofanDataModule: these engines are simulated and stand in for NASA's {self.subset}; "
                f"writing {self.engines} training and {self.test_engines} test engines to {self.root}, once."
            )
            try:
                write_turbofan(self.root, self.subset, self.engines, self.test_engines, self.seed)
            except PermissionError as error:
                raise PermissionError(
                    f"TurbofanDataModule: folder should be writable; {error.filename} is not. "
                    "Choose another: folder=..."
                ) from error
            except FileExistsError:
                if not self._is_written():  # by another process in the meantime
                    raise

    def _compare_to_originals(self, train: Engines, test: Engines, rul: Array) -> dict[str, str]:
        return {}  # simulated engines have no originals

    def _is_written(self) -> bool:
        return (self.root / f"RUL_{self.subset}.txt").is_file()

    def make_splits(self) -> dict[str, Windows]:
        """Write the files unless they exist, and read them."""
        self.prepare_data()
        return super().make_splits()


def _cache() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "lightning_gradnorm" / "turbofan"
