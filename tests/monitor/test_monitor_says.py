"""The monitor's summary at the end, its TensorBoard output and its checkpoint state."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from harness import Batches, MemoryLogger
from lightning.pytorch.loggers import TensorBoardLogger
from models import (
    Automatic,
    as_inputs_and_targets,
    multi_task_module,
    vector_batches,
)
from monitored import (
    FIXED,
    TASKS,
    MakeTrainer,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_gradnorm import FixedWeights, GradientNormMonitor


def test_the_suggested_weights_make_the_mean_norms_equal(
    quiet_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture
) -> None:
    """Even with other current weights, the suggested ones are for the losses as the model adds them up."""
    suggested = []
    for strategy in (None, FixedWeights(FIXED, tasks=TASKS)):
        monitor = GradientNormMonitor(TASKS, "encoder", every_n_steps=1)
        callbacks = [monitor] if strategy is None else [strategy, monitor]
        with caplog.at_level(logging.INFO):
            quiet_trainer(callbacks=callbacks).fit(Automatic(3), Batches(vector_batches(3, 1)))
        suggested.append(monitor.suggested_weights)
    assert suggested[0] == pytest.approx(suggested[1], abs=1e-12)
    assert sum(suggested[0].values()) == pytest.approx(3)
    weighted = GradientNormMonitor(TASKS, "encoder", every_n_steps=1)
    callbacks = [FixedWeights(suggested[0], tasks=TASKS), weighted]
    quiet_trainer(callbacks=callbacks).fit(Automatic(3), Batches(vector_batches(3, 1)))
    assert weighted.last is not None
    assert weighted.last.imbalance == pytest.approx(1, abs=1e-12)
    said = [record.message for record in caplog.records if "GradientNormMonitor" in record.message]
    shown = {name: float(f"{weight:.3g}") for name, weight in suggested[0].items()}
    assert f"FixedWeights({shown})" in said[0]
    assert "1 measured step: `" in said[0]
    assert "of the update on `encoder`" in said[0]


def test_the_summary_names_who_carries_the_update_and_who_conflicts() -> None:
    class Opposed(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 1.0]))

        def training_step(self, batch: Tensor, batch_idx: int) -> dict[str, Tensor]:
            big, small, penalty = 10 * self.w[0], -self.w[0], 3 * self.w[1]
            return {"loss": big + small + penalty + 0 * batch.sum(), "big": big, "small": small}

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    monitor = GradientNormMonitor(every_n_steps=1)
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", enable_model_summary=False, callbacks=[monitor], **options)
    trainer.fit(Opposed(), Batches([torch.zeros(1)] * 4))
    assert monitor.last is not None
    assert dict(monitor.last) == {"big": 10.0, "small": 1.0, "rest_of_loss": 3.0}
    assert monitor.last.shares == {
        "big": 1.0,
        "small": -0.1,
        "rest_of_loss": pytest.approx(0.1),
    }  # of the update (9, 3)
    assert monitor.summary().splitlines() == [
        "GradientNormMonitor, 4 measured steps: `big` carries 100 % of the update on the shared parameters, "
        "the rest of the loss 10 %, `small` -10 %.",
        "Mean norms: `big` 10, `small` 1, the rest of the loss 3; the largest is 10 times the smallest.",
        "`big` and `small` pull against each other in 4 of 4 steps (mean cosine -1.00).",
        "Suggested static weights, which make the mean norms equal: FixedWeights({'big': 0.182, 'small': 1.82}). "
        "A regularizer should not become as large as a task: if one is among them, name only the others in losses.",
    ]


def test_a_part_that_is_not_finite_is_named(quiet_trainer: MakeTrainer) -> None:
    monitor, log = GradientNormMonitor(TASKS, "encoder", every_n_steps=1), MemoryLogger()
    batches = vector_batches(3, 3)
    batches[2]["depth"].fill_(torch.inf)
    quiet_trainer(callbacks=[monitor], logger=log).fit(Automatic(3), Batches(batches))
    assert "2 measured steps" in monitor.summary()
    assert "In 1 of the measured steps the gradient of `depth` was not finite" in monitor.summary()
    assert not torch.tensor(log.scalars["monitor/norm/depth"]).isfinite()[2]
    assert torch.tensor(log.scalars["monitor/norm/seg"]).isfinite().all()


def test_a_resumed_run_measures_and_reports_the_same_as_an_uninterrupted_one(
    quiet_trainer: MakeTrainer, tmp_path
) -> None:
    batches = vector_batches(3, 4)
    whole, first, second = (GradientNormMonitor(TASKS, every_n_steps=3) for _ in range(3))
    quiet_trainer(callbacks=[whole], max_epochs=2).fit(Automatic(3), Batches(batches))
    trainer = quiet_trainer(callbacks=[first])
    trainer.fit(Automatic(3), Batches(batches))
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    trainer = quiet_trainer(callbacks=[second], max_epochs=2)
    trainer.fit(Automatic(3), Batches(batches), ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    assert first.summary() != second.summary() == whole.summary()
    again = quiet_trainer(callbacks=[second], max_epochs=1)
    again.fit(Automatic(3), Batches(batches))  # another training: the old one is no part of it
    assert second.summary() == first.summary()


def test_a_checkpoint_of_the_first_edition_is_continued() -> None:
    tally = {
        "_steps": 1,
        "_squared": 17.0,
        "_along": {"rul": 16.0, "hs": 1.0},
        "_counts": {"rul": 1, "hs": 1},
        "_norms": {"rul": 4.0, "hs": 1.0},
        "_plain_norms": {"rul": 4.0, "hs": 1.0},
        "_cosines": {"rul": {"hs": [0.0, 1, 0]}},
        "_not_finite": {},
    }
    monitor = GradientNormMonitor()
    monitor.load_state_dict({"steps": 1, "tally": tally})
    state = monitor.state_dict()
    assert (state["steps"], {name: state["tally"][name] for name in tally}) == (1, tally)
    assert monitor.suggested_weights == pytest.approx({"rul": 0.4, "hs": 1.6})


def draw_nothing_but_the_size(names: Sequence[str], cosines: Tensor) -> np.ndarray:
    assert names == TASKS
    assert cosines.shape == (3, 3)
    return np.zeros((3, 4, 7), dtype=np.uint8)


@pytest.mark.parametrize("draw", [None, draw_nothing_but_the_size])
def test_tensorboard_gets_scalars_and_the_image_that_the_given_function_draws(
    quiet_trainer: MakeTrainer, tmp_path, draw: Callable[..., np.ndarray] | None
) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer = quiet_trainer(callbacks=[GradientNormMonitor(every_n_steps=2, cosine_image=draw)], logger=logger)
    batches = as_inputs_and_targets(vector_batches(3, 3))
    trainer.fit(multi_task_module(3), DataLoader(batches, batch_size=None))
    events = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0, "images": 0})
    events.Reload()
    expected_tags = {f"monitor/{what}/{task}" for what in ("norm", "share") for task in TASKS}
    expected_tags |= {"monitor/imbalance", "monitor/cosine/seg/depth", "monitor/cosine/depth/normal"}
    assert expected_tags <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("monitor/share/seg")] == [0, 2]
    images = events.Images("monitor/cosine") if events.Tags()["images"] else []
    assert [(event.step, event.height, event.width) for event in images] == ([(0, 4, 7), (2, 4, 7)] if draw else [])
