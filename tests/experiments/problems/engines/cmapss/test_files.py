"""The reader of NASA's text files: it returns the numbers in the file, and errors name what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from engine_files import lines, row

from lightning_gradnorm.experiments.problems.engines.cmapss import read_engines, read_rul

LENGTHS = (3, 1, 4)
# A real file begins so: no header, 26 columns, two blanks at the end of each line.
LIKE_NASA = (
    "1 1 0.0023 0.0003 100.0 518.67 643.02 1585.29 1398.21 14.62 21.61 553.90 2388.04 9050.17 1.30 47.20 521.72 2388.03 "
    "8125.55 8.4052 0.03 392 2388 100.00 38.86 23.3735  \n"
    "1 2 -0.0027 -0.0003 100.0 518.67 641.71 1588.45 1395.42 14.62 21.61 554.85 2388.01 9054.42 1.30 47.50 522.16 2388.06 "
    "8139.62 8.3803 0.03 393 2388 100.00 39.02 23.3916  \n"
)


def test_a_line_is_unit_cycle_three_settings_and_twenty_one_sensors(tmp_path: Path) -> None:
    file = tmp_path / "train_FD001.txt"
    file.write_text(LIKE_NASA)
    engines = read_engines(file)
    assert engines.units.tolist() == [1]
    assert engines.lengths.tolist() == [2]
    assert engines.settings.tolist() == [[0.0023, 0.0003, 100.0], [-0.0027, -0.0003, 100.0]]
    assert engines.sensors.shape == (2, 21)
    assert engines.sensors[0, [0, 1, 13, 19, 20]].tolist() == [518.67, 643.02, 8125.55, 38.86, 23.3735]


WRITINGS: dict[str, Callable[[str], bytes]] = {
    "as NASA's": str.encode,
    "without a last line break": lambda text: text.rstrip("\n").encode(),
    "without trailing blanks": lambda text: text.replace("  \n", "\n").encode(),
    "with a header": lambda text: ("unit cycle s1 s2 s3 " + text).replace("s3 ", "s3\n").encode(),
    "with a header of one word": lambda text: ("engines\n" + text).encode(),
    "with a byte order mark and Windows line breaks": lambda text: (
        b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode()
    ),
    "with tabs and leading blanks": lambda text: ("  " + text.replace(" ", " \t")).encode(),
    "with empty lines": lambda text: ("\n \n" + text + "\n   \n\n").encode(),
}


@pytest.mark.parametrize("writing", WRITINGS.values(), ids=WRITINGS)
def test_every_number_is_read_in_any_file_layout(writing: Callable[[str], bytes], tmp_path: Path) -> None:
    (tmp_path / "engines.txt").write_bytes(writing("\n".join(lines(LENGTHS)) + "\n"))
    (tmp_path / "rul.txt").write_bytes(writing("12  \n0  \n7  \n"))
    engines = read_engines(tmp_path / "engines.txt")
    assert (engines.units.tolist(), engines.lengths.tolist(), engines.starts.tolist()) == (
        [1, 2, 3],
        [3, 1, 4],
        [0, 3, 4],
    )
    expected = np.array(
        [row(unit, cycle) for unit, length in enumerate(LENGTHS, start=1) for cycle in range(1, length + 1)]
    )
    assert np.array_equal(engines.settings, expected[:, 2:5])
    assert np.array_equal(engines.sensors, expected[:, 5:])
    assert read_rul(tmp_path / "rul.txt").tolist() == [12, 0, 7]


def test_unit_numbers_may_have_gaps_and_begin_anywhere(tmp_path: Path) -> None:
    file = tmp_path / "train_FD001.txt"
    file.write_text("\n".join([*lines((2,), first=3), *lines((3,), first=8)]))
    assert read_engines(file).units.tolist() == [3, 8]


def test_chosen_engines_keep_their_cycles(tmp_path: Path) -> None:
    file = tmp_path / "train_FD001.txt"
    file.write_text("\n".join(lines(LENGTHS)))
    engines = read_engines(file).chosen(np.array([True, False, True]))
    assert (engines.units.tolist(), engines.lengths.tolist()) == ([1, 3], [3, 4])
    expected = [row(unit, cycle)[5:] for unit, length in ((1, 3), (3, 4)) for cycle in range(1, length + 1)]
    assert engines.sensors.tolist() == expected


def change(number: int, function: Callable[[list[str]], list[str]]) -> Callable[[list[str]], list[str]]:
    """Change the words of one line."""

    def changed(text: list[str]) -> list[str]:
        words = function(text[number - 1].split())
        return [*text[: number - 1], " ".join(words), *text[number:]]

    return changed


def put(number: int, column: int, word: str) -> Callable[[list[str]], list[str]]:
    return change(number, lambda words: [*words[:column], word, *words[column + 1 :]])


WRONG = {
    "25 columns": (change(6, lambda words: words[:-1]), r"line 6 of FILE should have 26 columns, .*; got 25 \(3 2 -0"),
    "27 columns": (change(1, lambda words: [*words, "1"]), r"line 1 of FILE should have 26 columns, .*; got 27"),
    "commas": (lambda text: [line.replace(" ", ",") for line in text], r"line 2 of FILE should have 26 columns.*; got 1"),
    "a word": (put(7, 4, "?"), r"setting 3 in line 7 of FILE should be a number; got '\?'"),
    "nan": (put(2, 25, "nan"), r"sensor 21 in line 2 of FILE should be a number; got 'nan'"),
    "an infinity": (put(2, 5, "inf"), r"sensor 1 in line 2 of FILE should be a number; got 'inf'"),
    "two points": (put(8, 6, "1.2.3"), r"sensor 2 in line 8 of FILE should be a number; got '1.2.3'"),
    "half a unit": (put(3, 0, "1.5"), r"line 3 of FILE should have a whole number as unit; got 1.5"),
    "half a cycle": (put(3, 1, "2.5"), r"line 3 of FILE should have a whole number as cycle; got 2.5"),
    "a missing cycle": (lambda text: text[:5] + text[6:], r"unit 3 in line 6 of FILE should be at cycle 2, .*; got cycle 3"),
    "a cycle twice": (lambda text: text[:6] + text[5:], r"unit 3 in line 7 of FILE should be at cycle 3, .*; got cycle 2"),
    "a late beginning": (lambda text: text[:4] + text[5:], r"unit 3 in line 5 of FILE should be at cycle 1, .*; got cycle 2"),
    "units backwards": (
        lambda text: text[4:] + text[:4],
        r"line 5 of FILE should belong to unit 3 or a later one, .*; got unit 1 after unit 3",
    ),
    "a unit in two pieces": (
        lambda text: [text[0], *text[3:], *text[1:3]],
        r"line 7 of FILE should belong to unit 3 or a later one, .*; got unit 1 after unit 3",
    ),
    "nothing": (lambda text: [], r"FILE should have lines of numbers; got none"),
    "only a header": (lambda text: ["unit cycle"], r"FILE should have lines of numbers; got none"),
    "no text": (lambda text: ["PK\x03\x04", "\x00\x7f"], r"line 2 of FILE should have 26 columns"),
}  # fmt: skip


@pytest.mark.parametrize(("harm", "message"), WRONG.values(), ids=WRONG)
def test_the_error_for_an_engines_file_names_the_line(
    harm: Callable[[list[str]], list[str]], message: str, tmp_path: Path
) -> None:
    file = tmp_path / "train_FD001.txt"
    file.write_text("\n".join(harm(lines(LENGTHS))))
    with pytest.raises(ValueError, match="^CMAPSS: " + message.replace("FILE", ".*/train_FD001.txt")):
        read_engines(file)


def test_line_numbers_count_header_and_empty_lines(tmp_path: Path) -> None:
    file = tmp_path / "train_FD001.txt"
    file.write_text("unit cycle\n\n" + "\n".join(put(2, 7, "x")(lines(LENGTHS))))
    with pytest.raises(ValueError, match="sensor 3 in line 4 of"):
        read_engines(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3\n4 5\n", r"line 2 of .*RUL_FD001.txt should have 1 column, separated by blanks; got 2 \(4 5\)"),
        ("3\n-4\n", r"line 2 of .*RUL_FD001.txt should have cycles left, 0 or more; got -4"),
        ("3\nfour\n", r"remaining useful life in line 2 of .*RUL_FD001.txt should be a number; got 'four'"),
        ("", r"RUL_FD001.txt should have lines of numbers"),
    ],
)
def test_the_error_for_the_rul_file_names_the_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "RUL_FD001.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"^CMAPSS: .*{message}"):
        read_rul(file)
