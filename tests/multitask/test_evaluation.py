"""`MultiTaskModule` logs validation and test over each task's own batches, on one process and on several."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torchmetrics.regression import MeanAbsoluteError

from lightning_gradnorm import MultiTaskModule, Task

Batch = tuple[Tensor, dict[str, Tensor]]


def model() -> MultiTaskModule:
    torch.manual_seed(0)
    tasks = {name: Task(nn.Linear(4, 1), nn.MSELoss(), {"mae": MeanAbsoluteError()}) for name in ("a", "b", "c")}
    return MultiTaskModule(nn.Linear(3, 4), tasks, optimizer=partial(torch.optim.SGD, lr=0.1))


def batch(seed: int, size: int, tasks: str) -> Batch:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(size, 3, generator=draw), {name: torch.randn(size, 1, generator=draw) for name in tasks}


OF_RANK = [[batch(0, 4, "ab"), batch(1, 2, "a")], [batch(2, 4, "b"), batch(3, 6, "b")]]
"""Rank 1 has no targets of `a`; nobody has any of `c`."""


class OwnBatches(L.LightningDataModule):
    """Each rank evaluates its own batches."""

    def val_dataloader(self) -> Any:
        assert self.trainer is not None
        own = OF_RANK[self.trainer.global_rank] if self.trainer.world_size > 1 else [*OF_RANK[0], *OF_RANK[1]]
        return torch.utils.data.DataLoader(own, batch_size=None)  # type: ignore[arg-type]

    test_dataloader = val_dataloader


def expected(stage: str) -> dict[str, float]:
    """Means by hand: of losses over the samples of the batches that have the task, of the sum over all."""
    net, told = model(), {}
    batches = [one for own in OF_RANK for one in own]
    with torch.no_grad():
        every = [
            (len(x), {task: (net(x)[task] - y).flatten() for task, y in targets.items()}) for x, targets in batches
        ]
    for task in "ab":
        errors = torch.cat([one[task] for _, one in every if task in one])
        told |= {f"{stage}/loss/{task}": float((errors**2).mean()), f"{stage}/mae/{task}": float(errors.abs().mean())}
    sums = sum(size * sum(float((e**2).mean()) for e in one.values()) for size, one in every)
    return told | {f"{stage}/loss": sums / sum(size for size, _ in every)}


@pytest.mark.parametrize("stage", ["val", "test"])
def test_a_task_counts_where_it_is_present(stage: str, quiet_trainer: Callable[..., L.Trainer]) -> None:
    trainer = quiet_trainer()
    run = trainer.validate if stage == "val" else trainer.test
    (found,) = run(model(), OwnBatches(), verbose=False)
    assert found == pytest.approx(expected(stage), rel=1e-5)


def test_a_rank_without_any_target_of_a_task_blocks_no_rank() -> None:
    """Each rank would log other metrics, and wait for the other in another sum."""
    trainer = L.Trainer(
        accelerator="cpu", strategy="ddp_fork", devices=2, logger=False, use_distributed_sampler=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
    )  # fmt: skip
    (found,) = trainer.validate(model(), OwnBatches(), verbose=False)
    assert found == pytest.approx(expected("val"), rel=1e-5)


def test_an_evaluation_that_was_broken_off_leaves_nothing_to_the_next(quiet_trainer: Callable[..., L.Trainer]) -> None:
    net, data = model(), OwnBatches()

    class BreaksOff(L.Callback):
        def on_validation_batch_end(self, trainer: Any, *_: Any) -> None:
            raise RuntimeError("broken off")

    with pytest.raises(RuntimeError, match="broken off"):
        quiet_trainer(callbacks=[BreaksOff()]).validate(net, data, verbose=False)
    (found,) = quiet_trainer().validate(net, data, verbose=False)
    assert found == pytest.approx(expected("val"), rel=1e-5)


def test_a_loss_that_is_no_number_is_shown_as_such(quiet_trainer: Callable[..., L.Trainer]) -> None:
    net = model()
    nn.init.constant_(net.get_parameter("tasks.a.head.bias"), float("nan"))
    (found,) = quiet_trainer().validate(net, OwnBatches(), verbose=False)
    told: Mapping[str, float] = found
    assert told["val/loss/a"] != told["val/loss/a"]
    assert told["val/loss/b"] == pytest.approx(expected("val")["val/loss/b"], rel=1e-5)
