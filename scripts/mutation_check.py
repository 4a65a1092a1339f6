"""Puts faults into the core, one after another, and checks that the fast tests notice.

`mutations.py` lists the faults: a text in the core, its replacement, and the fast tests that should notice. The first
failing test has caught the fault.

No fault touches your tree, so nothing needs restoring: each goes into its own copy in a temporary folder.

Exits with status 1 if a fault survives or does not load, if its text does not occur exactly once, or if the tests fail without
a fault.

Example:
    python scripts/mutation_check.py            # all faults: ten to twenty minutes in one process
    python scripts/mutation_check.py --jobs 4
    python scripts/mutation_check.py --list
    python scripts/mutation_check.py --fault "the exponent is -alpha"
    python scripts/mutation_check.py --table    # the table of tests/README.md
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mutations import FAULTS, Fault

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("lightning_gradnorm", "tests", "scripts", "conf", "pyproject.toml")
"""The contents of the copy."""
FAST = "not slow and not gpu"
TIMEOUT = 120
"""Seconds after which a test counts as failed, because a fault may make it wait forever."""
CONFTEST = """
from hypothesis import Phase, settings
settings.register_profile("no shrinking", phases=(Phase.explicit, Phase.generate))
settings.load_profile("no shrinking")
"""
"""Placed at the root of the copy. A failing test is enough, so do not wait for its smallest example."""
PASSED, FAILED = 0, 1  # pytest's exit statuses


@dataclass(frozen=True)
class Outcome:
    """The result of the tests."""

    status: int
    caught_by: str | None
    """The first test that failed, without its parameters."""
    output: str
    seconds: float


def wrong_texts(faults: Iterable[Fault]) -> list[str]:
    """Return a message for each fault whose text does not occur exactly once in its file."""
    counted = [(fault, (ROOT / fault.file).read_text().count(fault.old)) for fault in faults]
    return [
        f"'{fault.name}': its text should occur once in {fault.file}; found {count} times: {fault.old!r}"
        for fault, count in counted
        if count != 1
    ]


@contextmanager
def copied_tree(fault: Fault | None = None) -> Iterator[Path]:
    """Copy the files that the tests need to a temporary folder, and put the fault into the copy."""
    with tempfile.TemporaryDirectory(prefix="mutation_check_") as folder:
        copy = Path(folder)
        for name in NEEDED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(ROOT / name, copy / name)
        (copy / "conftest.py").write_text(CONFTEST)
        if fault is not None:
            file = copy / fault.file
            file.write_text(file.read_text().replace(fault.old, fault.new))
        yield copy


def run_tests(copy: Path, tests: Sequence[str]) -> Outcome:
    """Run fast tests in a copy until the first fails."""
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rf", "-m", FAST, "-o", f"timeout={TIMEOUT}", *tests]
    began = time.monotonic()
    done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    found = re.search(r"^FAILED ([^\s\[]+)", done.stdout, flags=re.MULTILINE)
    output = done.stdout + done.stderr
    return Outcome(done.returncode, found and found.group(1), output, time.monotonic() - began)


def try_fault(fault: Fault) -> Outcome:
    """Run the tests of one fault with it in place."""
    with copied_tree(fault) as copy:
        return run_tests(copy, fault.tests)


def verdict(outcome: Outcome) -> str | None:
    """Return the problem, or None if a test caught the fault."""
    if outcome.status == PASSED:
        return "SURVIVED"
    if outcome.status != FAILED or outcome.caught_by is None:
        return "DOES NOT RUN"
    return None


def table(caught: Iterable[tuple[Fault, str]]) -> str:
    """Return the faults and the tests that caught them as Markdown."""
    rows = [f"| {fault.name} | `{fault.file}` | `{test}` |" for fault, test in caught]
    return "\n".join(["| fault | file | test that catches it |", "|---|---|---|", *rows])


def chosen(name: str | None) -> list[Fault]:
    """Return the faults to try."""
    faults = [fault for fault in FAULTS if name in (None, fault.name)]
    if not faults:
        sys.exit(f"mutation_check: there is no fault '{name}'; --list shows them")
    return faults


def check(faults: Sequence[Fault], jobs: int, *, as_table: bool) -> bool:
    """Try all faults, and print the result of each. Return True if all were caught."""
    tests = list(dict.fromkeys(test for fault in faults for test in fault.tests))
    with copied_tree() as copy:
        without = run_tests(copy, tests)
    if without.status != PASSED:
        print(without.output)
        print("mutation_check: these tests should pass without a fault, but do not")
        return False
    print(f"without a fault: all pass ({without.seconds:.0f} s)", file=sys.stderr)
    caught, wrong = [], 0
    with ThreadPoolExecutor(jobs) as pool:
        for fault, outcome in zip(faults, pool.map(try_fault, faults), strict=True):
            problem = verdict(outcome)
            if outcome.caught_by is not None and problem is None:
                caught.append((fault, outcome.caught_by))
            else:
                wrong += 1
                print(outcome.output[-3000:], file=sys.stderr)
            said = f"{fault.name}: {problem or outcome.caught_by} ({outcome.seconds:.0f} s)"
            print(said, file=sys.stderr if as_table else sys.stdout, flush=True)
    if as_table:
        print(table(caught))
    else:
        print(f"{len(caught)} of {len(faults)} faults caught")
    return wrong == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", metavar="NAME", help="try only this fault")
    parser.add_argument("--list", action="store_true", help="print the faults and the tests that should catch them")
    parser.add_argument(
        "--table", action="store_true", help="print the faults with the tests that caught them as Markdown"
    )
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="number of faults to try in parallel")
    options = parser.parse_args()
    faults = chosen(options.fault)
    if wrong := wrong_texts(faults):
        sys.exit("\n".join(wrong))
    if options.list:
        for fault in faults:
            print(f"{fault.name}\n    {fault.file}\n    {' '.join(fault.tests)}")
    elif not check(faults, options.jobs, as_table=options.table):
        sys.exit(1)


if __name__ == "__main__":
    main()
