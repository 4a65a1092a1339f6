"""DB-MTL against its algorithm, written out in NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_gradnorm.strategies import DBMTL, DBMTLWeighting, LogSum

F64 = torch.float64


def matrices(steps: int, T: int = 3, n: int = 11) -> list[Tensor]:
    generator = torch.Generator().manual_seed(steps)
    scales = 10 ** torch.empty(steps, T, 1, dtype=F64).uniform_(-3, 2, generator=generator)
    return list(torch.randn(steps, T, n, dtype=F64, generator=generator) * scales)


@pytest.mark.parametrize(("beta", "sigma"), [(0.0, 0.0), (0.9, 0.0), (0.9, 0.5), (0.5, 2.0)])
def test_directions_match_the_algorithm_at_every_step(beta: float, sigma: float) -> None:
    aggregator, average = DBMTL(beta, sigma), np.zeros((3, 11))
    for t, matrix in enumerate(matrices(8), start=1):
        now = beta / t**sigma
        average = now * average + (1 - now) * matrix.numpy()
        norms = np.sqrt((average**2).sum(axis=1))
        expected = sum(norms.max() / norms[i] * average[i] for i in range(3))
        direction = aggregator(matrix).numpy()
        assert np.abs(direction - expected).max() <= 1e-10 * np.abs(expected).max()


def test_without_memory_every_task_pulls_with_the_norm_of_the_largest() -> None:
    matrix = matrices(1)[0]
    weights = DBMTLWeighting()(matrix @ matrix.T)
    norms = (weights[:, None] * matrix).norm(dim=1)
    assert norms.tolist() == pytest.approx([matrix.norm(dim=1).max().item()] * 3, rel=1e-12)
    assert torch.allclose(DBMTL(beta=0.0)(matrix), weights @ matrix, rtol=1e-12, atol=0)


def test_a_gradient_of_zero_stays_zero() -> None:
    assert DBMTL(beta=0.0)(torch.tensor([[0.0, 0.0], [3.0, 4.0]])).tolist() == [3.0, 4.0]
    assert DBMTL()(torch.zeros(2, 3)).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_not_hidden_nor_remembered(broken: float) -> None:
    aggregator, untouched = DBMTL(), DBMTL()
    first, second = matrices(2)
    for one in (aggregator, untouched):
        one(first)
    assert not aggregator(torch.full_like(first, broken)).isfinite().any()
    assert aggregator(second).equal(untouched(second))


def test_the_logarithms_gradient_is_one_over_the_loss() -> None:
    losses = torch.tensor([2000.0, 1e-3, 0.7], dtype=F64, requires_grad=True)
    total = LogSum()(losses)
    total.backward()
    assert total.item() == pytest.approx(sum(math.log(L + 1e-8) for L in losses.tolist()), abs=1e-12)
    assert losses.grad is not None
    assert losses.grad.tolist() == pytest.approx([1 / (L + 1e-8) for L in losses.tolist()], rel=1e-12)
    assert LogSum()(torch.zeros(1, dtype=F64)).item() == pytest.approx(math.log(1e-8))


def test_both_parts_do_not_care_for_the_scale_of_a_loss() -> None:
    x = torch.randn(5, dtype=F64, generator=torch.Generator().manual_seed(0))

    def direction(scales: tuple[float, float]) -> Tensor:
        parameters = torch.ones(5, dtype=F64, requires_grad=True)
        losses = [scales[0] * (parameters * x).square().sum(), scales[1] * (parameters - 2 * x).abs().sum()]
        rows = [
            torch.autograd.grad(LogSum(epsilon=0.0)(one.reshape(1)), parameters, retain_graph=True)[0] for one in losses
        ]
        return DBMTL()(torch.stack(rows))

    assert torch.allclose(direction((1.0, 1.0)), direction((1e4, 1e-3)), rtol=1e-10, atol=0)


def test_state_dict_carries_the_average_into_a_fresh_object_and_reset_forgets_it() -> None:
    aggregator, fresh = DBMTL(sigma=0.5), DBMTL(sigma=0.5)
    *past, now = matrices(5)
    for matrix in past:
        aggregator(matrix)
    fresh.load_state_dict(aggregator.state_dict())
    assert fresh(now).equal(aggregator(now))
    aggregator.reset()
    assert aggregator(now[:2, :4]).equal(DBMTL(sigma=0.5)(now[:2, :4]))


def test_the_error_for_a_representation_that_changes_its_size_suggests_a_fix() -> None:
    aggregator = DBMTL()
    aggregator(torch.ones(2, 8))
    with pytest.raises(ValueError, match=r"at='parameters'\), or nothing \(beta=0\)"):
        aggregator(torch.ones(2, 6))
    free = DBMTL(beta=0.0)
    free(torch.ones(2, 8))
    free(torch.ones(2, 6))


def test_mistakes_are_named() -> None:
    for make in (lambda: DBMTL(beta=1.0), lambda: DBMTL(sigma=-1.0), lambda: LogSum(epsilon=-1.0)):
        with pytest.raises(ValueError, match="should"):
            make()
    with pytest.raises(ValueError, match="should be positive"):
        LogSum()(torch.tensor([1.0, -1.0]))
