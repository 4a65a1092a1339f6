"""Each row of J is one task's gradient, in the order of the tasks, and each weight goes to the row of its task."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchjd.aggregation import MGDA

from lightning_gradnorm.gradients import JointGradients, fan_out
from lightning_gradnorm.strategies import AggregationRule

TASKS = ["a", "b", "c"]
WEIGHTS = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
@pytest.mark.parametrize("present", [TASKS, ["a", "c"]])
def test_rows_are_the_gradients_of_the_tasks_in_their_order(order: list[int], present: list[str]) -> None:
    """Heads may be called in any order."""
    tasks = [TASKS[i] for i in order]
    seen: list[Tensor] = []
    trunk, x = nn.Linear(3, 4).double(), torch.randn(2, 3, dtype=torch.float64)
    heads = {task: nn.Linear(4, 1).double() for task in TASKS}
    gate = JointGradients(trunk, "the representation", tasks, lambda J: (seen.append(J.clone()), WEIGHTS @ J)[1])
    branches = fan_out(z := gate.forward_post(trunk(x)), present, gate.read)
    assert z.requires_grad
    loss = torch.stack([heads[task](branches[task]).square().mean() for task in present]).sum()
    gate.begin(loss)
    loss.backward()
    gate.on_backward_end()
    z = trunk(x)
    expected = torch.zeros(3, z.numel(), dtype=torch.float64)
    for row, task in enumerate(tasks):
        if task in present:
            (gradient,) = torch.autograd.grad(heads[task](z).square().mean(), z, retain_graph=True)
            expected[row] = gradient.flatten()
    torch.testing.assert_close(seen[0], expected, rtol=1e-12, atol=1e-14)
    (weighted,) = torch.autograd.grad(z, trunk.weight, (WEIGHTS @ expected).view_as(z))
    torch.testing.assert_close(trunk.weight.grad, weighted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("absent", [None, 0, 1, 2])
def test_weights_of_a_gramian_belong_to_the_tasks_that_are_present(absent: int | None) -> None:
    """The shortest sum of orthogonal gradients weighs each by the inverse of its square."""
    squares = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    present = torch.tensor([i != absent for i in range(3)])
    inverse = torch.where(present, 1 / squares, 0.0)
    rule = AggregationRule(TASKS, MGDA(epsilon=1e-12, max_iters=2000), dtype=torch.float64)
    found = rule.weigh_gradients(torch.where(present, squares, 0.0).diag(), present)
    torch.testing.assert_close(found, inverse / inverse.sum(), rtol=0.0, atol=1e-3)  # MGDA comes near it step by step
    if absent is not None:
        assert found[absent] == 0
