"""Reads a table from a file (CSV, ARFF, MATLAB or Parquet) with the usual reader for each format."""

from __future__ import annotations

import csv
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lightning_gradnorm._messages import nearest
from lightning_gradnorm.experiments.loading.errors import refuse

SUFFIXES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".data": "csv",
    ".dat": "csv",
    ".arff": "arff",
    ".mat": "mat",
    ".parquet": "parquet",
    ".pq": "parquet",
}
"""The format for each file suffix."""

wrong = partial(refuse, "TabularDataModule")

_KINDS = {"csv": "a text file", "arff": "an ARFF file", "mat": "a MATLAB file", "parquet": "a Parquet file"}
FORMATS = tuple(_KINDS)
_SEPARATORS = ("\t", ";", "|", ",")
"""Tried in this order, because decimal numbers and text can contain commas, too."""


def read_table(
    path: str | Path, format: str | None = None, separator: str | None = None, key: str | None = None
) -> Any:
    """Return the table in a file as a pandas ``DataFrame`` with strings as column names.

    A CSV with only numbers in its first line and a MATLAB matrix have no names. Their columns are ``"0"``, ``"1"``, ….
    Empty fields, ``NA``, ``nan`` and ``?`` are missing values.

    Args:
        path: The file.
        format: ``"csv"``, ``"arff"``, ``"mat"`` or ``"parquet"``; None to use the file's suffix.
        separator: Separator of the fields of a CSV; None to detect it: tab, semicolon, bar, comma or blanks.
        key: Name of the matrix in a MATLAB file; None if there is only one.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file has the wrong format or a bad line. The message says which.
        ModuleNotFoundError: A reader is not installed.
    """
    file = Path(path)
    if not file.is_file():
        near = None if file.is_dir() else nearest(file.name, [one.name for one in file.parent.glob("*")])
        hint = f"did you mean '{near}'?" if near else "path should be the file with the table"
        what = f"path should be the file with the table; {path} is a folder" if file.is_dir() else ""
        raise FileNotFoundError(f"TabularDataModule: {what or f'no such file: {path}; {hint}'}")
    seems = _looks_like(file)
    if seems not in _KINDS.values():
        wrong(file, f"be {', '.join(_KINDS.values())}", seems, "Save the table as CSV.")
    format = format or SUFFIXES.get(file.suffix.lower())
    by_kind = {kind: name for name, kind in _KINDS.items()}
    if format is None:
        wrong(file, f"end in {', '.join(SUFFIXES)}", f"'{file.suffix}'", f"Use format={by_kind[seems]}: it is {seems}.")
    if seems != _KINDS[format]:
        wrong(file, f"be {_KINDS[format]}", seems, f"Use format={by_kind[seems]}.")
    with _installed(file):
        frame = {"csv": _read_csv, "arff": _read_arff, "mat": _read_mat, "parquet": _read_parquet}[format](
            file, separator, key
        )
    frame.columns = [str(name) for name in frame.columns]
    _check_different(file, frame.columns)
    if len(frame) == 0:
        wrong(file, "have rows", "none")
    return frame


def _looks_like(file: Path) -> str:
    """Return the kind of file, detected from its first bytes."""
    with file.open("rb") as stream:
        start = stream.read(4096)
    signs = {
        b"MATLAB 5.0": "a MATLAB file",
        b"MATLAB 7.3": "a MATLAB file of version 7.3",
        b"\x89HDF": "an HDF5 file",
        b"PAR1": "a Parquet file",
        b"PK\x03\x04": "an Excel or zip file",
        b"\xd0\xcf\x11\xe0": "an old Excel file",
        b"\x1f\x8b": "a gzip file",
        b"version https://git-lfs": "a Git LFS pointer instead of the file itself",
    }
    for sign, kind in signs.items():
        if start.startswith(sign):
            return kind
    text = start.decode("utf-8-sig", errors="replace").lstrip()
    if text[:15].lower().startswith(("<!doctype", "<html")):
        return "a web page"
    if re.match(r"(%.*\n|\s)*@relation\b", text, re.IGNORECASE):
        return "an ARFF file"
    return "a binary file" if b"\x00" in start else "a text file"


@contextmanager
def _installed(file: Path) -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"TabularDataModule: reading {file.name} needs {error.name}, which is not installed. Install it: pip install "
            "'lightning-gradnorm[tabular]'"
        ) from None


def _read_csv(file: Path, separator: str | None, _: str | None) -> Any:
    import pandas as pd

    found = separator or ","
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            lines = [line for line in (stream.readline(1_000_000) for _ in range(20)) if line.strip()]
        if not lines:
            wrong(file, "have rows", "an empty file")
        found = separator or _separator_of(lines)
        fields = _words(lines[0], found)
        is_named = not all(_is_number(field) for field in fields)
        if is_named:
            _check_different(file, [field for field in fields if field])
        with warnings.catch_warnings():
            warnings.simplefilter("error", pd.errors.ParserWarning)
            return pd.read_csv(
                file,
                sep=r"\s+" if found == " " else found,
                header=0 if is_named else None,
                index_col=False,  # otherwise trailing separators would turn the first column into row names
                na_values=["?"],
                skipinitialspace=True,
                encoding="utf-8-sig",
                low_memory=False,
            )
    except UnicodeDecodeError as error:
        wrong(file, "be encoded in UTF-8", f"the byte {error.object[error.start]:#x}", "Save it as UTF-8.")
    except (pd.errors.ParserError, pd.errors.ParserWarning, pd.errors.EmptyDataError) as error:
        told = str(error).removeprefix("Error tokenizing data. C error: ").strip().rstrip(".")
        wrong(
            file,
            f"have as many fields in each line as in the first, {len(fields)}, separated by {_shown(found)}",
            told,
            "Correct the line, or set separator=.",
        )


def _separator_of(lines: Sequence[str]) -> str:
    for separator in _SEPARATORS:
        if len({len(_words(line, separator)) for line in lines}) == 1 and separator in lines[0]:
            return separator
    if len({len(line.split()) for line in lines}) == 1 and len(lines[0].split()) > 1:
        return " "
    # Lines of different lengths, or a single column. pandas will report the line.
    return max(_SEPARATORS[::-1], key=lines[0].count)


def _words(line: str, separator: str) -> list[str]:
    if separator == " ":
        return line.split()
    if len(separator) > 1:
        return [word.strip() for word in re.split(separator, line.strip())]
    return [word.strip() for word in next(csv.reader([line.strip("\r\n")], delimiter=separator, skipinitialspace=True))]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return word in ("", "?")
    return True


def _shown(separator: str) -> str:
    return {"\t": "tabs", " ": "blanks"}.get(separator, f"'{separator}'")


def _read_arff(file: Path, _: str | None, __: str | None) -> Any:
    import pandas as pd
    from scipy.io import arff

    try:
        rows, _meta = arff.loadarff(file)
    except (arff.ArffError, NotImplementedError, ValueError, IndexError, StopIteration) as error:
        wrong(
            file,
            "be an ARFF file with numeric and nominal attributes, not sparse",
            f"{type(error).__name__}: {str(error).rstrip('.')}",
            "Save the table as CSV.",
        )
    frame = pd.DataFrame(rows)
    for name in frame.select_dtypes(object):  # nominal: bytes
        values = frame[name].str.decode("utf-8")
        frame[name] = values.where(values != "?")
    return frame.rename(columns=lambda name: name.strip("'\""))


def _read_mat(file: Path, _: str | None, key: str | None) -> Any:
    import pandas as pd
    from scipy.io import loadmat

    content = loadmat(file)
    tables = {
        name: value
        for name, value in content.items()
        if not name.startswith("__")
        and isinstance(value, np.ndarray)
        and value.ndim == 2
        and value.dtype.kind in "biuf"
    }
    found = ", ".join(f"'{name}' of {value.shape[0]} x {value.shape[1]}" for name, value in tables.items()) or "none"
    if key is None and len(tables) != 1:
        wrong(file, "have one matrix of numbers", found, "Set key= to the name of one." if tables else "")
    if key is not None and key not in tables:
        wrong(f"key of {file}", "name a numeric matrix in it", f"'{key}'", f"It has {found}.")
    return pd.DataFrame(tables[next(iter(tables)) if key is None else key])


def _read_parquet(file: Path, _: str | None, __: str | None) -> Any:
    import pyarrow
    import pyarrow.parquet as parquet

    try:
        frame = parquet.read_table(file).to_pandas()
    except pyarrow.ArrowException as error:
        wrong(file, "be a whole Parquet file", str(error).splitlines()[0].rstrip("."))
    return frame if frame.index.names == [None] else frame.reset_index()


def _check_different(file: Path, names: Sequence[str]) -> None:
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        wrong(f"the columns of {file}", "have different names", f"'{twice[0]}' more than once", "Rename one of them.")
