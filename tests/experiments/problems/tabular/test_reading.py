"""Tables from files of all formats, and the errors for a file that is not a table."""

from __future__ import annotations

import builtins
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_gradnorm.experiments.problems.tabular import read_table

pd = pytest.importorskip("pandas")
pytest.importorskip("pyarrow")
scipy_io = pytest.importorskip("scipy.io")

VALUES = np.array([[1.5, -2.0, 3.0], [4.0, np.nan, 6.25], [-7.0, 8.0, 9e-5]])
NAMES = ["x", "a b", "c"]


def csv_with(separator: str, header: bool = True, missing: str = "", end: str = "") -> str:
    lines = [separator.join(NAMES)] if header else []
    lines += [separator.join(missing if np.isnan(v) else repr(float(v)) for v in row) + end for row in VALUES]
    return "\n".join(lines) + "\n"


def arff(file: Path) -> None:
    attributes = "\n".join(f"@attribute '{name}' numeric" for name in NAMES)
    rows = csv_with(",", header=False, missing="?")
    file.write_text(f"% made by hand\n\n@RELATION r\n{attributes}\n@data\n{rows}")


WRITERS: dict[str, Callable[[Path], None]] = {
    "comma.csv": lambda file: file.write_text(csv_with(",")),
    "semicolon.csv": lambda file: file.write_text(csv_with(";", missing="NA")),
    "bar.txt": lambda file: file.write_text(csv_with("|", missing="?")),
    "tab.tsv": lambda file: file.write_text(csv_with("\t")),
    "marked.csv": lambda file: file.write_text("\ufeff" + csv_with(","), encoding="utf-8"),
    "windows.data": lambda file: file.write_bytes(csv_with(", ").replace("\n", "\r\n").encode()),
    "trailing.csv": lambda file: file.write_text(csv_with(",", end=",").replace("c\n", "c,\n", 1)),
    "table.arff": arff,
    "table.parquet": lambda file: pd.DataFrame(VALUES, columns=NAMES).to_parquet(file),
}


@pytest.mark.parametrize("name", WRITERS)
def test_the_same_table_is_read_out_of_every_format(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    table = read_table(tmp_path / name)
    assert list(table.columns)[:3] == NAMES
    assert np.array_equal(table[NAMES].to_numpy(dtype=float), VALUES, equal_nan=True)


def test_a_format_that_is_named_prevails_over_the_files_name(tmp_path: Path) -> None:
    arff(tmp_path / "table.txt")
    assert list(read_table(tmp_path / "table.txt", format="arff").columns) == NAMES


@pytest.mark.parametrize("separator", [",", " ", "\t", "   "])
def test_columns_without_names_are_numbered(separator: str, tmp_path: Path) -> None:
    (tmp_path / "t.dat").write_text("\n".join(separator.join(map(repr, row)) for row in VALUES[::2].tolist()))
    table = read_table(tmp_path / "t.dat")
    assert list(table.columns) == ["0", "1", "2"]
    assert np.array_equal(table.to_numpy(dtype=float), VALUES[::2])


def test_a_matrix_is_read_out_of_a_matlab_file(tmp_path: Path) -> None:
    scipy_io.savemat(tmp_path / "one.mat", {"m": VALUES, "name": "a text"})
    scipy_io.savemat(tmp_path / "two.mat", {"m": VALUES, "n": np.ones((4, 2))})
    for table in (read_table(tmp_path / "one.mat"), read_table(tmp_path / "two.mat", key="m")):
        assert list(table.columns) == ["0", "1", "2"]
        assert np.array_equal(table.to_numpy(), VALUES, equal_nan=True)
    with pytest.raises(
        ValueError, match=r"two.mat should have one matrix of numbers; got 'm' of 3 x 3, 'n' of 4 x 2. Set k"
    ):
        read_table(tmp_path / "two.mat")
    with pytest.raises(
        ValueError, match=r"key of .*two.mat should name a numeric matrix in it; got 'k'. It has 'm' of 3"
    ):
        read_table(tmp_path / "two.mat", key="k")


def test_nominal_attributes_are_texts_and_may_be_missing(tmp_path: Path) -> None:
    (tmp_path / "t.arff").write_text("@relation r\n@attribute k {A,B}\n@attribute v numeric\n@data\nA,1\n?,2\nB,?\n")
    table = read_table(tmp_path / "t.arff")
    assert table["k"].tolist()[::2] == ["A", "B"]
    assert table.isna().to_numpy().tolist() == [[False, False], [True, False], [False, True]]


def test_only_an_index_with_a_name_is_a_column(tmp_path: Path) -> None:
    frame = pd.DataFrame({"v": [1.0, 2.0]}, index=[5, 6])
    frame.to_parquet(tmp_path / "without.parquet")
    frame.rename_axis("subject").to_parquet(tmp_path / "with.parquet")
    assert list(read_table(tmp_path / "without.parquet").columns) == ["v"]
    assert read_table(tmp_path / "with.parquet")["subject"].tolist() == [5, 6]


WRONG: dict[str, tuple[str, bytes, str]] = {
    "excel": ("t.csv", b"PK\x03\x04 and so on", "got an Excel or zip file. Save the table as CSV"),
    "packed": ("t.csv", gzip.compress(b"a,b\n1,2\n"), "got a gzip file"),
    "web page": ("t.csv", b"\n<!DOCTYPE html><html>", "got a web page"),
    "pointer": (
        "t.parquet",
        b"version https://git-lfs.github.com/spec/v1\n",
        "got a Git LFS pointer instead of the",
    ),
    "matlab 7.3": ("t.mat", b"MATLAB 7.3 MAT-file", "got a MATLAB file of version 7.3. Save the table as CSV"),
    "binary": ("t.csv", b"\x00\x01\x02", "got a binary file"),
    "arff as csv": ("t.csv", b"% c\n@Relation r\n", "t.csv should be a text file; got an ARFF file. Use format=arff"),
    "csv as arff": ("t.arff", b"a,b\n1,2\n", "t.arff should be an ARFF file; got a text file. Use format=csv"),
    "csv as parquet": (
        "t.parquet",
        b"a,b\n1,2\n",
        "t.parquet should be a Parquet file; got a text file. Use format=csv",
    ),
    "unknown": (
        "t.abc",
        b"a,b\n1,2\n",
        r"t.abc should end in .csv, .*; got '.abc'. Use format=csv: it is a text file",
    ),
    "sparse": (
        "t.arff",
        b"@relation r\n@attribute a numeric\n@attribute b numeric\n@data\n{0 1}\n",
        "should be an ARFF file with numeric and nominal attributes, not sparse; got ValueError",
    ),
    "strings": (
        "t.arff",
        b"@relation r\n@attribute a string\n@data\nx\n",
        "not sparse; got NotImplementedError: String attributes",
    ),
    "half a parquet": (
        "t.parquet",
        b"PAR1 and nothing more",
        "should be a whole Parquet file; got .*Parquet magic bytes",
    ),
    "long line": (
        "t.csv",
        b"a,b\n1,2\n1,2,3\n",
        "as in the first, 2, separated by ','; got Expected 2 fields in line 3",
    ),
    "nameless": ("t.csv", b"a,b\n1,2,3\n1,2,4\n", "fields in each line as in the first, 2, separated by ','; got"),
    "empty": ("t.csv", b"\n", "t.csv should have rows; got an empty file"),
    "header alone": ("t.csv", b"a,b\n", "t.csv should have rows; got none"),
    "names twice": (
        "t.csv",
        b"a,b,a\n1,2,3\n",
        "should have different names; got 'a' more than once. Rename one of them",
    ),
    "not utf-8": ("t.csv", "größe,b\n1,2\n".encode("latin-1"), "should be encoded in UTF-8; got the byte 0xf6"),
}


@pytest.mark.parametrize("case", WRONG)
def test_the_error_for_a_wrong_file_describes_what_it_looks_like(case: str, tmp_path: Path) -> None:
    name, content, expected = WRONG[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=expected) as told:
        read_table(tmp_path / name)
    assert str(tmp_path / name) in str(told.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "table.csv").write_text("a,b\n1,2\n")
    with pytest.raises(FileNotFoundError, match=r"no such file: .*tabel.csv; did you mean 'table.csv'\?"):
        read_table(tmp_path / "tabel.csv")
    with pytest.raises(FileNotFoundError, match=r"path should be the file with the table; .* is a folder"):
        read_table(tmp_path)


@pytest.mark.parametrize(
    ("name", "package"),
    [("comma.csv", "pandas"), ("table.arff", "scipy"), ("table.parquet", "pyarrow"), ("one.mat", "scipy")],
)
def test_a_reader_that_is_not_installed_is_named(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if name == "one.mat":
        scipy_io.savemat(tmp_path / name, {"m": VALUES})
    else:
        WRITERS[name](tmp_path / name)
    real = builtins.__import__

    def without(module: str, *arguments: Any, **options: Any) -> Any:
        if module.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)
        return real(module, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    expected = (
        rf"reading {name} needs {package}, which is not installed\. .*pip install 'lightning-gradnorm\[tabular\]'"
    )
    with pytest.raises(ModuleNotFoundError, match=expected):
        read_table(tmp_path / name)
