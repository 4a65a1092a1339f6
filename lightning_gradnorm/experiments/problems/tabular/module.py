"""Your own table as a data module."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from typing_extensions import override

from lightning_gradnorm._messages import check, is_number
from lightning_gradnorm.experiments.loading.loader import ResumableLoader
from lightning_gradnorm.experiments.loading.splits import Batch, SplitsDataModule
from lightning_gradnorm.experiments.loading.tensors import TaskTensors
from lightning_gradnorm.experiments.problems.tabular.columns import (
    MISSING,
    Array,
    Columns,
    Integers,
    choose_columns,
    listed,
)
from lightning_gradnorm.experiments.problems.tabular.reading import FORMATS, read_table, wrong

_NAMES = {"train": "training", "val": "validation", "test": "test"}


_DECIDE = (
    "targets", "inputs", "ignore", "group", "standardize_targets", "missing", "val_fraction", "test_fraction", "format",
    "separator", "key", "seed",
)  # fmt: skip
"""The options that determine the data made from a file."""


class PartialTargets(TaskTensors):
    """Samples that may lack targets (NaN). A batch omits tasks for which it has no target."""

    on_several_ranks = False
    """True keeps all-NaN tasks, with loss 0, because ranks wait for each other's gradients and metrics of every task."""

    @override
    def _at(self, index: Tensor) -> Batch:
        inputs, targets = super()._at(index)
        if self.on_several_ranks:
            return inputs, targets
        return inputs, {task: target for task, target in targets.items() if not target.isnan().all()}


@dataclass(frozen=True)
class _Prepared:
    names: tuple[str, ...]
    splits: dict[str, TaskTensors]
    scales: dict[str, tuple[float, float]]
    rows: dict[str, Integers]
    notes: tuple[str, ...]


_LATEST: dict[str, _Prepared] = {}
"""The data made from the last file, by file and options."""


class TabularDataModule(SplitsDataModule[TaskTensors]):
    r"""One regression task for each of several columns of a table: CSV, ARFF, MATLAB or Parquet.

    A batch is ``(inputs, targets)``: inputs ``float32`` ``(batch, input_dim)``, standardized with the mean and standard
    deviation of the training rows; targets ``float32`` ``(batch, 1)`` by task, NaN where missing. A batch omits a task if no
    sample has its target. With several ranks, the task stays in the batch as NaN, with loss 0. A task has the name of its
    column, with ``.`` and ``/`` replaced by ``_``.

    No row, no two rows with the same inputs and, with ``group``, no group is in more than one split.

    Args:
        path: The file. `read_table` describes the formats.
        targets: Names of the target columns; numbers from 0 if the columns have no names.
        inputs: Names of the input columns; None for all other numeric columns that are not constant.
        ignore: Columns to ignore.
        group: A column whose values must stay in one split, such as the measured subject. It is not an input.
        standardize_targets: Return targets with mean 0 and standard deviation 1 over the training rows. The tasks of
            `tabular_tasks` report their metrics in the original units either way.
        missing: How to treat missing inputs: ``"error"``, ``"drop"`` the row, or fill in the training rows' ``"mean"``.
        val_fraction: Share of the rows for validation, as close as whole groups allow; 0 for none.
        test_fraction: Share of the rows for the test.
        format: ``"csv"``, ``"arff"``, ``"mat"`` or ``"parquet"``; None to use the file's suffix.
        separator: Separator of the fields of a CSV; None to detect it.
        key: Name of the matrix in a MATLAB file; None if there is only one.
        batch_size: Samples per batch and rank.
        num_workers: Worker processes per loader. The data are in memory, so 0 is the fastest.
        seed: Seed of the splits and of the order of the training batches.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range. When the table is read, at ``setup`` or when you ask for its sizes: a
            column or value cannot be used. The message gives its name and row, counted from 1 without the header.
        FileNotFoundError: When the table is read: the file does not exist.
        ModuleNotFoundError: When the table is read: the file's reader is not installed.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "table.csv"
        >>> _ = file.write_text("x,a,b\n" + "".join(f"{i},{i % 7},{3 * i}\n" for i in range(100)))
        >>> data = TabularDataModule(file, targets=["a", "b"], batch_size=10)
        >>> data.setup()
        >>> data.input_dim, data.tasks, {split: len(rows) for split, rows in data.rows.items()}
        (1, ('a', 'b'), {'train': 70, 'val': 15, 'test': 15})
        >>> inputs, targets = next(iter(data.train_dataloader()))
        >>> inputs.shape, targets["a"].shape
        (torch.Size([10, 1]), torch.Size([10, 1]))
    """

    def __init__(
        self,
        path: str | Path,
        targets: Sequence[str | int],
        inputs: Sequence[str | int] | None = None,
        ignore: Sequence[str | int] = (),
        group: str | int | None = None,
        standardize_targets: bool = False,
        missing: str = "error",
        val_fraction: float = 0.15,
        test_fraction: float = 0.15,
        format: str | None = None,
        separator: str | None = None,
        key: str | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        owner = type(self).__name__
        self.targets = self._columns("targets", targets)
        self.inputs = None if inputs is None else self._columns("inputs", inputs)
        self.ignore = self._columns("ignore", ignore, least=0)
        self.group = None if group is None else str(group)
        self._check_choice("missing", missing, MISSING)
        if format is not None:
            self._check_choice("format", format, FORMATS)
        check(
            owner,
            is_number(val_fraction) and 0 <= val_fraction < 1,
            "val_fraction",
            "at least 0, below 1",
            val_fraction,
        )
        check(
            owner,
            is_number(test_fraction) and 0 < test_fraction < 1,
            "test_fraction",
            "above 0, below 1",
            test_fraction,
        )
        together = "less than 1 together with test_fraction, or nothing is left to train on"
        check(owner, val_fraction + test_fraction < 1, "val_fraction", together, val_fraction)
        self.path = Path(path)
        self.standardize_targets = standardize_targets
        self.missing = missing
        self.val_fraction = val_fraction
        self.test_fraction = test_fraction
        self.format = format
        self.separator = separator
        self.key = key
        self.tasks = _task_names(self.targets)
        """The task name of each target."""
        if val_fraction == 0:
            self._validate_on_nothing()

    @property
    def input_dim(self) -> int:
        """Number of inputs."""
        return len(self._prepared.names)

    @property
    def input_names(self) -> tuple[str, ...]:
        """The input columns, in order."""
        return self._prepared.names

    @property
    def scales(self) -> dict[str, tuple[float, float]]:
        """For each task, the mean of its returned targets over the training rows, and their unit.

        The unit is 1, or the original standard deviation if targets are standardized.
        """
        return self._prepared.scales

    @property
    def rows(self) -> dict[str, Integers]:
        """For each split, the positions of its rows in the file, from 0."""
        return self._prepared.rows

    def make_splits(self) -> dict[str, TaskTensors]:
        """Read the table, draw the splits and standardize by the training rows."""
        prepared = self._prepared
        rows = ", ".join(f"{len(rows):,} {_NAMES[split]}" for split, rows in prepared.rows.items())
        columns = (
            f"{self.input_dim} input{'s' * (self.input_dim > 1)}, {len(self.tasks)} target{'s' * (len(self.tasks) > 1)}"
        )
        rank_zero_info(f"{type(self).__name__}: {self.path.name}: {rows} rows; {columns}.")
        for note in prepared.notes:
            rank_zero_info(f"{type(self).__name__}: {note}")
        return dict(prepared.splits)

    @override
    def _loader(self, data: TaskTensors, **options: Any) -> ResumableLoader:
        own = copy.copy(data)  # another data module of the same file may share the original
        loader = super()._loader(own, **options)
        own.on_several_ranks = loader.sampler.num_replicas > 1  # type: ignore[attr-defined]
        return loader

    @cached_property
    def _prepared(self) -> _Prepared:
        # A command creates several identical data modules to get a network's sizes, and one to get the data.
        stamp = (self.path.stat().st_mtime_ns, self.path.stat().st_size) if self.path.is_file() else None
        made_from = repr((self.path.absolute(), stamp, {name: getattr(self, name) for name in _DECIDE}))
        if made_from not in _LATEST:
            prepared = self._prepare()
            _LATEST.clear()
            _LATEST[made_from] = prepared
        return _LATEST[made_from]

    def _prepare(self) -> _Prepared:
        table = read_table(self.path, self.format, self.separator, self.key)
        file = self.path.name
        columns = choose_columns(table, file, self.targets, self.inputs, self.ignore, self.group, self.missing)
        places = self._split_up(columns)
        x, names, notes = self._standardized(columns, places["train"])
        y = columns.targets
        scales = {}
        for number, (task, target) in enumerate(zip(self.tasks, self.targets, strict=True)):
            for split, chosen in places.items():
                self._check_target(target, y[chosen, number], split)
            to_learn = y[places["train"], number]
            mean, std = float(np.nanmean(to_learn)), float(np.nanstd(to_learn))
            scales[task] = (0.0, std) if self.standardize_targets else (mean, 1.0)
            if self.standardize_targets:
                y[:, number] = (y[:, number] - mean) / std
        splits: dict[str, TaskTensors] = {}
        for split, chosen in places.items():
            own = {task: torch.from_numpy(y[chosen, number, None]).float() for number, task in enumerate(self.tasks)}
            splits[split] = PartialTargets(torch.from_numpy(x[chosen]).float(), own)
        rows = {split: columns.rows[chosen] for split, chosen in places.items()}
        return _Prepared(names, splits, scales, rows, notes=(*columns.notes, *notes))

    def _split_up(self, columns: Columns) -> dict[str, Integers]:
        """Draw the units of each split. Return the positions of their rows, in file order."""
        drawn = self._stream("splits").permutation(np.unique(columns.units))
        left, sizes = drawn, np.bincount(columns.units)
        chosen = {}
        for split, fraction in (("test", self.test_fraction), ("val", self.val_fraction)):
            # The number of units closest to the share, but at least one.
            off = np.abs(sizes[left].cumsum() - fraction * len(columns.units))
            count = 0 if fraction == 0 or len(left) == 0 else int(off.argmin()) + 1
            chosen[split], left = left[:count], left[count:]
        if len(left) == 0 or (self.val_fraction > 0 and len(chosen["val"]) == 0):
            kind = f"different values of group '{self.group}'" if self.group else "rows with different inputs"
            wrong(
                f"val_fraction and test_fraction of {self.path.name}",
                "leave rows for each of training, validation and test",
                f"{self.val_fraction} and {self.test_fraction} of {len(drawn)} {kind}",
                "Lower them, or use a larger table.",
            )
        chosen = {"train": left, "val": chosen["val"], "test": chosen["test"]}
        return {split: np.flatnonzero(np.isin(columns.units, own)) for split, own in chosen.items()}

    def _standardized(self, columns: Columns, train: Integers) -> tuple[Array, tuple[str, ...], list[str]]:
        """Return the inputs without constants, with mean 0 and standard deviation 1 over the training rows, 0 if missing."""
        own = columns.inputs[train]
        there = ~np.isnan(own)
        low, high = np.where(there, own, np.inf).min(axis=0), np.where(there, own, -np.inf).max(axis=0)
        varies = low < high
        constant = [name for name, one in zip(columns.names, varies, strict=True) if not one]
        notes = []
        if constant:
            if self.inputs is not None or not varies.any():
                wrong(
                    f"the inputs in {self.path.name}",
                    "vary over the training rows",
                    f"constant or empty {listed(constant)}",
                    "Leave them out.",
                )
            notes.append(f"columns left out because they are constant in the training rows: {listed(constant)}.")
        mean, std = np.nanmean(own[:, varies], axis=0), np.nanstd(own[:, varies], axis=0)
        x = np.nan_to_num((columns.inputs[:, varies] - mean) / std)
        return x, tuple(name for name, one in zip(columns.names, varies, strict=True) if one), notes

    def _check_target(self, target: str, values: Array, split: str) -> None:
        there = values[~np.isnan(values)]
        if len(values) == 0:  # without validation
            return
        where = f"the {len(values)} {_NAMES[split]} rows of {self.path.name}"
        if len(there) == 0:
            fix = "Use another seed or larger fractions, or leave the target out."
            wrong(f"target '{target}'", f"have a value in {where}", "none", fix)
        if split == "train" and np.ptp(there) == 0:
            fix = "Leave the target out, or use another seed."
            wrong(f"target '{target}'", f"vary over {where}", f"{there[0]:g} in all of them", fix)

    def _columns(self, parameter: str, names: Sequence[str | int], least: int = 1) -> tuple[str, ...]:
        fits = not isinstance(names, str) and all(isinstance(name, str | int) for name in names)
        if not fits or len(names) < least:
            raise TypeError(
                f"{type(self).__name__}: {parameter} should be a list of column names, such as ['height', 'weight'], or "
                f"numbers if the columns have no names; got {names!r}."
            )
        return tuple(str(name) for name in names)


def _task_names(columns: Sequence[str]) -> tuple[str, ...]:
    """Return names that torch accepts for modules and loggers accept for metrics."""
    names = [column.replace(".", "_").replace("/", "_") for column in columns]
    names = [f"{name}_" if hasattr(nn.ModuleDict, name) or not name else name for name in names]
    for name, column in zip(names, columns, strict=True):
        if names.count(name) > 1:
            wrong(f"target '{column}'", "have a unique task name", f"'{name}' twice", "Rename it.")
    return tuple(names)
