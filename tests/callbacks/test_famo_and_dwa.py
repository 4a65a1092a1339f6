"""Strategies that need more than the losses of the batch: FAMO needs losses after the step, DWA the end of an epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches, MemoryLogger, Recorder
from models import (
    FEATURES,
    HIDDEN,
    INPUTS,
    OUTPUTS,
    TASKS,
    Automatic,
    Batch,
    Manual,
    as_inputs_and_targets,
    multi_task_module,
    network_sgd,
    vector_batches,
)
from torch import Tensor, nn
from torchjd import scalarization as S
from torchmetrics import CatMetric, MeanMetric

from lightning_gradnorm import Scalarization

MakeTrainer = Callable[..., L.Trainer]
NAMES = list(TASKS[:3])
STEPS = 10


class LeavesTraces(Automatic):
    """Everything that a second call of `training_step` would show in: statistics, masks, metrics, logs, random numbers."""

    def build(self) -> None:
        self.encoder = nn.Sequential(
            nn.Linear(INPUTS, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Dropout(0.3), nn.Tanh(), nn.Linear(HIDDEN, FEATURES)
        )
        for task in self.tasks:
            setattr(self, f"{task}_head", nn.Sequential(nn.Dropout(0.2), nn.Linear(FEATURES, OUTPUTS)))
        self.mean, self.all = MeanMetric(), CatMetric()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        losses = self.task_losses(batch)
        total = torch.stack(list(losses.values())).sum()
        self.mean(total.detach())
        self.all.update(torch.stack([loss.detach() for loss in losses.values()]))
        self.log("loss", total, on_step=True, on_epoch=True)
        self.log("mean", self.mean, on_step=True, on_epoch=True)
        self.log_dict({f"loss of {task}": loss for task, loss in losses.items()})
        return {"loss": total, **losses}


def by_hand(accumulate: int) -> tuple[LeavesTraces, list[dict[str, float]], list[float], Tensor]:
    """FAMO as documented, with a second evaluation that only computes the losses."""
    model, famo = LeavesTraces(3), S.FAMO(3).double()
    optimizer = network_sgd(model.parameters())
    weights, totals = [], []
    for index, batch in enumerate(vector_batches(3, STEPS)):
        before = torch.get_rng_state()
        losses = torch.stack(list(model.task_losses(batch).values()))
        totals.append(float(losses.sum().detach()))
        (w,) = torch.autograd.grad(famo(leaf := losses.detach().requires_grad_()), leaf)
        model.mean.update(losses.sum().detach())
        model.all.update(losses.detach())
        ((w * losses).sum() / accumulate).backward()
        if (index + 1) % accumulate:
            continue
        optimizer.step()
        optimizer.zero_grad()
        weights.append(dict(zip(NAMES, w.tolist(), strict=True)))
        after, kept = torch.get_rng_state(), {name: buffer.clone() for name, buffer in model.named_buffers()}
        torch.set_rng_state(before)
        with torch.no_grad():
            famo.update(torch.stack(list(model.task_losses(batch).values())))
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])
        torch.set_rng_state(after)
    return model, weights, totals, torch.rand(5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_second_look_of_famo_leaves_no_trace(accumulate: int, quiet_trainer: MakeTrainer) -> None:
    torch.manual_seed(7)
    expected, weights, totals, drawn_next = by_hand(accumulate)
    assert max(abs(weights[-1][task] - weights[0][task]) for task in NAMES) > 0.01

    model, logger, drawn = LeavesTraces(3), MemoryLogger(), []

    class DrawsAtTheEnd(L.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            assert isinstance(model.all.value, list)
            assert len(model.all.value) == batch_idx + 1
            if batch_idx == STEPS - 1:
                drawn.append(torch.rand(5))

    famo = Scalarization(S.FAMO, tasks=NAMES)
    recorder = Recorder(famo, accumulate)
    trainer = quiet_trainer(
        callbacks=[famo, recorder, DrawsAtTheEnd()], logger=logger, accumulate_grad_batches=accumulate
    )
    torch.manual_seed(7)
    trainer.fit(model, Batches(vector_batches(3, STEPS)))

    assert torch.equal(drawn[0], drawn_next)
    for found, by in zip(recorder.weights, weights, strict=True):
        assert found == pytest.approx(by, abs=1e-12)
    for (name, value), (_, other) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        torch.testing.assert_close(value, other, rtol=0, atol=1e-12, msg=name)
    torch.testing.assert_close(model.all.compute(), expected.all.compute(), rtol=0, atol=1e-12)
    in_steps = slice(accumulate - 1, None, accumulate)  # Lightning logs after an optimizer step
    assert logger.scalars["loss_step"] == pytest.approx(totals[in_steps], rel=1e-6)  # logged in float32
    assert logger.scalars["mean_step"] == pytest.approx(totals[in_steps], rel=1e-6)  # logged in float32
    mean = sum(totals) / STEPS
    assert [float(trainer.callback_metrics[f"{name}_epoch"]) for name in ("loss", "mean")] == pytest.approx([mean] * 2)


def test_famo_looks_again_at_a_multi_task_module(quiet_trainer: MakeTrainer) -> None:
    """Which optimizes manually, but says what its losses are."""
    weights = []
    for model, batches in (
        (Automatic(3), vector_batches(3, STEPS)),
        (multi_task_module(3), as_inputs_and_targets(vector_batches(3, STEPS))),
    ):
        famo = Scalarization(S.FAMO, tasks=NAMES)
        recorder = Recorder(famo)
        quiet_trainer(callbacks=[famo, recorder]).fit(model, Batches(batches))
        weights.append(recorder.weights)
    for one, other in zip(*weights, strict=True):
        assert one == pytest.approx(other, abs=1e-12)


def test_famo_is_refused_where_a_second_call_would_be_a_second_step(quiet_trainer: MakeTrainer) -> None:
    model = Manual(3)
    model.gradnorm = [Scalarization(S.FAMO, tasks=NAMES)]  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"calling Manual\.training_step again would take another step"):
        quiet_trainer(callbacks=model.gradnorm).fit(model, Batches(vector_batches(3, 2)))


class Validated(Automatic):
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.task_losses(batch)


@pytest.mark.parametrize(
    "options",
    [
        {"limit_train_batches": 3},
        {"val_check_interval": 2},
        {"check_val_every_n_epoch": 2, "limit_train_batches": 0.5},
        {"num_sanity_val_steps": 1},
        {"max_steps": 17},
    ],
    ids=str,
)
def test_dwa_is_notified_of_the_end_of_each_training_epoch_and_of_no_other(
    options: dict[str, Any], quiet_trainer: MakeTrainer
) -> None:
    epochs, size = 5, {3: 3, 0.5: 3}.get(options.get("limit_train_batches"), 6)
    model, dwa, weights = Automatic(3), S.DWA(), []
    optimizer = network_sgd(model.parameters())
    for _ in range(epochs):
        for batch in vector_batches(3, 6)[:size]:
            losses = torch.stack(list(model.task_losses(batch).values()))
            (w,) = torch.autograd.grad(dwa(losses), losses, retain_graph=True)
            weights.append(dict(zip(NAMES, w.tolist(), strict=True)))
            optimizer.zero_grad()
            (w * losses).sum().backward()
            optimizer.step()
        dwa.step()
    steps = options.get("max_steps", epochs * size)

    trained, callback = Validated(3), Scalarization(S.DWA(), tasks=NAMES)
    recorder = Recorder(callback)
    quiet_trainer(callbacks=[callback, recorder], max_epochs=epochs, **options).fit(
        trained, Batches(vector_batches(3, 6)), Batches(vector_batches(3, 2, seed=3))
    )
    assert len(recorder.weights) == steps
    for found, by in zip(recorder.weights, weights[:steps], strict=True):
        assert found == pytest.approx(by, abs=1e-12)
    assert len(set(recorder.weights[-1].values())) == 3
