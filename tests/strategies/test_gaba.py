"""GABA against its Equations 4 to 6 in plain floats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_gradnorm.strategies import GABA

F64 = torch.float64


def gramian_of(norms: list[float], n: int = 7, seed: int = 0) -> Tensor:
    """Of gradients with these norms, in directions that are not orthogonal."""
    directions = torch.randn(len(norms), n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    gradients = directions / directions.norm(dim=1, keepdim=True) * torch.tensor(norms, dtype=F64)[:, None]
    return gradients @ gradients.T


def by_hand(steps: list[list[float]], beta: float, floor: float, warmup: int) -> list[float]:
    K = len(steps[0])
    average = [1 / K] * K
    for norms in steps[warmup:]:
        total = sum(norms)
        average = [beta * a + (1 - beta) * (total - g) / ((K - 1) * total) for a, g in zip(average, norms, strict=True)]
    floored = [max(a, floor) for a in average]
    return [a / sum(floored) for a in floored]


@pytest.mark.parametrize("T", [2, 3, 8])
@pytest.mark.parametrize(("beta", "floor", "warmup"), [(0.0, 0.0, 0), (0.9, 0.05, 0), (0.99, 0.1, 3), (0.5, 0.12, 2)])
def test_weights_match_the_equations_at_every_step(T: int, beta: float, floor: float, warmup: int) -> None:
    generator = torch.Generator().manual_seed(T)
    gaba, steps = GABA(beta, floor, warmup), []
    for t in range(12):
        steps.append((10 ** torch.empty(T, dtype=F64).uniform_(-4, 3, generator=generator)).tolist())
        weights = gaba(gramian_of(steps[-1], seed=t))
        expected = [1 / T] * T if t < warmup else by_hand(steps, beta, floor, warmup)
        assert weights.tolist() == pytest.approx(expected, abs=1e-12)


def test_two_tasks_contribute_equally() -> None:
    weights = GABA(beta=0.0, floor=0.0, warmup=0)(gramian_of([5.0, 0.01]))
    assert weights.tolist() == pytest.approx([0.01 / 5.01, 5.0 / 5.01], abs=1e-12)
    assert weights[0].item() * 5.0 == pytest.approx(weights[1].item() * 0.01, abs=1e-12)


def test_the_floor_holds_a_weight_up_before_they_are_scaled_to_sum_one() -> None:
    weights = GABA(beta=0.0, floor=0.05, warmup=0)(gramian_of([500.0, 1.0]))
    large = 500 / 501
    assert weights.tolist() == pytest.approx([0.05 / (0.05 + large), large / (0.05 + large)], abs=1e-12)


def test_warmup_is_uniform_and_its_observations_are_forgotten() -> None:
    gaba = GABA(beta=0.5, warmup=4)
    for t in range(4):
        assert gaba(gramian_of([1000.0, 1.0, float(t)])).tolist() == [1 / 3] * 3
    fresh = GABA(beta=0.5, warmup=0)
    assert gaba(gramian_of([1.0, 2.0, 3.0])).equal(fresh(gramian_of([1.0, 2.0, 3.0])))


def test_norms_of_zero_and_a_single_task_have_weights() -> None:
    gaba = GABA(beta=0.0, floor=0.0, warmup=0)
    assert gaba(torch.zeros(3, 3)).tolist() == pytest.approx([1 / 3] * 3)
    assert gaba(torch.diag(torch.tensor([1.0, 0.0, 0.0]))).tolist() == [0.0, 0.5, 0.5]
    assert GABA(warmup=0)(torch.tensor([[9.0]])).tolist() == [1.0]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_norms_that_are_not_finite_leave_the_average_as_it_is(broken: float) -> None:
    gaba = GABA(beta=0.5, warmup=0)
    before = gaba(gramian_of([1.0, 2.0]))
    assert gaba(torch.diag(torch.tensor([broken, 1.0], dtype=F64))).equal(before)


def test_state_dict_carries_everything_into_a_fresh_object() -> None:
    gaba, fresh = GABA(warmup=2), GABA(warmup=2)
    for t in range(5):
        gaba(gramian_of([1.0, 10.0, 3.0], seed=t))
    fresh.load_state_dict(gaba.state_dict())
    assert fresh(gramian_of([3.0, 2.0, 1.0])).equal(gaba(gramian_of([3.0, 2.0, 1.0])))
    gaba.reset()
    again, first = gaba(gramian_of([3.0, 2.0])), GABA(warmup=2)(gramian_of([3.0, 2.0]))
    assert again.equal(first)


def test_mistakes_are_named() -> None:
    for arguments, says in (({"beta": 1.0}, "beta"), ({"floor": -0.1}, "floor"), ({"warmup": -1}, "warmup")):
        with pytest.raises(ValueError, match=says):
            GABA(**arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"30 weights .* Use floor=0.0333 or less"):
        GABA(floor=0.05)(torch.eye(30))
    gaba = GABA()
    gaba(torch.eye(2))
    with pytest.raises(ValueError, match=r"of 2 tasks, the Gramian of 3. Call reset"):
        gaba(torch.eye(3))
