"""Kinds of models that people have, each trained unchanged."""

from __future__ import annotations

import copy
import csv
import pickle
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches, assert_clean, traces
from lightning.pytorch.callbacks import EarlyStopping, LearningRateFinder, ModelCheckpoint, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from models import Automatic, OnlyLogs, vector_batches
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradnorm import FixedWeights, GradNorm

NAMES = ["seg", "depth", "normal"]


class Logging(Automatic):
    def __init__(self, tasks: int) -> None:
        super().__init__(tasks)
        self.lr = 0.02

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", sum(self.task_losses(batch).values()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def test_a_training_step_without_batch_idx_is_called_without_it(quiet_trainer) -> None:
    class WithoutIndex(Automatic):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    gradnorm = GradNorm(NAMES)
    quiet_trainer(callbacks=[gradnorm]).fit(WithoutIndex(3), Batches(vector_batches(3, 5)))
    assert gradnorm.weights != dict.fromkeys(NAMES, 1.0)


def test_a_head_that_reads_another_head_is_refused_with_heads_and_trained_without(quiet_trainer) -> None:
    class Cascade(Automatic):
        def task_losses(self, batch):
            z = self.encoder(batch["x"])
            seg = self.seg_head(z)
            depth = self.depth_head(z)
            normal = self.normal_head(z) + seg
            outputs = {"seg": seg, "depth": depth, "normal": normal}
            return {task: nn.functional.mse_loss(output, batch[task]) for task, output in outputs.items()}

    with pytest.raises(ValueError, match=r"the loss of task 'normal' also reads the head of 'seg'.*Leave heads out"):
        quiet_trainer(callbacks=[GradNorm(NAMES, heads=Cascade(3).heads())]).fit(
            Cascade(3), Batches(vector_batches(3, 5))
        )
    gradnorm = GradNorm(NAMES)
    quiet_trainer(callbacks=[gradnorm]).fit(Cascade(3), Batches(vector_batches(3, 5)))
    assert sum(gradnorm.weights.values()) == pytest.approx(3)


def test_a_loss_that_passes_by_its_head_is_refused(quiet_trainer) -> None:
    class Consistency(Automatic):
        def task_losses(self, batch):
            losses = super().task_losses(batch)
            losses["seg"] = losses["seg"] + self.encoder(batch["x"]).square().mean()
            return losses

    model = Consistency(3)
    with pytest.raises(
        ValueError, match=r"the loss of task 'seg' reaches the shared layer by a path that does not pass"
    ):
        quiet_trainer(callbacks=[GradNorm(NAMES, heads=model.heads())]).fit(model, Batches(vector_batches(3, 5)))


@pytest.mark.both_packages
def test_fixed_weights_multiply_each_tasks_gradient(quiet_trainer) -> None:
    weights = {"seg": 0.5, "depth": 2.0, "normal": 3.0}
    gradients: dict[str, torch.Tensor] = {}

    class Keep(L.Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
            gradients.update({name: p.grad.clone() for name, p in pl_module.named_parameters()})

    (batch,) = vector_batches(3, 1)
    model, reference = Automatic(3), Automatic(3)
    trainer = quiet_trainer(callbacks=[FixedWeights(weights), Keep()])
    trainer.fit(model, Batches([batch]))
    sum(weights[task] * loss for task, loss in reference.task_losses(batch).items()).backward()
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-6, atol=1e-9)
    assert trainer.callback_metrics["balancing/weight/depth"] == 2.0


def test_it_works_beside_the_callbacks_people_use(quiet_trainer, tmp_path) -> None:
    model = Logging(3)
    before = traces(model)
    gradnorm = GradNorm(NAMES, heads=model.heads())
    others = [
        StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2),
        EarlyStopping("val/loss", patience=10),
        ModelCheckpoint(tmp_path, monitor="gradnorm/loss", mode="min"),
        LearningRateFinder(num_training_steps=5, min_lr=1e-4, max_lr=1e-2, early_stop_threshold=None),
    ]
    trainer = quiet_trainer(max_epochs=5, callbacks=[gradnorm, *others], enable_checkpointing=True)
    loader = DataLoader(vector_batches(3, 6), batch_size=None)
    trainer.fit(model, loader, loader)
    assert sum(gradnorm.weights.values()) == pytest.approx(3)
    assert gradnorm.weights != dict.fromkeys(NAMES, 1.0)
    assert_clean(model, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_is_no_weight_step_and_is_counted_and_warned_of_once(quiet_trainer, bad: float) -> None:
    class Bad(Automatic):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            if batch_idx in (2, 4):
                output["depth"] = output["depth"] * bad
                output["loss"] = output["seg"] + output["depth"] + output["normal"]
            return output

        def on_before_optimizer_step(self, optimizer) -> None:
            for parameter in self.parameters():  # as a user might do to keep training
                parameter.grad = torch.nan_to_num(parameter.grad, nan=0.0, posinf=0.0, neginf=0.0)

    class Weights(L.Callback):
        seen: list[dict[str, float]]

        def on_train_batch_end(self, trainer, *args) -> None:
            self.seen.append(gradnorm.weights)

    gradnorm, weights = GradNorm(NAMES), Weights()
    weights.seen = []
    trainer = quiet_trainer(callbacks=[gradnorm, weights])
    with pytest.warns(UserWarning, match="gradient norm of task 'depth' is not finite") as warned:
        trainer.fit(Bad(3), Batches(vector_batches(3, 8)))
    assert len([w for w in warned if "GradNorm" in str(w.message)]) == 1
    assert trainer.callback_metrics["gradnorm/skipped"] == 2
    for step in range(1, 8):
        assert (weights.seen[step] == weights.seen[step - 1]) == (step in (2, 4))
        assert sum(weights.seen[step].values()) == pytest.approx(3)


class Scripted(Automatic):
    """The encoder, or a head, is a ScriptModule, on which torch allows no hooks."""

    def __init__(self, part: str) -> None:
        super().__init__(3)
        setattr(self, part, torch.jit.script(getattr(self, part)))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize(("part", "heads"), [("encoder", True), ("encoder", False), ("seg_head", False)])
def test_a_scripted_encoder_or_head_trains_as_a_plain_one(quiet_trainer, part: str, heads: bool) -> None:
    found = []
    for model in (Scripted(part), Automatic(3)):
        gradnorm = GradNorm(NAMES, shared_layer="encoder.2", heads=model.heads() if heads else None)
        quiet_trainer(callbacks=[gradnorm]).fit(model, Batches(vector_batches(3, 6)))
        found.append(gradnorm.weights)
    assert found[0] == pytest.approx(found[1], abs=1e-9)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_head_that_is_named_is_refused(quiet_trainer) -> None:
    model = Scripted("seg_head")
    with pytest.raises(ValueError, match=r"heads\['seg'\] 'seg_head' was made by torch.jit.script.*Leave heads out"):
        quiet_trainer(callbacks=[GradNorm(NAMES, heads=model.heads())]).fit(model, Batches(vector_batches(3, 2)))


def test_a_head_that_reads_the_output_of_another_head_is_an_error_even_if_it_reads_the_representation(
    quiet_trainer,
) -> None:
    class Fed(Automatic):
        def build(self):
            super().build()
            self.normal_head = nn.Linear(9, 3)

        def task_losses(self, batch):
            z = self.encoder(batch["x"])
            outputs = {"seg": self.seg_head(z), "depth": self.depth_head(z)}
            outputs["normal"] = self.normal_head(torch.cat([z, outputs["seg"]], dim=1))
            return {task: nn.functional.mse_loss(output, batch[task]) for task, output in outputs.items()}

    with pytest.raises(
        ValueError, match=r"the loss of task 'normal' also reads the head of 'seg' and not its head alone"
    ):
        quiet_trainer(callbacks=[GradNorm(NAMES, heads=Fed(3).heads())]).fit(Fed(3), Batches(vector_batches(3, 5)))


@pytest.mark.parametrize("make", [Automatic, OnlyLogs])
def test_a_copy_made_during_training_trains_itself(quiet_trainer, make: Any) -> None:
    class KeepsACopy(L.Callback):
        best: Any = None

        def on_train_batch_end(self, trainer, pl_module, *_: Any) -> None:
            self.best = pickle.loads(pickle.dumps(copy.deepcopy(pl_module)))

    tasks = NAMES if make is Automatic else {task: f"train/{task}_loss" for task in NAMES}
    model, keeps, batches = make(3), KeepsACopy(), vector_batches(3, 4)
    quiet_trainer(callbacks=[GradNorm(tasks), keeps]).fit(model, Batches(batches))
    before = {one: [p.detach().clone() for p in one.parameters()] for one in (model, keeps.best)}
    quiet_trainer(callbacks=[GradNorm(tasks)]).fit(keeps.best, Batches(batches))
    moved = [
        any(not torch.equal(p, q) for p, q in zip(one.parameters(), was, strict=True)) for one, was in before.items()
    ]
    assert moved == [False, True]


def test_a_head_replaced_during_training_is_read_at_the_loss(quiet_trainer) -> None:
    class Replaces(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch: Any, batch_idx: int) -> None:
            if batch_idx == 2:
                pl_module.seg_head = copy.deepcopy(pl_module.seg_head)

    weights = []
    for heads in (Automatic(3).heads(), None):
        gradnorm = GradNorm(NAMES, heads=heads)
        quiet_trainer(callbacks=[gradnorm, Replaces()]).fit(Automatic(3), Batches(vector_batches(3, 4)))
        weights.append(gradnorm.weights)
    assert weights[0] == pytest.approx(weights[1], abs=1e-9)


def test_accumulated_steps_are_logged_once(quiet_trainer, tmp_path) -> None:
    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(
        callbacks=[GradNorm(NAMES)], logger=logger, log_every_n_steps=3, accumulate_grad_batches=2, max_epochs=1
    )
    trainer.fit(Automatic(3), Batches(vector_batches(3, 12)))
    logger.save()
    with open(f"{logger.log_dir}/metrics.csv", newline="") as file:
        steps = [row["step"] for row in csv.DictReader(file) if row["gradnorm/weight/seg"]]
    assert steps == ["2", "5"]
