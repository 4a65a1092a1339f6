"""TorchJD's objects are solved by our solvers, with their options and state; TorchJD's own are the fallback, and counted."""

from __future__ import annotations

import builtins
import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torchjd._mixins
import torchjd.aggregation as jd
from minima import exactly
from torch import Tensor, nn

from lightning_gradnorm import strategies
from lightning_gradnorm.strategies import AggregationRule, CAGrad, FairGrad, NashMTL
from lightning_gradnorm.strategies.exact import solver_of

pytestmark = [pytest.mark.filterwarnings(f"ignore::{kind}Warning") for kind in ("User", "Runtime")]  # cvxpy's
T, F64 = 3, torch.float64
TASKS = ["seg", "depth", "normal"]
SOLVED: dict[str, Callable[[], nn.Module]] = {
    "MGDA": jd.MGDA,
    "MGDAWeighting": jd.MGDAWeighting,
    "CAGrad": partial(jd.CAGrad, c=0.4),
    "CAGradWeighting": partial(jd.CAGradWeighting, c=0.4),
    "FairGrad": partial(jd.FairGrad, alpha=2.0),
    "FairGradWeighting": partial(jd.FairGradWeighting, alpha=2.0),
    "NashMTL": partial(jd.NashMTL, T),
}


def gradients(step: int, width: int = 6) -> Tensor:
    return torch.randn(T, width, generator=torch.Generator().manual_seed(step), dtype=F64)


def rule_of(aggregator: nn.Module, **options: Any) -> AggregationRule:
    return AggregationRule(TASKS, aggregator, **{"dtype": F64, **options})


def weigh(rule: AggregationRule, J: Tensor) -> Tensor:
    return rule.weigh_gradients(J @ J.T)


def assert_directions_agree(rule: AggregationRule, expected: Callable[[Tensor], Tensor], steps: int = 4) -> None:
    for step in range(steps):
        J = gradients(step)
        torch.testing.assert_close(weigh(rule, J) @ J, expected(J), rtol=1e-9, atol=1e-10)
    assert rule.fallbacks == 0


@pytest.mark.parametrize("name", SOLVED)
def test_an_object_of_torchjd_gets_the_exact_solution(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = rule_of(SOLVED[name]())
    for part in rule.aggregator.modules():
        monkeypatch.setattr(type(part), "forward", None)  # TorchJD's is not called
    assert_directions_agree(rule, exactly(SOLVED[name]()))
    assert rule.handed_over == 0


def test_options_are_read_in_every_call() -> None:
    rule = rule_of(aggregator := jd.CAGrad(c=0.4))
    assert_directions_agree(rule, exactly(jd.CAGrad(c=0.4)), steps=2)
    aggregator.c = 0.8
    assert_directions_agree(rule, exactly(jd.CAGrad(c=0.8)), steps=2)


def test_short_gradients_get_no_weights_by_cagrad_of_torchjd_but_by_ours() -> None:
    J = 1e-4 * gradients(0)
    theirs, ours = rule_of(jd.CAGrad(c=0.4)), rule_of(CAGrad(c=0.4))
    assert weigh(theirs, J).tolist() == jd.CAGrad(c=0.4).gramian_weighting(J @ J.T).tolist() == [0.0] * T
    torch.testing.assert_close(weigh(ours, J), weigh(ours, gradients(0)))
    assert float(ours.weights.min()) > 0.3


@pytest.mark.parametrize(
    "options",
    [{"max_norm": 0.0}, {"max_norm": 0.05}, {"max_norm": 1e3}, {"update_weights_every": 3}],
    ids=lambda options: "{}={}".format(*next(iter(options.items()))),
)
@pytest.mark.parametrize("kind", [jd.NashMTL, NashMTL])
def test_nash_mtl_has_the_options_and_the_memory_of_torchjd(kind: Any, options: dict[str, Any]) -> None:
    rule = rule_of(kind(T, **options))
    assert_directions_agree(rule, exactly(kind(T, **options)), steps=8)
    theirs = jd.NashMTL(T, **options)
    rule = rule_of(kind(T, **options))
    for step in range(8):  # TorchJD stops at a residual of 1e-3
        J = gradients(step)
        torch.testing.assert_close(weigh(rule, J) @ J, theirs(J), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", ["NashMTL", "FairGrad"])
def test_torchjd_answers_where_no_finite_weights_exist_and_we_count_it(name: str) -> None:
    rule = rule_of(SOLVED[name]())
    weigh(rule, gradients(0))
    last = rule.gradient_weights.clone()
    J = gradients(1)
    J[1] = 0  # the task's share of the improvement is 0, whatever its weight
    assert bool(weigh(rule, J).isfinite().all())
    assert (rule.handed_over, rule.fallbacks) == (1, 0)
    if name == "NashMTL":  # it keeps its last solution, which is ours; only the cut to max_norm differs
        ratios = rule.gradient_weights / last
        torch.testing.assert_close(ratios, ratios[0].expand(T))
    weigh(rule, gradients(2))
    assert rule.handed_over == 1
    torch.testing.assert_close(
        rule.gradient_weights @ gradients(2), exactly(SOLVED[name]())(gradients(2)), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("made", [partial(NashMTL, T), partial(FairGrad, 2.0)], ids=["NashMTL", "FairGrad"])
def test_ours_have_no_second_solver_so_all_tasks_get_equal_weights(made: Callable[[], nn.Module]) -> None:
    rule = rule_of(made())
    J = gradients(1)
    J[1] = 0
    assert len(set(weigh(rule, J).tolist())) == 1
    assert (rule.handed_over, rule.fallbacks) == (0, 1)
    assert "no finite weights" in rule.reason


@pytest.mark.parametrize("kind", [jd.NashMTL, NashMTL])
def test_a_resumed_run_continues_bit_for_bit_and_keeps_the_counts(kind: Any) -> None:
    make = partial(kind, T, max_norm=0.0, update_weights_every=3)
    whole, resumed = rule_of(make()), rule_of(make())
    for step in range(4):
        J = gradients(step)
        J[1] = 0 if step == 0 else J[1]
        weigh(whole, J)
    state = whole.state_dict()
    resumed.load_state_dict(state)
    assert resumed.handed_over == whole.handed_over == (1 if kind is jd.NashMTL else 0)
    for step in range(4, 9):
        assert torch.equal(weigh(whole, gradients(step)), weigh(resumed, gradients(step)))


def test_a_checkpoint_without_the_count_can_be_loaded() -> None:
    state = rule_of(jd.MGDA()).state_dict()
    del state["handed_over"]
    (rule := rule_of(jd.MGDA())).load_state_dict(state)
    assert rule.handed_over == 0


def test_subclasses_and_weightings_with_hooks_are_called_themselves() -> None:
    class Mine(jd.MGDAWeighting):  # type: ignore[misc]
        def forward(self, gramian: Tensor, /) -> Tensor:
            return torch.arange(len(gramian), dtype=gramian.dtype)

    assert solver_of(Mine()) is None
    assert weigh(rule_of(Mine()), gradients(0)).tolist() == [0.0, 1.0, 2.0]
    hooked, seen = jd.MGDA(), []
    hooked.gramian_weighting.register_forward_hook(lambda module, args, answer: seen.append(answer))
    rule = rule_of(hooked)
    seen.clear()
    assert torch.equal(weigh(rule, gradients(0)), seen[-1])


@pytest.mark.parametrize("name", ["UPGrad", "PCGrad", "IMTLG", "ConFIG", "GradDrop"])
def test_all_others_are_torchjds(name: str) -> None:
    assert solver_of(getattr(jd, name)()) is None


def test_weights_in_half_of_the_precision_are_rounded_and_not_solved_in_it() -> None:
    J = gradients(0)
    exact = weigh(rule_of(jd.MGDA()), J)
    assert torch.equal(weigh(rule_of(jd.MGDA(), dtype=torch.float32), J), exact.float())


# ---- our classes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(CAGrad(0.4), jd.CAGrad(0.4)), (FairGrad(2.0), jd.FairGrad(2.0)), (FairGrad(0.0), jd.FairGrad(0.0))],
    ids=["CAGrad", "FairGrad", "FairGrad, the mean"],
)
def test_ours_aggregate_as_torchjds(ours: Any, theirs: Any) -> None:
    for step in range(5):
        J = gradients(step)
        torch.testing.assert_close(ours(J), theirs(J), rtol=1e-4, atol=1e-4)
        assert torch.equal(ours.gramian_weighting(J @ J.T) @ J, ours(J))
        assert ours(J.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (partial(CAGrad, -1.0), "CAGrad: c should be at least 0; got -1.0"),
        (partial(CAGrad, 0.5, norm_eps=-1.0), "CAGrad: norm_eps should be at least 0; got -1.0"),
        (partial(FairGrad, -1.0), "FairGrad: alpha should be at least 0; got -1.0"),
        (partial(NashMTL, 0), "NashMTL: n_tasks should be at least 1; got 0"),
        (partial(NashMTL, 2, max_norm=-1.0), "NashMTL: max_norm should be at least 0; got -1.0"),
        (partial(NashMTL, 2, update_weights_every=0), "NashMTL: update_weights_every should be at least 1; got 0"),
    ],
)
def test_wrong_options_are_refused_by_name(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_nash_mtl_of_another_number_of_tasks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"NashMTL, asked to aggregate the gradients of 3 tasks, failed: .*n_tasks=2"):
        rule_of(NashMTL(2))


def test_a_gramian_that_is_none_is_an_error_and_no_nan() -> None:
    with pytest.raises(ValueError, match="CAGrad: no weights found; the Gramian should be positive semidefinite"):
        CAGrad(0.5).gramian_weighting(torch.full((2, 2), torch.nan))


def test_reset_forgets_the_last_solution() -> None:
    aggregator, fresh = (NashMTL(T, update_weights_every=5) for _ in range(2))
    aggregator(gradients(0))
    assert not torch.equal(aggregator(gradients(1)), fresh(gradients(1)))
    aggregator.reset()
    fresh.reset()
    assert torch.equal(aggregator(gradients(2)), fresh(gradients(2)))


def test_they_work_without_the_packages_of_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    lacks = {"cvxpy", "ecos", "clarabel", "scipy", "qpsolvers", "quadprog"}
    find, imported = importlib.util.find_spec, builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.partition(".")[0] in lacks:
            raise ImportError(name)
        return imported(name, *rest)

    monkeypatch.setattr(torchjd._mixins, "find_spec", lambda name: None if name in lacks else find(name))
    monkeypatch.setattr(builtins, "__import__", refuse)
    for theirs in (jd.UPGrad, jd.DualProj, partial(jd.NashMTL, T), partial(jd.CAGrad, 0.5), partial(jd.FairGrad, 2.0)):
        with pytest.raises(ImportError):
            theirs()
    projecting = [strategies.UPGrad(), strategies.DualProj(), jd.CRMOGMWeighting(strategies.UPGradWeighting())]
    for ours in (*projecting, strategies.NashMTL(T), strategies.CAGrad(0.5), strategies.FairGrad(2.0), jd.MGDA()):
        rule = rule_of(ours)
        weigh(rule, gradients(0))
        assert rule.fallbacks == rule.handed_over == 0
