"""Errors for a table that cannot be trained on: the column or the row, the expectation and the fix."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_gradnorm.experiments.problems.tabular import TabularDataModule

pd = pytest.importorskip("pandas")


def table() -> Any:
    x = np.random.default_rng(0).normal(size=(40, 4))
    return pd.DataFrame(x, columns=["age", "height", "a", "b"]).assign(city="Rome", subject=np.arange(40) % 5)


def changed(column: str, row: int, value: Any) -> Callable[[Any], Any]:
    def change(frame: Any) -> Any:
        frame[column] = frame[column].astype(object)
        frame.loc[row, column] = value
        return frame

    return change


COLUMNS: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt target": (
        {"targets": ["a", "B"]},
        r"targets names column 'B', which is not in t.csv; did you mean|it has",
    ),
    "misspelt input": (
        {"inputs": ["heigth"]},
        r"inputs names column 'heigth', which is not in .*; did you mean 'height'\?",
    ),
    "misspelt ignored": (
        {"ignore": ["citi"]},
        r"ignore names column 'citi', which is not in .*; did you mean 'city'\?",
    ),
    "misspelt group": ({"group": "subjekt"}, r"group names column 'subjekt', .* did you mean 'subject'\?"),
    "target twice": ({"targets": ["a", "a"]}, r"target 'a' should have a unique task name; got 'a' twice"),
    "target as input": ({"inputs": ["age", "a"]}, r"column 'a' should have one role; got it in targets and in inputs"),
    "input twice": ({"inputs": ["age", "age"]}, r"column 'age' should have one role; got it twice"),
    "group as input": ({"inputs": ["subject"], "group": "subject"}, r"'subject' .* got it in inputs and in group"),
    "ignored target": ({"ignore": ["b"]}, r"column 'b' should have one role; got it in targets and in ignore"),
    "text as target": (
        {"targets": ["a", "city"]},
        r"target 'city' of t.csv should contain numbers; got 'Rome' in row 1, .* write its classes as numbers, such as 0 and 1",
    ),
    "text as input": (
        {"inputs": ["age", "city"]},
        r"column 'city' of t.csv should contain numbers; got 'Rome' in row 1",
    ),
    "no numbers left": (
        {"ignore": ["age", "height", "subject"]},
        r"t.csv should have numeric columns besides the targets; got 'city'",
    ),
    "too few groups": (
        {"group": "city"},
        r"for each of training, validation and test; got 0.15 and 0.15 of 1 different values of group 'city'",
    ),
}


@pytest.mark.parametrize("case", COLUMNS)
def test_a_column_that_cannot_be_used_so_is_named(case: str, tmp_path: Path) -> None:
    options, expected = COLUMNS[case]
    table().to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(ValueError, match=expected):
        TabularDataModule(tmp_path / "t.csv", **{"targets": ["a", "b"], **options}).setup()


VALUES: dict[str, tuple[Callable[[Any], Any], dict[str, Any], str]] = {
    "word among numbers": (
        changed("age", 16, "unknown"),
        {},
        r"column 'age' of t.csv should contain numbers; got 'unknown' in row 17. Correct it, or .*: ignore=\[age\]",
    ),
    "word in a target": (changed("b", 3, "-"), {}, r"target 'b' of t.csv should contain numbers; got '-' in row 4"),
    "infinite input": (
        changed("height", 0, np.inf),
        {},
        r"column 'height' .* should contain numbers; got 'inf' in row 1",
    ),
    "infinite target": (changed("a", 9, -np.inf), {}, r"target 'a' .* should contain numbers; got '-inf' in row 10"),
    "constant target": (
        lambda frame: frame.assign(a=2.5),
        {},
        r"target 'a' should vary over the 28 training rows of t.csv; got 2.5 in all of them. Leave the target out, or use",
    ),
    "empty target": (
        lambda frame: frame.assign(a=np.nan),
        {},
        r"target 'a' should have a value in the \d+ t.* rows .*; got none",
    ),
    "constant input": (
        lambda frame: frame.assign(age=3),
        {"inputs": ["height", "age"]},
        r"the inputs in t.csv should vary over the training rows; got constant or empty 'age'. Leave them out",
    ),
    "all inputs constant": (
        lambda frame: frame.assign(age=range(40), height=1).assign(age=lambda f: f.age * 0),
        {"ignore": ["city"], "group": "subject"},
        r"should vary over the training rows; got constant or empty 'age', 'height'",
    ),
    "missing group": (
        changed("subject", 4, None),
        {"group": "subject"},
        r"group 'subject' of t.csv should have .* row 5",
    ),
    "no complete row": (
        lambda frame: frame.assign(age=np.nan),
        {"missing": "drop"},
        r"inputs in t.csv should be complete in some rows; got none; 40 in 'age'. Leave those columns out",
    ),
    "no targets": (
        lambda frame: frame.assign(a=np.nan, b=np.nan),
        {},
        r"t.csv should have rows with inputs and targets",
    ),
    "two rows": (lambda frame: frame[:2], {}, r"of 2 rows with different inputs. Lower them, or use a larger table"),
}


@pytest.mark.parametrize("case", VALUES)
def test_a_value_that_cannot_be_used_is_named_with_its_row(case: str, tmp_path: Path) -> None:
    change, options, expected = VALUES[case]
    change(table()).to_csv(tmp_path / "t.csv", index=False)
    with pytest.raises(ValueError, match=expected):
        TabularDataModule(tmp_path / "t.csv", **{"targets": ["a", "b"], **options}).setup()


ARGUMENTS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"targets": "a"}, TypeError, r"targets should be a list of column names, .*; got 'a'"),
    ({"targets": []}, TypeError, r"targets should be a list of column names"),
    ({"inputs": [1.5]}, TypeError, r"inputs should be a list of column names, .*; got \[1.5\]"),
    (
        {"missing": "means"},
        ValueError,
        r"missing should be one of 'error', 'drop', 'mean'; got 'means'. Did you mean 'mean'\?",
    ),
    ({"format": "xlsx"}, ValueError, r"format should be one of 'csv', 'arff', 'mat', 'parquet'; got 'xlsx'"),
    ({"val_fraction": 1.0}, ValueError, r"val_fraction should be at least 0, below 1; got 1.0"),
    ({"test_fraction": 0}, ValueError, r"test_fraction should be above 0, below 1; got 0"),
    ({"val_fraction": 0.6, "test_fraction": 0.4}, ValueError, r"val_fraction should be less than 1 together with"),
    ({"batch_size": 0}, ValueError, r"batch_size should be at least 1; got 0"),
]


@pytest.mark.parametrize(("options", "kind", "expected"), ARGUMENTS)
def test_a_wrong_argument_is_refused_before_the_file_is_read(
    options: dict[str, Any], kind: type[Exception], expected: str
) -> None:
    with pytest.raises(kind, match=expected):
        TabularDataModule("not/there.csv", **{"targets": ["a", "b"], **options})
