"""The means of one optimizer step: for each task over the batches and ranks that have it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import pytest
import textbook
import torch
from loops import Network, distance, gradnorm_rule, parameter_distance, train
from models import network_sgd, vector_batches
from torch import Tensor

from lightning_gradnorm.engine.ranks import Ranks, StepMeans, reduce_step
from lightning_gradnorm.engine.step_state import OptimizerStepState
from lightning_gradnorm.gradients import WeightGradients

TASKS = ["a", "b", "c"]
Batches = Sequence[Mapping[str, tuple[float, list[float]]]]
"""The micro-batches of one rank: task → its loss and the gradient of the loss."""

MICRO_BATCHES: Batches = [{"a": (1.0, [3.0, 0.0]), "b": (4.0, [1.0, 1.0])}, {"a": (2.0, [0.0, 4.0])}]
OTHER_RANK: Batches = [{"a": (6.0, [-3.0, 4.0])}, {"a": (7.0, [0.0, 0.0]), "c": (5.0, [8.0, 6.0])}]


@dataclass(frozen=True)
class TwoRanks(Ranks):
    """Adds the other rank's numbers, if they are known, and notes this rank's."""

    size: int = 2
    other: Tensor | None = None
    noted: list[Tensor] = field(default_factory=list)

    def sum(self, values: Tensor) -> Tensor:
        self.noted.append(values)
        return values if self.other is None else values + self.other


def means(batches: Batches, ranks: Ranks) -> StepMeans:
    """What a step finds whose gradients are those of the mean over the micro-batches, as DDP's loops have it."""
    W = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    reader, weights = WeightGradients([W]), torch.ones(3, dtype=torch.float64)
    step = OptimizerStepState(measured=True, weights=dict(zip(TASKS, weights, strict=True)))
    for batch in batches:
        for task, (loss, gradient) in batch.items():
            step.add(task, torch.tensor(loss, dtype=torch.float64), is_first=True)
            share = W * torch.tensor(gradient, dtype=torch.float64) / len(batches)
            reader.read(task, [share.sum()], [torch.ones((), dtype=torch.float64)])
    return reduce_step(TASKS, step, reader, weights, ranks, scale=1.0)


def test_a_step_of_one_process_has_the_mean_of_the_losses_that_are_there() -> None:
    found = means(MICRO_BATCHES, Ranks())
    assert found.losses.tolist() == [1.5, 4.0, 0.0]
    assert found.present is not None
    assert found.present.tolist() == [True, True, False]
    assert found.norms is not None
    assert found.norms.tolist() == pytest.approx([2.5, 0.5**0.5, 0.0])  # ‖(3, 4)‖ / 2, ‖(1, 1)‖ / 2


def test_a_step_of_two_ranks_has_the_mean_of_all_losses_and_the_norm_of_the_mean_gradient() -> None:
    means(OTHER_RANK, other := TwoRanks())
    found = means(MICRO_BATCHES, TwoRanks(other=other.noted[0]))
    assert found.losses.tolist() == [4.0, 4.0, 5.0]  # of a (1 + 2 + 6 + 7) / 4, not half of it
    assert found.present is not None
    assert found.present.tolist() == [True, True, True]
    assert found.norms is not None
    # a: ‖(3, 0) + (0, 4) + (-3, 4)‖ / 4 = 2, where the mean of the ranks' norms would be 2.5
    assert found.norms.tolist() == pytest.approx([2.0, 2**0.5 / 4, 2.5])


@pytest.mark.parametrize("heads", [False, True])
def test_a_task_that_some_micro_batches_lack_is_balanced_by_the_mean_of_the_others(heads: bool) -> None:
    batches = vector_batches(3, 12)
    for index in (1, 2, 7, 8, 9):  # 8 and 9 are a whole step
        del batches[index]["depth"]
    model, twin, sgd = Network(3), Network(3), partial(torch.optim.SGD, lr=0.05)
    trajectory = textbook.train(
        twin,
        twin.forward_for_textbook,
        batches,
        [twin.encoder[2].weight],
        network_sgd(twin.parameters()),
        alpha=1.2,
        weight_optimizer=sgd,
        accumulate=2,
        tasks=model.tasks,
    )
    rule = gradnorm_rule(optimizer=sgd, dtype=torch.float64)
    options = {"accumulate": 2, "shared_layer": "encoder.2", "heads": model.heads() if heads else None}
    weights, _ = train(model, rule, batches, **options)
    assert distance(weights, trajectory.weights) <= 1e-9
    assert parameter_distance(model, twin) <= 1e-9
