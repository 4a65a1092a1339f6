"""Common properties of ReLoBRaLo, SoftAdapt, SLAW and UW-SO: equations over 200 steps, states, and wild numbers."""

from __future__ import annotations

import copy
import io
import math
import random
from typing import Any

import pytest
import torch
from loss_rules import RULES, weights_of

from lightning_gradnorm.strategies import SLAW, UWSO, ReLoBRaLo, SoftAdapt
from lightning_gradnorm.strategies.rng import seeded_rng
from lightning_gradnorm.strategies.scalarization import ScalarizationRule

F64 = torch.float64
TASKS = ["seg", "depth", "normal", "edge"]
STEPS = 200
NO_NEGATIVES = ("ReLoBRaLo", "loss-weighted", "UWSO")
SUMS = {"ReLoBRaLo": 4.0, "SoftAdapt": 1.0, "SLAW": 4.0, "UWSO": 1.0}


def sum_of(name: str) -> float:
    return SUMS[name.partition(",")[0]]


def rule_of(name: str, dtype: torch.dtype = F64, seed: int = 3, order: list[int] | None = None) -> ScalarizationRule:
    return ScalarizationRule([TASKS[i] for i in order or range(4)], RULES[name].make(), seed=seed, dtype=dtype)


def losses_of(step: int) -> torch.Tensor:
    """They fall at different rates, from 0.3 to 30, with noise."""
    noise = torch.rand(4, generator=torch.Generator().manual_seed(step), dtype=F64)
    fall = torch.tensor([1.0, 0.99, 0.995, 1.002], dtype=F64) ** step
    return torch.tensor([0.3, 1.0, 3.0, 30.0], dtype=F64) * fall * (0.5 + noise)


@pytest.mark.parametrize("absence", [0.0, 0.3], ids=["all present", "some absent"])
@pytest.mark.parametrize("name", RULES)
def test_200_steps_follow_the_published_equations(name: str, absence: float) -> None:
    """An absent task enters with its last loss."""
    rule, weigh = rule_of(name), RULES[name].equations()
    draw, last, furthest = random.Random(1), losses_of(0), 0.0
    for step in range(STEPS):
        present = torch.tensor([step == 0 or draw.random() >= absence for _ in TASKS])
        losses = losses_of(step)
        last = torch.where(present, losses, last)
        with seeded_rng(3, step):
            expected = torch.tensor(weigh(last.tolist()), dtype=F64)
        found = rule.weigh(torch.where(present, losses, math.nan), present)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        furthest = max(furthest, float((found / found.mean() - 1).abs().max()))
    assert furthest > 1e-3, "all weights were equal all along"


@pytest.mark.parametrize("name", RULES)
def test_a_state_that_went_through_a_file_continues_bit_for_bit(name: str) -> None:
    rule = rule_of(name)
    for step in range(31):
        rule.weigh(losses_of(step))
    buffer = io.BytesIO()
    torch.save(rule.state_dict(), buffer)
    buffer.seek(0)
    other = rule_of(name, seed=99)  # the checkpoint's seed is in force
    other.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.random.fork_rng():
        for step in range(31, 60):
            torch.manual_seed(step)  # draws of the network between the steps
            assert torch.equal(rule.weigh(losses_of(step)), other.weigh(losses_of(step)))


@pytest.mark.parametrize("name", RULES)
def test_its_state_dict_and_reset_are_complete(name: str) -> None:
    one, fresh, again = (RULES[name].make().double() for _ in range(3))
    first = [weights_of(one, losses_of(step).tolist()) for step in range(9)]
    fresh.load_state_dict(one.state_dict())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = [weights_of(one, losses_of(step).tolist()) for step in range(9, 18)]
        torch.manual_seed(0)
        assert [weights_of(fresh, losses_of(step).tolist()) for step in range(9, 18)] == expected
        one.reset()
        torch.manual_seed(0)
        first = [weights_of(one, losses_of(step).tolist()) for step in range(9)]
        torch.manual_seed(0)
        assert [weights_of(again, losses_of(step).tolist()) for step in range(9)] == first


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("name", RULES)
def test_a_loss_that_is_not_finite_shows_in_the_total_and_is_forgotten(name: str, broken: float) -> None:
    scalarizer = RULES[name].make().double()
    for step in range(5):
        weights_of(scalarizer, losses_of(step).tolist())
    before = copy.deepcopy(scalarizer.state_dict())
    values = torch.tensor([1.0, broken, 2.0, 3.0], dtype=F64, requires_grad=True)
    total = scalarizer(values)
    total.backward()
    assert not math.isfinite(total.item())
    assert values.grad is not None
    assert values.grad.tolist() == [sum_of(name) / 4] * 4
    after = scalarizer.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("name", RULES)
def test_later_changes_to_the_losses_do_not_change_the_state(name: str) -> None:
    one, other = (RULES[name].make().double() for _ in range(2))
    with torch.random.fork_rng():
        for scalarizer in (one, other):
            torch.manual_seed(0)
            for step in range(5):
                losses = losses_of(step)
                scalarizer(losses)
                if scalarizer is one:
                    losses.zero_()
        assert weights_of(one, losses_of(5).tolist()) == weights_of(other, losses_of(5).tolist())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_losses_of_half_precision_are_weighed_in_single_precision(name: str, dtype: torch.dtype) -> None:
    half, single = RULES[name].make(), RULES[name].make()
    with torch.random.fork_rng():
        for step in range(8):
            losses = (100 * losses_of(step)).to(dtype)
            torch.manual_seed(step)
            total = half(losses)
            torch.manual_seed(step)
            assert total.item() == single(losses.float()).item()
            assert total.dtype == torch.float32
    assert all(buffer.dtype in (torch.float32, torch.int64) for buffer in half.buffers())


@pytest.mark.parametrize("name", [name for name in RULES if any(one in name for one in NO_NEGATIVES)])
def test_a_negative_loss_is_refused_by_name_where_it_has_no_meaning(name: str) -> None:
    scalarizer = RULES[name].make()
    scalarizer.name_tasks(["seg", "depth"])
    with pytest.raises(ValueError, match=r"no loss may be negative, since .*\[1.0, -1.0\] for \['seg', 'depth'\]"):
        scalarizer(torch.tensor([1.0, -1.0]))


@pytest.mark.parametrize("name", [name for name in RULES if name != "UWSO"])
def test_another_number_of_losses_is_refused_until_reset(name: str) -> None:
    scalarizer = RULES[name].make()
    scalarizer(torch.ones(2))
    with pytest.raises(ValueError, match=r"of 2 losses; got 3. Call reset\(\)"):
        scalarizer(torch.ones(3))
    scalarizer.reset()
    assert math.isfinite(scalarizer(torch.ones(3)).item())


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda: ReLoBRaLo(alpha=1.1), "alpha should be from 0 to 1; got 1.1"),
        (lambda: ReLoBRaLo(tau=0.0), "tau should be positive; got 0.0"),
        (lambda: ReLoBRaLo(rho=-0.1), "rho should be from 0 to 1; got -0.1"),
        (lambda: SoftAdapt(beta=math.inf), "beta should be finite; got inf"),
        (lambda: SoftAdapt(variant="plain"), "variant should be 'original', 'loss-weighted' or 'normalized'; got 'plain'"),  # type: ignore[arg-type]
        (lambda: SoftAdapt(order=0), "order should be a whole number of at least 1; got 0"),
        (lambda: SoftAdapt(update_every=1.5), "update_every should be a whole number"),  # type: ignore[arg-type]
        (lambda: SLAW(beta=1.0), "beta should be at least 0 and less than 1; got 1.0"),
        (lambda: SLAW(epsilon=0.0), "epsilon should be positive; got 0.0"),
        (lambda: UWSO(tau=-1.0), "tau should be positive; got -1.0"),
        (lambda: ReLoBRaLo(alpha="0.9"), "alpha should be from 0 to 1; got '0.9'"),  # type: ignore[arg-type]
        (lambda: SoftAdapt(beta="1"), "beta should be finite; got '1'"),  # type: ignore[arg-type]
        (lambda: SLAW(beta=None), "beta should be at least 0 and less than 1; got None"),  # type: ignore[arg-type]
        (lambda: UWSO(tau=[1.0]), r"tau should be positive; got \[1.0\]"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_an_invalid_option_is_an_error(made: Any, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        made()


# ---- wild numbers ------------------------------------------------------------------------------------------------------

SPECIAL = [0.0, 0.0, 0.0, math.nan, math.inf, 1e-30, 1e30, 5.0]
SEEDS = [pytest.param(range(2), id="400 steps"), pytest.param(range(2, 52), id="10,000 steps", marks=pytest.mark.slow)]


@pytest.mark.each_value_once
@pytest.mark.parametrize("seeds", SEEDS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("name", RULES)
def test_for_any_input_the_weights_are_finite_and_have_the_right_sum(
    name: str, dtype: torch.dtype, seeds: range
) -> None:
    """And the same for tasks in another order, and in a rule that is reloaded from its state."""
    happened = {"weighed": 0, "waiting": 0, "not finite": 0}
    negative = 0.0 if any(one in name for one in NO_NEGATIVES) else 0.2
    for seed in seeds:
        draw, order = random.Random(seed), random.Random(seed).sample(range(4), 4)
        rule, reordered, resumed = rule_of(name, dtype), rule_of(name, dtype, order=order), rule_of(name, dtype)
        for step in range(STEPS):
            wild, absence = draw.choice([0.0, 0.0, 0.3]), draw.choice([0.0, 0.5])
            present = torch.tensor([draw.random() >= absence for _ in TASKS])
            numbers = [
                draw.choice([*SPECIAL, 10 ** draw.uniform(-30, 30)]) if draw.random() < wild else ordinary
                for ordinary in losses_of(step).tolist()
            ]
            losses = torch.tensor([-one if draw.random() < negative else one for one in numbers], dtype=dtype)
            waits, before = bool(rule._losses.isnan().any()), rule.fallbacks
            weights = rule.weigh(losses, present).clone()
            assert bool(weights.isfinite().all()), f"seed {seed}, step {step}"
            assert bool((weights >= 0).all())
            if rule.fallbacks > before:
                happened["not finite"] += 1
                assert not bool(losses[present].isfinite().all()), "only such a loss may be bridged over"
            elif waits and bool(rule._losses.isnan().any()):
                happened["waiting"] += 1
                assert bool((weights == 1).all())
            else:
                happened["weighed"] += 1
                assert float(weights.sum()) == pytest.approx(
                    sum_of(name), rel=1e-5 if dtype == torch.float32 else 1e-12
                )
            state = rule.state_dict()["scalarizer"]["modules"][""]["buffers"]
            assert all(bool(buffer.isfinite().all()) for buffer in state.values())
            if dtype == F64:
                other = reordered.weigh(losses[order], present[order])
                torch.testing.assert_close(other, weights[order], rtol=1e-9, atol=1e-9)
            assert torch.equal(resumed.weigh(losses, present), weights)
            if draw.random() < 0.1:
                resumed = rule_of(name, dtype)
                resumed.load_state_dict(rule.state_dict())
    assert happened["weighed"] > 0.5 * len(seeds) * STEPS, happened
    assert happened["not finite"] > 0.02 * len(seeds) * STEPS, happened
