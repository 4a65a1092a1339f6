"""The rule by itself: properties that hold for any input."""

from __future__ import annotations

import io
import math
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_gradnorm.strategies.gradnorm import GradNormRule, gradnorm_terms

F64 = torch.float64
wild = st.one_of(
    st.floats(1e-30, 1e30),
    st.sampled_from([0.0, math.nan, math.inf, -math.inf, -1.0, 1e-30, 1e30]),
)
tame = st.floats(1e-3, 1e3)
optimizers = st.one_of(
    st.floats(1e-6, 1e3).map(lambda lr: partial(torch.optim.Adam, lr=lr)),
    st.floats(1e-6, 1e3).map(lambda lr: partial(torch.optim.SGD, lr=lr)),
    st.floats(1e-6, 1e3).map(lambda lr: partial(torch.optim.SGD, lr=lr, momentum=0.9)),
)
alphas = st.one_of(st.just(0.0), st.floats(0.0, 3.0))


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=F64)


def names(T: int) -> list[str]:
    return [f"task{i}" for i in range(T)]


@st.composite
def numbers(draw: Any, values: Any, T: int, steps: int) -> list[tuple[list[float], list[float], list[bool]]]:
    vector = st.lists(values, min_size=T, max_size=T)
    present = st.one_of(st.just([True] * T), st.lists(st.booleans(), min_size=T, max_size=T))
    return [(draw(vector), draw(vector), draw(present)) for _ in range(steps)]


def now(rule: GradNormRule) -> Tensor:
    """The current weights, as plain numbers."""
    return rule.weights.detach().clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data(), T=st.integers(2, 40), optimizer=optimizers, alpha=alphas)
def test_weights_are_always_positive_and_sum_to_T(
    dtype: torch.dtype, data: Any, T: int, optimizer: Any, alpha: float
) -> None:
    given_initial = dict.fromkeys(names(T), 1.0)
    rule = GradNormRule(names(T), alpha=alpha, optimizer=optimizer, initial_losses=given_initial, dtype=dtype)
    for norms, losses, present in data.draw(numbers(wild, T, 4)):
        rule.step(torch.tensor(norms, dtype=dtype), torch.tensor(losses, dtype=dtype), torch.tensor(present))
        assert now(rule).dtype == dtype
        assert bool(torch.isfinite(now(rule)).all())
        assert bool((now(rule) > 0).all()), now(rule)
        assert float(now(rule).double().sum()) == pytest.approx(T, rel=1e-5 if dtype == torch.float32 else 1e-9)


@given(data=st.data(), T=st.integers(2, 40), optimizer=optimizers, alpha=alphas, floor=st.floats(1e-6, 0.9))
def test_no_weight_falls_below_the_floor_by_more_than_the_last_scaling(
    data: Any, T: int, optimizer: Any, alpha: float, floor: float
) -> None:
    rule = GradNormRule(names(T), alpha=alpha, optimizer=optimizer, min_weight=floor, dtype=F64)
    for norms, losses, _ in data.draw(numbers(tame, T, 5)):
        rule.step(tensor(norms), tensor(losses))
        # w <- T w / sum(w) keeps ratios, and before it every weight was at least the floor
        assert float(now(rule).min()) > 0.0
        assert float(now(rule).sum()) == pytest.approx(T, rel=1e-9)


@given(data=st.data(), T=st.integers(2, 12), optimizer=optimizers, alpha=alphas)
def test_permuting_the_tasks_permutes_the_weights(data: Any, T: int, optimizer: Any, alpha: float) -> None:
    order = data.draw(st.permutations(range(T)))
    priorities = dict(zip(names(T), data.draw(st.lists(tame, min_size=T, max_size=T)), strict=True))
    rule = GradNormRule(names(T), alpha=alpha, optimizer=optimizer, priorities=priorities, dtype=F64)
    other = GradNormRule(
        [names(T)[i] for i in order], alpha=alpha, optimizer=optimizer, priorities=priorities, dtype=F64
    )
    for norms, losses, present in data.draw(numbers(tame, T, 4)):
        step = rule.step(tensor(norms), tensor(losses), torch.tensor(present))
        if step.taken:
            seen = step.terms
            # where G_i meets its target the sign depends on rounding, and so on the order of a sum
            distance = (seen.grad_norms - seen.targets).abs() / seen.targets
            here = distance[torch.tensor(present)]
            alone = sum(present) <= 1
            assume(alone or bool((here > 1e-9).all()))
        other.step(tensor(norms)[list(order)], tensor(losses)[list(order)], torch.tensor(present)[list(order)])
        torch.testing.assert_close(now(other), now(rule)[list(order)], rtol=1e-8, atol=1e-10)


@given(data=st.data(), T=st.integers(2, 12), alpha=alphas)
def test_the_closed_form_is_the_gradient_autograd_finds(data: Any, T: int, alpha: float) -> None:
    vector = st.lists(tame, min_size=T, max_size=T)
    w, n, L, L0, p = (tensor(data.draw(vector)) for _ in range(5))
    p = p / p.mean()
    w.requires_grad_()
    G = w * n
    r = (L / L0) / (L / L0).mean()
    target = (G.mean() * p * r**alpha).detach()
    assume(bool(((G.detach() - target).abs() > 1e-9 * target).all()))
    objective = (G - target).abs().sum()
    (expected,) = torch.autograd.grad(objective, w)

    found = gradnorm_terms(w.detach(), n, L, L0, alpha, p)

    torch.testing.assert_close(found.gradient, expected, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(found.loss, objective.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.grad_norms, G.detach(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(found.rates, r, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(found.targets, target, rtol=1e-12, atol=0.0)
    assert float(found.rates.sum()) == pytest.approx(T, rel=1e-9)


def test_a_norm_at_its_target_pulls_neither_way() -> None:
    one = torch.ones(3, dtype=F64)
    assert gradnorm_terms(one, one, one, one, 1.5, one).gradient.tolist() == [0.0, 0.0, 0.0]


def test_a_slow_task_gets_more_weight_and_a_fast_one_less() -> None:
    one = torch.ones(2, dtype=F64)
    rule = GradNormRule(["slow", "fast"], alpha=1.5, initial_losses={"slow": 1.0, "fast": 1.0}, dtype=F64)
    rule.step(one, tensor([0.9, 0.1]))
    assert now(rule)[0] > 1.0 > now(rule)[1]


@settings(max_examples=5)
@given(data=st.data(), T=st.integers(2, 6))
def test_without_asymmetry_the_weights_settle_where_all_gradients_are_equal(data: Any, T: int) -> None:
    norms = tensor(data.draw(st.lists(st.floats(0.3, 3.0), min_size=T, max_size=T)))
    rule = GradNormRule(names(T), alpha=0.0, optimizer=partial(torch.optim.SGD, lr=5e-3), dtype=F64)
    for _ in range(800):
        rule.step(norms, torch.ones(T, dtype=F64))
    expected = T * (1 / norms) / (1 / norms).sum()
    torch.testing.assert_close(now(rule), expected, rtol=0.0, atol=0.05)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("what", ["norms", "losses"])
@pytest.mark.parametrize("initial", [1, 3])
def test_a_number_that_is_not_finite_changes_nothing(what: str, value: float, initial: int) -> None:
    def run(poisoned: bool) -> tuple[list[float], GradNormRule]:
        rule = GradNormRule(names(3), initial_losses=initial, dtype=F64)
        generator = torch.Generator().manual_seed(3)
        for step in range(8):
            norms, losses = (torch.rand(3, generator=generator, dtype=F64) + 0.1 for _ in range(2))
            if poisoned and step in (0, 1, 4):
                bad = {"norms": norms.clone(), "losses": losses.clone()}
                bad[what][1] = value
                before = now(rule)
                seen = rule.step(bad["norms"], bad["losses"])
                assert not seen.taken
                assert list(rule.tasks_at_fault) == ["task1"]
                assert torch.equal(now(rule), before)
            rule.step(norms, losses)
        return now(rule).tolist(), rule

    clean, _ = run(False)
    poisoned, rule = run(True)
    assert poisoned == clean, "L(0) and the optimizer's state too are those of a run without the bad steps"
    assert int(rule.skipped) == 3


def test_numbers_of_an_absent_task_are_not_looked_at() -> None:
    rule = GradNormRule(names(3), dtype=F64)
    seen = rule.step(tensor([1.0, math.nan, 3.0]), tensor([1.0, math.inf, 1.0]), torch.tensor([True, False, True]))
    assert seen.taken
    assert now(rule)[1] == 1.0


@given(data=st.data(), T=st.integers(2, 20), optimizer=optimizers, alpha=alphas)
def test_an_absent_task_keeps_its_weight(data: Any, T: int, optimizer: Any, alpha: float) -> None:
    rule = GradNormRule(names(T), alpha=alpha, optimizer=optimizer, dtype=F64)
    for norms, losses, present in data.draw(numbers(tame, T, 5)):
        before = now(rule)
        rule.step(tensor(norms), tensor(losses), torch.tensor(present))
        absent = ~torch.tensor(present)
        assert torch.equal(now(rule)[absent], before[absent])
        assert float(now(rule).sum()) == pytest.approx(T, rel=1e-9)
        if not any(present):
            assert torch.equal(now(rule), before)


@given(data=st.data(), T=st.integers(3, 8), alpha=alphas)
def test_present_tasks_are_balanced_as_if_they_were_alone(data: Any, T: int, alpha: float) -> None:
    """With plain SGD there is no state: the direction of the present ones is that of a rule without the absent one."""
    (norms, losses, _), *_ = data.draw(numbers(tame, T, 1))
    n, L = tensor(norms), tensor(losses)
    sgd = partial(torch.optim.SGD, lr=1e-5)
    initial = dict.fromkeys(names(T), 1.0)
    some = GradNormRule(names(T), alpha=alpha, optimizer=sgd, initial_losses=initial, dtype=F64)
    present = torch.ones(T, dtype=torch.bool)
    present[-1] = False
    found = some.step(n, L, present)
    del initial[names(T)[-1]]
    alone = GradNormRule(names(T)[:-1], alpha=alpha, optimizer=sgd, initial_losses=initial, dtype=F64)
    expected = alone.step(n[:-1], L[:-1])

    assert found.taken
    assert expected.taken
    found, expected = found.terms, expected.terms
    distance = (expected.grad_norms - expected.targets).abs() / expected.targets
    assume(bool((distance > 1e-9).all()))
    torch.testing.assert_close(now(some)[:-1], now(alone), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found.rates[:-1], expected.rates, rtol=1e-9, atol=0.0)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-9, atol=1e-12)


def test_a_task_first_seen_late_starts_from_its_own_first_loss() -> None:
    rule = GradNormRule(names(2), dtype=F64)
    rule.step(tensor([1.0, 1.0]), tensor([4.0, 1.0]), torch.tensor([True, False]))
    seen = rule.step(tensor([1.0, 1.0]), tensor([2.0, 7.0]))
    assert seen.taken
    # ratios 2/4 and 7/7
    torch.testing.assert_close(seen.terms.rates, tensor([0.5, 1.0]) / 0.75, rtol=1e-12, atol=0.0)


def test_the_optimizer_holds_the_renormalized_weights() -> None:
    """With SGD the next step starts from `w` scaled to sum T, not from the raw one."""
    lr, norms, losses = 0.1, tensor([1.0, 3.0]), torch.ones(2, dtype=F64)
    rule = GradNormRule(["a", "b"], alpha=0.0, optimizer=partial(torch.optim.SGD, lr=lr), dtype=F64)
    w = torch.ones(2, dtype=F64)
    for _ in range(5):
        G = w * norms
        w = w - lr * torch.sign(G - G.mean()) * norms
        w = 2 * w.clamp(min=1e-4) / w.clamp(min=1e-4).sum()
        rule.step(norms, losses)
        torch.testing.assert_close(now(rule), w, rtol=1e-12, atol=0.0)


def test_adam_keeps_its_moments_from_step_to_step() -> None:
    """A new Adam in each step would move every weight by exactly lr."""
    rule = GradNormRule(["a", "b"], alpha=0.0, dtype=F64)
    w = torch.ones(2, dtype=F64, requires_grad=True)
    adam = torch.optim.Adam([w], lr=0.025)
    generator = torch.Generator().manual_seed(0)
    for _ in range(12):
        norms = torch.rand(2, generator=generator, dtype=F64) + 0.5
        G = w.detach() * norms
        w.grad = torch.sign(G - G.mean()) * norms
        adam.step()
        with torch.no_grad():
            w.mul_(2 / w.sum())
        rule.step(norms, torch.ones(2, dtype=F64))
        torch.testing.assert_close(now(rule), w.detach(), rtol=1e-12, atol=0.0)


@pytest.mark.parametrize(
    "optimizer", [partial(torch.optim.Adam, lr=0.025), partial(torch.optim.SGD, lr=0.1, momentum=0.9)]
)
@pytest.mark.parametrize("reverse", [False, True])
def test_state_goes_through_a_safe_load_and_is_matched_by_name(reverse: bool, optimizer: Any) -> None:
    def fresh(order: list[str]) -> GradNormRule:
        return GradNormRule(order, initial_losses=3, optimizer=optimizer, dtype=F64)

    generator = torch.Generator().manual_seed(1)
    steps = [
        (torch.rand(3, generator=generator, dtype=F64), torch.rand(3, generator=generator, dtype=F64)) for _ in range(8)
    ]
    whole, first = fresh(names(3)), fresh(names(3))
    for norms, losses in steps:
        whole.step(norms, losses)
        whole.count_step()
    for norms, losses in steps[:2]:
        first.step(norms, losses)
        first.count_step()
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    buffer.seek(0)
    order = names(3)[::-1] if reverse else names(3)
    index = [names(3).index(name) for name in order]
    second = fresh(order)
    second.load_state_dict(torch.load(buffer, weights_only=True))
    for norms, losses in steps[2:]:
        second.step(norms[index], losses[index])
        second.count_step()

    tolerance = {"rtol": 0.0, "atol": 1e-12 if reverse else 0.0}  # reversed sums round differently
    torch.testing.assert_close(now(second), now(whole)[index], **tolerance)
    torch.testing.assert_close(second.mean_weights, whole.mean_weights[index], **tolerance)


def test_state_of_other_tasks_is_refused_with_both_sets() -> None:
    state = GradNormRule(["seg", "depth"]).state_dict()
    with pytest.raises(ValueError, match="depth") as error:
        GradNormRule(["seg", "normal"]).load_state_dict(state)
    assert "normal" in str(error.value)


@pytest.mark.parametrize("alpha", [0.12, 1.5])
def test_as_long_as_a_task_has_only_shown_zeros_the_weights_wait(alpha: float) -> None:
    rule = GradNormRule(["seg", "depth"], alpha=alpha, dtype=F64)
    norms = torch.tensor([1.0, 2.0], dtype=F64)
    for loss in (4.0, 3.0):
        assert not rule.step(norms, torch.tensor([loss, 0.0], dtype=F64)).taken
    assert rule.skipped == 2
    assert now(rule).tolist() == [1.0, 1.0]
    assert rule.tasks_at_fault == {"depth": 0.0}
    assert any("the loss of task 'depth' has been 0 from the start" in remark for remark in rule.remarks.values())
    # From its first positive loss on it is as if these had been given: the first loss of each task.
    rule.step(norms, torch.tensor([2.0, 0.5], dtype=F64))
    rule.step(norms, torch.tensor([1.0, 0.0], dtype=F64))  # by now a loss of 0 is one like any other
    other = GradNormRule(["seg", "depth"], alpha=alpha, initial_losses={"seg": 4.0, "depth": 0.5}, dtype=F64)
    other.step(norms, torch.tensor([2.0, 0.5], dtype=F64))
    other.step(norms, torch.tensor([1.0, 0.0], dtype=F64))
    assert now(rule).tolist() == now(other).tolist()
    assert rule.skipped == 2


def test_some_initial_losses_may_be_given_and_the_others_are_the_first() -> None:
    norms, losses = torch.tensor([1.0, 2.0], dtype=F64), torch.tensor([3.0, 0.7], dtype=F64)
    some = GradNormRule(["seg", "depth"], initial_losses={"depth": 0.5}, dtype=F64)
    all_given = GradNormRule(["seg", "depth"], initial_losses={"seg": 3.0, "depth": 0.5}, dtype=F64)
    for rule in (some, all_given):
        rule.step(norms, losses)
        rule.step(norms, losses / 2)
    assert now(some).tolist() == now(all_given).tolist()


@pytest.mark.parametrize("optimizer", [partial(torch.optim.Adam, lr=50.0), partial(torch.optim.SGD, lr=1e6)])
def test_a_huge_learning_rate_leaves_positive_weights(optimizer: Any) -> None:
    rule = GradNormRule(names(4), optimizer=optimizer, dtype=F64)
    generator = torch.Generator().manual_seed(2)
    for _ in range(50):
        rule.step(torch.rand(4, generator=generator, dtype=F64), torch.rand(4, generator=generator, dtype=F64) + 0.1)
        assert float(now(rule).min()) > 0.0
        assert float(now(rule).sum()) == pytest.approx(4.0, rel=1e-12)


# ---- what the engine asks, and arguments -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": -1}, "alpha should be a finite number, at least 0; got -1"),
        ({"alpha": math.nan}, "alpha should be a finite number, at least 0; got nan"),
        ({"alpha": math.inf}, "alpha should be a finite number, at least 0; got inf"),
        ({"alpha": "1.5"}, "alpha should be a finite number, at least 0; got '1.5'"),
        ({"min_weight": 0.0}, "min_weight should be a number between 0 and 1; got 0.0"),
        ({"min_weight": 1}, "min_weight should be a number between 0 and 1; got 1"),
        ({"update_every": 0}, "update_every should be an integer, at least 1; got 0"),
        ({"update_every": True}, "update_every should be an integer, at least 1; got True"),
        ({"stop_after": -1}, "stop_after should be None or an integer, at least 0; got -1"),
        ({"optimizer": 0.025}, "optimizer should be a callable such as .*; got 0.025"),
        ({"initial_losses": 0}, "initial_losses should be a number of updates, at least 1, or a mapping .*; got 0"),
        ({"initial_losses": None}, "initial_losses should be a number of updates, at least 1, .*; got None"),
        ({"initial_losses": {"seg": 1.0, "depth": 0.0}}, r"initial_losses\['depth'\] should be positive and finite"),
        ({"initial_weights": [1.0, 2.0]}, r"initial_weights should be a mapping from task to number; got \[1.0, 2.0\]"),
        ({"initial_weights": {}}, "initial_weights should name every task"),
        ({"priorities": {"seg": 1.0, "deph": 1.0}}, "priorities names 'deph', .* did you mean 'depth'?"),
        (
            {"priorities": {"seg": 1.0, "depth": math.inf}},
            r"priorities\['depth'\] should be positive and finite; got inf",
        ),
    ],
)
def test_an_argument_out_of_range_is_an_error(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^GradNormRule: {message}"):
        GradNormRule(["seg", "depth"], **options)


@pytest.mark.parametrize(
    ("tasks", "kind", "message"),
    [
        (["seg"], ValueError, "tasks should name at least two tasks"),
        (["seg", "seg"], ValueError, "tasks should all be different"),
        ("seg", TypeError, "tasks should be a list of names, such as .*; got 'seg'"),
        ([1, 2], TypeError, "tasks should be a list of names"),
    ],
)
def test_tasks_are_at_least_two_different_names(tasks: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"^GradNormRule: {message}"):
        GradNormRule(tasks)


@pytest.mark.parametrize(
    ("every", "stop", "expected"),
    [
        (1, None, [0, 1, 2, 3, 4, 5, 6, 7]),
        (3, None, [0, 3, 6]),
        (1, 2, [0, 1]),
        (2, 5, [0, 2, 4]),
        (1, 0, []),
    ],
)
def test_it_measures_every_n_steps_and_not_after_the_last(every: int, stop: int | None, expected: list[int]) -> None:
    rule = GradNormRule(names(2), update_every=every, stop_after=stop)
    measured = []
    for step in range(8):
        if rule.should_measure:
            measured.append(step)
            rule.step(torch.ones(2), torch.ones(2))
        rule.count_step()
        rule.discard_step()
    assert measured == expected
    resumed = GradNormRule(names(2), update_every=every, stop_after=stop)
    resumed.load_state_dict(rule.state_dict())
    assert resumed.steps == 8
    assert resumed.should_measure == rule.should_measure


def test_the_weights_of_the_losses_are_detached_and_those_in_force() -> None:
    rule = GradNormRule(names(2), alpha=0.0)
    rule.step(tensor([1.0, 3.0]), torch.ones(2))
    assert not rule.loss_weights.requires_grad
    assert rule.loss_weights.equal(rule.weights)


adam = partial(torch.optim.Adam, lr=0.1)
optimizers_with_state = [adam, partial(torch.optim.AdamW, lr=0.1), partial(torch.optim.SGD, lr=0.1, momentum=0.9)]


def ten_steps(rule: GradNormRule, seed: int) -> None:
    for numbers in torch.rand(10, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(seed)) + 0.1:
        rule.step(*numbers)
        rule.count_step()


def tensors_of(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    parts = state.values() if isinstance(state, dict) else state if isinstance(state, list) else []
    return [found for part in parts for found in tensors_of(part)]


@pytest.mark.parametrize("optimizer", optimizers_with_state)
def test_moving_to_float64_and_back_keeps_every_value(optimizer: Any) -> None:
    rule = GradNormRule(names(3), optimizer=optimizer, priorities=dict(zip(names(3), [1, 2, 4], strict=True)))
    ten_steps(rule, seed=0)
    weights, before = rule.weights, rule.state_dict()
    rule.to(dtype=F64)
    assert rule.weights is weights, "whoever holds the parameter keeps it"
    assert rule.last is not None
    assert rule.last.terms.grad_norms.dtype == F64
    for one, other in zip(tensors_of(before), tensors_of(rule.state_dict()), strict=True):
        assert one.double().equal(other.double())
    assert all(one.dtype == F64 for one in tensors_of(rule.state_dict()) if one.ndim)
    rule.to(dtype=torch.float32)
    for one, other in zip(tensors_of(before), tensors_of(rule.state_dict()), strict=True):
        assert one.equal(other)
        assert one.dtype == other.dtype
    other = GradNormRule(names(3), optimizer=optimizer, priorities=dict(zip(names(3), [1, 2, 4], strict=True)))
    other.load_state_dict(before)
    for one in (rule, other):
        ten_steps(one, seed=1)
    assert rule.weights.equal(other.weights)


@pytest.mark.parametrize("optimizer", optimizers_with_state)
def test_a_fresh_rule_moved_to_float64_is_one_made_there(optimizer: Any) -> None:
    def given(*numbers: float) -> dict[str, float]:
        return dict(zip(names(3), numbers, strict=True))

    options: dict[str, Any] = {
        "optimizer": optimizer,
        "initial_losses": given(0.1, 0.7, 1.3),
        "initial_weights": given(0.3, 1.1, 2.7),
        "priorities": given(0.1, 0.2, 0.4),
    }
    moved, made = GradNormRule(names(3), **options), GradNormRule(names(3), dtype=F64, **options)
    moved.to(dtype=F64)
    for rule in (moved, made):
        ten_steps(rule, seed=0)
    assert moved.weights.equal(made.weights)
    assert moved.mean_weights.equal(made.mean_weights)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("optimizer", optimizers_with_state)
def test_moving_to_a_gpu_and_back_moves_all_tensors_and_keeps_every_value(optimizer: Any) -> None:
    rule, stays = (GradNormRule(names(3), optimizer=optimizer) for _ in range(2))
    for one in (rule, stays):
        ten_steps(one, seed=0)
    before = rule.state_dict()
    rule.to(device="cuda")
    held = [value for value in vars(rule).values() if isinstance(value, Tensor)]
    held += [value for value in vars(rule._step).values() if isinstance(value, Tensor)]
    held += [value for value in rule._step._state_tensors().values() if value.ndim]
    assert len(held) > 5
    assert {value.device.type for value in held} == {"cuda"}
    assert rule.last is not None
    assert rule.last.losses.is_cuda
    assert not rule.syncs_every_step
    for one, other in zip(tensors_of(before), tensors_of(rule.state_dict()), strict=True):
        assert one.equal(other.cpu())
    rule.to(device="cpu")
    for one in (rule, stays):
        ten_steps(one, seed=1)
    assert rule.weights.equal(stays.weights)
