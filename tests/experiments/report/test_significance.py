"""The paired t-test against printed tables, and against SciPy where it is installed."""

from __future__ import annotations

import math
import random

import pytest

from lightning_gradnorm.experiments.report.significance import deviation, holm, paired_test, t_quantile, t_two_sided

# Two-sided 5 % and 1 % points of Student's t, as printed in every table.
TABLE = [
    (1, 12.706, 63.657),
    (2, 4.303, 9.925),
    (3, 3.182, 5.841),
    (4, 2.776, 4.604),
    (5, 2.571, 4.032),
    (9, 2.262, 3.250),
    (10, 2.228, 3.169),
    (30, 2.042, 2.750),
    (120, 1.980, 2.617),
]


@pytest.mark.parametrize(("dof", "five", "one"), TABLE)
def test_quantiles_match_the_printed_table(dof: int, five: float, one: float) -> None:
    assert round(t_quantile(0.95, dof), 3) == pytest.approx(five, abs=1e-9)
    assert round(t_quantile(0.99, dof), 3) == pytest.approx(one, abs=1e-9)
    assert t_two_sided(five, dof) == pytest.approx(0.05, abs=1e-4)
    assert t_two_sided(-one, dof) == pytest.approx(0.01, abs=1e-4)


def test_tails_and_tests_are_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    for dof in range(1, 60):
        for t in (0.0, 0.1, 1.0, 2.5, 7.0, 40.0):
            assert t_two_sided(t, dof) == pytest.approx(2 * stats.t.sf(t, dof), abs=1e-14)
        # Not stats.t.ppf: SciPy 1.11's is out by up to 4e-9.
        assert 2 * stats.t.sf(t_quantile(0.95, dof), dof) == pytest.approx(0.05, abs=1e-12)
    for new, old in (([1.0, 2.5, 2.0], [0.5, 2.6, 1.0]), ([3.0, 4.0, 1.0, 8.0, 2.5], [1.0, 4.1, 0.7, 7.7, 2.6])):
        ours, theirs = paired_test([a - b for a, b in zip(new, old, strict=True)]), stats.ttest_rel(new, old)
        interval = theirs.confidence_interval(0.95)
        assert ours.p == pytest.approx(theirs.pvalue, rel=1e-12)
        assert (ours.low, ours.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_students_own_example() -> None:
    # Student, The probable error of a mean (1908): hours of sleep gained by two drugs, ten patients.
    test = paired_test([1.2, 2.4, 1.3, 1.3, 0.0, 1.0, 1.8, 0.8, 4.6, 1.4])
    assert test.mean == pytest.approx(1.58)
    assert test.p == pytest.approx(0.00283, abs=5e-6)
    assert (round(test.low or 0, 3), round(test.high or 0, 3)) == (0.700, 2.460)
    assert test.is_significant


def test_too_few_or_equal_pairs_have_no_p_value() -> None:
    for differences in ([0.5], [0.0, 0.0, 0.0]):
        test = paired_test(differences)
        assert (test.p, test.low, test.high, test.is_significant) == (None, None, None, False)
        assert test.mean == differences[0]
    assert paired_test([2.0, 2.0]).p == 0.0  # all differ by the same: no scatter
    with pytest.raises(ValueError, match="one or more"):
        paired_test([])
    with pytest.raises(ValueError, match="dof should be 1 or more"):
        t_two_sided(1.0, 0)


def test_numbers_that_are_not_finite_make_no_verdict() -> None:
    test = paired_test([1.0, math.nan, 2.0])
    assert math.isnan(test.mean)
    assert test.p is None
    assert math.isnan(deviation([1.0, math.inf]))


def test_holms_correction_agrees_with_his_procedure() -> None:
    draw = random.Random(0)
    for count in range(1, 12):
        p_values = [draw.choice([draw.random(), draw.random() / 50, 0.01]) for _ in range(count)]
        corrected = holm(p_values)
        for level in (0.001, 0.01, 0.05, 0.2, 0.9):
            # In the words of the paper: the smallest p against level / m, the next against level / (m - 1), until one fails.
            rejected: set[int] = set()
            for rank, place in enumerate(sorted(range(count), key=p_values.__getitem__)):
                if p_values[place] * (count - rank) >= level:
                    break
                rejected.add(place)
            assert {place for place in range(count) if corrected[place] < level} == rejected
        assert all(p <= one <= 1 for p, one in zip(p_values, corrected, strict=True))
    assert holm([]) == []
