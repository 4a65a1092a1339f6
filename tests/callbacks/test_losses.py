"""Each loss counts once, and only if it was back-propagated, however the model reports it."""

from __future__ import annotations

import lightning as L
import pytest
import torch
from harness import Batches
from models import Automatic, Manual, OnlyLogs, multi_task_module, vector_batches
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from lightning_gradnorm import FixedWeights, GradNorm

NAMES = ["seg", "depth", "normal"]
WEIGHTS = {"seg": 0.5, "depth": 2.0, "normal": 3.0}


class Gradients(L.Callback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.first: dict[str, torch.Tensor] = {}

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if not self.first:
            self.first = {name: p.grad.clone() for name, p in pl_module.named_parameters()}


def _expected(batch) -> dict[str, torch.Tensor]:
    model = Automatic(3)
    sum(WEIGHTS[task] * loss for task, loss in model.task_losses(batch).items()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def _agree(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-9)


def test_a_loss_logged_twice_is_weighted_once(quiet_trainer) -> None:
    class Twice(OnlyLogs):
        def training_step(self, batch, batch_idx):
            losses = self.task_losses(batch)
            for _ in range(2):
                self.log_dict({f"train/{task}_loss": loss for task, loss in losses.items()})
            return sum(losses.values())

    (batch,), gradients = vector_batches(3, 1), Gradients()
    callbacks = [FixedWeights(WEIGHTS, tasks=Twice(3).logged_names()), gradients]
    quiet_trainer(callbacks=callbacks).fit(Twice(3), Batches([batch]))
    _agree(gradients.first, _expected(batch))


def test_a_loss_both_returned_and_watched_is_weighted_once(quiet_trainer) -> None:
    balancing, gradients = FixedWeights(WEIGHTS), Gradients()

    class Both(Automatic):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            balancing.watch({task: output[task] for task in NAMES})
            return output

    (batch,) = vector_batches(3, 1)
    quiet_trainer(callbacks=[balancing, gradients]).fit(Both(3), Batches([batch]))
    _agree(gradients.first, _expected(batch))


def test_one_tensor_for_two_tasks_is_an_error(quiet_trainer) -> None:
    class Same(Automatic):
        def training_step(self, batch, batch_idx):
            output = super().training_step(batch, batch_idx)
            return {**output, "depth": output["seg"]}

    with pytest.raises(ValueError, match="tasks 'seg' and 'depth' have the same tensor as their loss"):
        quiet_trainer(callbacks=[GradNorm(NAMES)]).fit(Same(3), Batches(vector_batches(3, 2)))


def test_two_forward_passes_before_one_backward_are_one_step(quiet_trainer) -> None:
    """Two halves, watched one after the other and back-propagated together, are the whole batch."""

    class Halves(Manual):
        def training_step(self, batch, batch_idx):
            halves = [{name: value[part] for name, value in batch.items()} for part in (slice(0, 2), slice(2, 4))]
            total = 0
            for half in halves:
                losses = {task: loss / 2 for task, loss in self.task_losses(half).items()}
                self.gradnorm[0].watch(losses)
                total = total + sum(losses.values())
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(total)
            optimizer.step()

    found = []
    for kind in (Manual, Halves):
        model, gradnorm = kind(3), GradNorm(NAMES)
        model.gradnorm = [gradnorm]
        quiet_trainer(callbacks=[gradnorm]).fit(model, Batches(vector_batches(3, 8)))
        found.append(gradnorm.weights)
    assert found[1] == pytest.approx(found[0], abs=1e-9)


def test_another_optimizer_may_step_before_the_losses_are_watched(quiet_trainer) -> None:
    class Adversarial(Manual):
        def __init__(self, tasks: int) -> None:
            super().__init__(tasks)
            self.critic = nn.Linear(5, 1).double()

        def configure_optimizers(self):
            own = [p for name, p in self.named_parameters() if not name.startswith("critic")]
            return [torch.optim.SGD(self.critic.parameters(), lr=0.1), torch.optim.SGD(own, lr=0.02, momentum=0.9)]

        def training_step(self, batch, batch_idx):
            first, second = self.optimizers()
            first.zero_grad()
            self.manual_backward(self.critic(batch["x"]).square().mean())
            first.step()
            losses = self.task_losses(batch)
            self.gradnorm[0].watch(losses)
            second.zero_grad()
            self.manual_backward(sum(losses.values()))
            second.step()

    found = []
    for kind in (Manual, Adversarial):
        model, gradnorm = kind(3), GradNorm(NAMES)
        model.gradnorm = [gradnorm]
        quiet_trainer(callbacks=[gradnorm]).fit(model, Batches(vector_batches(3, 8)))
        found.append(gradnorm.weights)
    assert found[1] == pytest.approx(found[0], abs=1e-9)


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_returns_none_after_logging_is_no_step(quiet_trainer, accumulate: int) -> None:
    class Skips(OnlyLogs):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            return None if batch_idx == 3 else loss

    gradnorm = GradNorm(OnlyLogs(3).logged_names())
    trainer = quiet_trainer(callbacks=[gradnorm], accumulate_grad_batches=accumulate)
    trainer.fit(Skips(3), Batches(vector_batches(3, 8)))
    assert sum(gradnorm.weights.values()) == pytest.approx(3)
    if accumulate == 1:  # the skipped batch leaves no trace
        other = GradNorm(OnlyLogs(3).logged_names())
        batches = vector_batches(3, 8)
        quiet_trainer(callbacks=[other]).fit(OnlyLogs(3), Batches(batches[:3] + batches[4:]))
        assert gradnorm.weights == other.weights


def test_a_checkpoint_looked_at_is_not_gone_on_from(quiet_trainer, tmp_path) -> None:
    class Validated(Automatic):
        def validation_step(self, batch, batch_idx):
            self.log("val/loss", sum(self.task_losses(batch).values()))

    batches, gradnorm = vector_batches(3, 6), GradNorm(NAMES)
    loader = DataLoader(batches, batch_size=None)
    trainer = quiet_trainer(callbacks=[gradnorm])
    trainer.fit(Validated(3), loader, loader)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    expected = gradnorm.weights

    again = GradNorm(NAMES)
    quiet_trainer(callbacks=[again]).validate(Validated(3), loader, ckpt_path=tmp_path / "one.ckpt", verbose=False)
    assert again.weights == expected
    quiet_trainer(callbacks=[again]).fit(Validated(3), loader, loader)
    assert again.weights == expected  # the same as a first training, not a continued one


def test_state_given_by_hand_is_gone_on_from(quiet_trainer) -> None:
    batches, gradnorm = vector_batches(3, 6), GradNorm(NAMES)
    quiet_trainer(callbacks=[gradnorm]).fit(Automatic(3), Batches(batches))
    other = GradNorm(NAMES)
    other.load_state_dict(gradnorm.state_dict())
    quiet_trainer(callbacks=[other], max_steps=1).fit(Automatic(3), Batches(batches))
    for task, weight in other.weights.items():
        assert abs(weight - gradnorm.weights[task]) < 0.06
        assert abs(weight - 1) > 0.06


def test_a_loader_without_a_length_ends_its_epoch_with_a_step(quiet_trainer) -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            for batch in vector_batches(3, 5):
                inputs = batch.pop("x")
                yield inputs, batch

    trainer = quiet_trainer(max_epochs=2, callbacks=[GradNorm()])
    trainer.fit(multi_task_module(3, accumulate_grad_batches=2), DataLoader(Stream(), batch_size=None))
    assert trainer.global_step == 6


def test_values_are_logged_where_lightning_writes_though_no_step_was_taken_there(quiet_trainer) -> None:
    class Seen(L.Callback):
        def __init__(self) -> None:
            self.at: list[int] = []

        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
            if "gradnorm/loss" in trainer.callback_metrics:
                self.at.append(batch_idx)

    model, seen = multi_task_module(3, accumulate_grad_batches=3), Seen()
    batches = [(batch.pop("x"), batch) for batch in vector_batches(3, 12)]
    trainer = quiet_trainer(callbacks=[GradNorm(), seen], log_every_n_steps=5)
    trainer.fit(model, DataLoader(batches, batch_size=None))
    assert seen.at[0] == 4  # the fifth batch is written; the last step was in the third


@pytest.mark.parametrize("heads", [False, True])
def test_a_training_step_without_batch_idx_may_have_heads(quiet_trainer, heads: bool) -> None:
    class WithoutIndex(Automatic):
        def training_step(self, batch):
            return super().training_step(batch, 0)

    model = WithoutIndex(3)
    gradnorm = GradNorm(NAMES, heads=model.heads() if heads else None)
    quiet_trainer(callbacks=[gradnorm]).fit(model, Batches(vector_batches(3, 3)))
    assert gradnorm.weights != dict.fromkeys(NAMES, 1.0)


class Alternating(Manual):
    """Something else is trained in every other batch, from the first on; the tasks are shown one by one."""

    def training_step(self, batch, batch_idx):
        losses = self.task_losses(batch)
        optimizer = self.optimizers()
        optimizer.zero_grad()
        if batch_idx % 2:
            for task, loss in losses.items():
                self.gradnorm[0].watch({task: loss})
            self.manual_backward(sum(losses.values()))
        else:
            self.manual_backward(self.encoder(batch["x"]).square().mean())
        optimizer.step()


def test_batches_that_train_something_else_and_losses_shown_one_by_one_are_no_mistake(quiet_trainer) -> None:
    model = Alternating(3)
    gradnorm = GradNorm(NAMES)
    model.gradnorm = [gradnorm]
    quiet_trainer(callbacks=[gradnorm]).fit(model, Batches(vector_batches(3, 6)))
    assert gradnorm.state_dict()["steps"] == 3
    assert gradnorm.weights != dict.fromkeys(NAMES, 1.0)


class LateTask(Automatic):
    """Logs one task from the third batch on; or returns it as None, and later not at all."""

    def __init__(self, logs: bool) -> None:
        super().__init__(3)
        self.logs = logs

    def training_step(self, batch, batch_idx):
        losses = self.task_losses(batch)
        if self.logs and batch_idx < 2:
            losses.pop("depth")
        if not self.logs:
            losses = losses | {"depth": None} if batch_idx < 2 else {k: v for k, v in losses.items() if k != "depth"}
        if self.logs:
            for task, loss in losses.items():
                self.log(f"train/{task}", loss)
        return {"loss": sum(loss for loss in losses.values() if loss is not None), **losses}


@pytest.mark.parametrize("logs", [False, True])
def test_a_task_that_is_absent_at_first_is_no_mistake(quiet_trainer, logs: bool) -> None:
    tasks = {task: f"train/{task}" for task in NAMES} if logs else NAMES
    gradnorm = GradNorm(tasks)
    quiet_trainer(callbacks=[gradnorm]).fit(LateTask(logs), Batches(vector_batches(3, 6)))
    assert (gradnorm.weights["depth"] != 1.0) == logs
