"""The mutation check: its faults fit the code, its tests exist, its table is complete, and it detects a fault."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
from mutations import FAULTS, Fault

SCRIPT = "mutation_check"
Call = Callable[..., str]
CHEAP = next(fault for fault in FAULTS if fault.name == "priorities are not scaled to mean 1")


def test_every_fault_occurs_once_and_changes_the_core_alone(script: ModuleType) -> None:
    assert script.wrong_texts(FAULTS) == []
    assert len(FAULTS) >= 25
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
    for fault in FAULTS:
        assert fault.file.startswith("lightning_gradnorm/")
        assert not fault.file.startswith("lightning_gradnorm/experiments")
        code = (script.ROOT / fault.file).read_text()
        compile(code.replace(fault.old, fault.new), fault.file, "exec")
        assert fault.old != fault.new


def test_a_text_that_does_not_occur_once_is_reported(script: ModuleType) -> None:
    (told,) = script.wrong_texts([replace(CHEAP, old="no such text"), CHEAP])
    assert told.startswith(f"'{CHEAP.name}': its text should occur once in {CHEAP.file}; found 0 times")
    (told,) = script.wrong_texts([replace(CHEAP, old="import")])
    assert "should occur once" in told


def test_the_tests_of_every_fault_exist(script: ModuleType) -> None:
    for fault in FAULTS:
        assert fault.tests, fault.name
        for test in fault.tests:
            assert (script.ROOT / test).is_file(), f"{fault.name}: {test}"


def test_the_table_of_the_tests_readme_has_every_fault_and_tests_that_exist(script: ModuleType) -> None:
    text = (script.ROOT / "tests" / "README.md").read_text().partition("## Which faults")[2]
    rows = re.findall(r"^\| (.+) \| `(\S+)` \| `(\S+)::(\w+)` \|$", text, flags=re.MULTILINE)
    assert [(name, file) for name, file, *_ in rows] == [(fault.name, fault.file) for fault in FAULTS]
    for fault, (_, _, test, function) in zip(FAULTS, rows, strict=True):
        assert test in fault.tests
        assert re.search(rf"^def {function}\(", (script.ROOT / test).read_text(), flags=re.MULTILINE)


def test_a_fault_goes_into_a_copy_and_not_into_the_tree(script: ModuleType) -> None:
    before = (script.ROOT / CHEAP.file).read_text()
    with script.copied_tree(CHEAP) as copy:
        found = (copy / CHEAP.file).read_text()
        assert CHEAP.old not in found
        assert CHEAP.new in found
        assert (script.ROOT / CHEAP.file).read_text() == before
    assert not copy.exists()


def test_the_list_names_faults_and_tests(call: Call) -> None:
    told = call("--list", "--fault", CHEAP.name)
    assert told == f"{CHEAP.name}\n    {CHEAP.file}\n    {CHEAP.tests[0]}\n"


def test_an_unknown_fault_is_an_error(call: Call) -> None:
    with pytest.raises(SystemExit, match="no fault 'nonsense'; --list shows them"):
        call("--fault", "nonsense")


# ---- with tests that really run ----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_fault_is_caught_by_a_named_test(call: Call) -> None:
    told = call("--fault", CHEAP.name)
    assert re.search(rf"^{CHEAP.name}: {CHEAP.tests[0]}::test_\w+ \(\d+ s\)$", told, flags=re.MULTILINE)
    assert told.endswith("1 of 1 faults caught\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (replace(CHEAP, new=CHEAP.old + "  # the same"), "SURVIVED"),
        (replace(CHEAP, new=")"), "DOES NOT RUN"),
    ],
    ids=["survives", "does not load"],
)
def test_a_fault_that_is_not_caught_is_status_1(
    fault: Fault,
    told: str,
    call: Call,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(script, "FAULTS", (fault,))
    with pytest.raises(SystemExit) as end:
        call()
    assert end.value.code == 1
    assert f"{fault.name}: {told}" in capsys.readouterr().out
