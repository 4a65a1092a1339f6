"""Selects a table's columns: targets, inputs and groups. Errors give the name and row of unusable values."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lightning_gradnorm._messages import did_you_mean
from lightning_gradnorm.experiments.problems.tabular.reading import wrong

Array = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

MISSING = ("error", "drop", "mean")


@dataclass(frozen=True)
class Columns:
    """Numbers from the usable rows of a table.

    Attributes:
        names: Names of the inputs.
        inputs: Shape ``(rows, inputs)``, NaN where missing.
        targets: Shape ``(rows, targets)``, NaN where missing.
        units: Shape ``(rows,)``: rows with the same number belong in the same split.
        rows: Shape ``(rows,)``: position of each row in the file, from 0.
        notes: Sentences about what was left out.
    """

    names: tuple[str, ...]
    inputs: Array
    targets: Array
    units: Integers
    rows: Integers
    notes: tuple[str, ...]


def choose_columns(
    table: Any,
    file: str,
    targets: Sequence[str],
    inputs: Sequence[str] | None,
    ignore: Collection[str],
    group: str | None,
    missing: str,
) -> Columns:
    """Return the numbers of the chosen columns.

    Raises:
        ValueError: A column does not exist, contains text or infinite numbers, or has two roles; or a value is missing.
    """
    given = [("targets", targets), ("inputs", inputs or ()), ("ignore", ignore), ("group", [group] if group else [])]
    roles: dict[str, str] = {}
    for role, names in given:
        for name in names:
            if name not in table.columns:
                near = did_you_mean(name, table.columns)
                raise ValueError(f"TabularDataModule: {role} names column '{name}', which is not in {file}; {near}")
            if name in roles:
                again = "twice" if roles[name] == role else f"in {roles[name]} and in {role}"
                wrong(f"column '{name}'", "have one role", f"it {again}", "Leave one of them out.")
            roles[name] = role
    notes: list[str] = []
    y = np.column_stack([_target(table[name], f"target '{name}' of {file}") for name in targets])
    chosen = _candidates(table, file, roles, notes) if inputs is None else list(inputs)
    numbers: dict[str, Array] = {}
    texts = []
    for name in chosen:
        if inputs is None and _is_text(table[name]):
            texts.append(name)
        else:
            hint = "" if inputs is not None else f"Correct it, or leave the column out: ignore=[{name}]."
            numbers[name] = _numbers(table[name], f"column '{name}' of {file}", hint)
    if texts:
        notes.append(f"columns left out because they are not numeric: {listed(texts)}.")
    if not numbers:
        wrong(f"{file}", "have numeric columns besides the targets", listed(texts) or "no other column")
    x = np.column_stack(list(numbers.values()))
    kept = _with_inputs(x, list(numbers), file, missing, notes)
    without = kept & np.isnan(y).all(axis=1)
    if without.any():
        notes.append(f"dropped {without.sum():,} rows without any target.")
        kept &= ~without
    if not kept.any():
        wrong(file, "have rows with inputs and targets", "none")
    x, y = x[kept], y[kept]
    units = _same_rows(x) if group is None else _groups(table[group], group, file)[kept]
    repeated = int((np.bincount(units)[units] > 1).sum()) if group is None else 0
    if repeated:
        notes.append(f"{repeated:,} rows have the same inputs as another; such rows stay in one split.")
    return Columns(tuple(numbers), x, y, units, np.flatnonzero(kept), tuple(notes))


def listed(names: Sequence[str]) -> str:
    """Return a list of the names, at most the first ten."""
    more = f" and {len(names) - 10} more" if len(names) > 10 else ""
    return ", ".join(f"'{name}'" for name in names[:10]) + more


def _candidates(table: Any, file: str, roles: Collection[str], notes: list[str]) -> list[str]:
    others = [name for name in table.columns if name not in roles]
    nameless = [name for name in others if not name.strip() or name.startswith("Unnamed: ")]
    if nameless:  # pandas writes row numbers this way
        notes.append(f"columns left out because they have no name: {len(nameless)}.")
    return [name for name in others if name not in nameless]


def _converted(column: Any) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Return the numbers, NaN elsewhere, and a mask of values that are not numbers."""
    import pandas as pd

    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(object)
    if column.dtype.kind in "mM":  # to_numeric would turn dates into nanoseconds
        numbers = np.full(len(column), np.nan)
    else:
        numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan)
    return numbers, column.notna().to_numpy() & np.isnan(numbers)


def _is_text(column: Any) -> bool:
    """Return True if the column is not numeric, apart from a few mistakes."""
    numbers, bad = _converted(column)
    return bool(bad.sum() > np.isfinite(numbers).sum())


def _target(column: Any, what: str) -> Array:
    if not _is_text(column):
        return _numbers(column, what)
    return _numbers(column, what, "Each target is a regression: write its classes as numbers, such as 0 and 1.")


def _numbers(column: Any, what: str, hint: str = "Correct it, or leave the column out.") -> Array:
    numbers, bad = _converted(column)
    if bad.any() or np.isinf(numbers).any():
        bad |= np.isinf(numbers)
        first = int(np.argmax(bad))
        others = f", and more in {bad.sum() - 1} other rows" if bad.sum() > 1 else ""
        wrong(what, "contain numbers", f"{str(column.iloc[first])!r} in row {first + 1}{others}", hint)
    return numbers


def _with_inputs(x: Array, names: Sequence[str], file: str, missing: str, notes: list[str]) -> npt.NDArray[np.bool_]:
    """Return a mask of the rows whose inputs can be used, shape ``(rows,)``."""
    lacks = np.isnan(x)
    counts = {name: int(count) for name, count in zip(names, lacks.sum(axis=0), strict=True) if count}
    if not counts:
        return np.ones(len(x), dtype=bool)
    most = sorted(counts, key=lambda name: -counts[name])
    told = ", ".join(f"{counts[name]:,} in '{name}'" for name in most[:10])
    told += f" and some in {len(most) - 10} more columns" if len(most) > 10 else ""
    if missing == "error":
        first = int(np.argmax(lacks.any(axis=1)))
        wrong(
            f"the inputs in {file}",
            "have no missing values",
            f"{told}, the first in row {first + 1}",
            "Use missing=drop to drop such rows, missing=mean to fill in the mean of the training rows, or ignore=[COLUMN].",
        )
    complete = np.logical_not(lacks.any(axis=1))
    rows = int(len(x) - complete.sum())
    if missing == "drop":
        if rows == len(x):
            wrong(
                f"the inputs in {file}",
                "be complete in some rows",
                f"none; {told}",
                "Leave those columns out: ignore=[COLUMN].",
            )
        notes.append(f"dropped {rows:,} rows with missing inputs: {told}.")
        return complete
    notes.append(f"filled missing inputs in {rows:,} rows with the training rows' mean: {told}.")
    return np.ones(len(x), dtype=bool)


def _same_rows(x: Array) -> Integers:
    """Number the rows in order of appearance, with the same number for rows with the same inputs.

    Without duplicates these are the row numbers, so the splits do not depend on the chosen inputs.
    """
    bits = np.ascontiguousarray(x + 0.0).view(np.dtype((np.void, x.shape[1] * x.itemsize))).ravel()
    _, first, same = np.unique(bits, return_index=True, return_inverse=True)
    units: Integers = first.argsort().argsort()[same].astype(np.int64)
    return units


def _groups(column: Any, name: str, file: str) -> Integers:
    import pandas as pd

    units: Integers = pd.factorize(column)[0].astype(np.int64)
    if (units < 0).any():
        first = int(np.argmax(units < 0))
        wrong(f"group '{name}' of {file}", "have a value in each row", f"none in row {first + 1}")
    return units
