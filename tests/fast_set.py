"""Keeps the fast set small: of a full product of parameters, it runs one test per value; the slow set runs the rest."""

from __future__ import annotations

import time
from collections import Counter

import pytest
from hypothesis import settings

settings.register_profile("fast", max_examples=15, deadline=None, derandomize=True)
settings.register_profile("slow", max_examples=100, deadline=None, derandomize=True)

_NOT_REACHED = "not reached within the time limit"


def add_options(parser: pytest.Parser) -> None:
    """Add ``--at-most MINUTES``."""
    parser.addoption("--at-most", type=float, metavar="MINUTES", help="skip and count the tests not reached by then")


def configure(config: pytest.Config) -> None:
    """Choose the number of hypothesis' examples, and start the clock of ``--at-most``."""
    runs_slow = "slow" in (selected := config.getoption("markexpr")) and "not slow" not in selected
    settings.load_profile("slow" if runs_slow else "fast")
    minutes = config.getoption("--at-most")
    config.stash[_deadline] = float("inf") if minutes is None else time.monotonic() + 60 * minutes


def skip_if_late(item: pytest.Item) -> None:
    """Skip the test once the time of ``--at-most`` is over."""
    if time.monotonic() > item.config.stash[_deadline]:
        pytest.skip(_NOT_REACHED)


def report_what_was_not_reached(reporter: pytest.TerminalReporter) -> None:
    """Print how many tests of each file ``--at-most`` left out."""
    late = [
        r for r in reporter.stats.get("skipped", []) if isinstance(r.longrepr, tuple) and _NOT_REACHED in r.longrepr[2]
    ]
    if late:
        reporter.section(f"{len(late)} tests {_NOT_REACHED}")
        for path, count in sorted(Counter(report.location[0] for report in late).items()):
            reporter.line(f"{count:5d} {path}")


def thin_out(items: list[pytest.Item]) -> None:
    """Mark slow what adds no new value of any parameter, in tests marked ``each_value_once``.

    The first test of a product runs with the first value of each parameter, the second with the second, and so on: n tests
    for parameters of at most n values. The values of a parameter that has fewer take turns. What is marked slow already
    counts for nothing.
    """
    products: dict[str, list[pytest.Function]] = {}
    for item in items:
        is_thinned = item.get_closest_marker("each_value_once") and not item.get_closest_marker("slow")
        if isinstance(item, pytest.Function) and is_thinned:
            products.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for product in products.values():
        missing = {value for item in product for value in _values(item)}
        left, used = list(product), Counter[tuple[int, str]]()

        def gain(item: pytest.Function) -> tuple[int, int]:
            values = _values(item)
            return len(missing & values), -sum(used[value] for value in values)  # noqa: B023

        while missing:
            best = max(left, key=gain)
            missing -= _values(best)
            used.update(_values(best))
            left.remove(best)
        for item in left:
            item.add_marker(pytest.mark.slow)


def keep_together(items: list[pytest.Item]) -> None:
    """Have the tests that share a fixture of their module run on one worker, where it is made once."""
    for item in items:
        if isinstance(item, pytest.Function) and item.get_closest_marker("xdist_group") is None:
            fixtures = item._fixtureinfo.name2fixturedefs.values()
            if any(found[-1].scope == "module" for found in fixtures if found):
                item.add_marker(pytest.mark.xdist_group(item.module.__name__))


def _values(item: pytest.Function) -> set[tuple[int, str]]:
    """The number of each parameter and the name of its value; pytest's `indices` count the tests, if it is no fixture."""
    return set(enumerate(item.callspec._idlist))


_deadline = pytest.StashKey[float]()
