"""`MultiTaskModule` trains, evaluates and predicts as a Lightning user expects, though it optimizes manually."""

from __future__ import annotations

from functools import partial

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchmetrics.regression import MeanAbsoluteError, MeanSquaredError

from lightning_gradnorm import GradNorm, MultiTaskModule, Task


def _tasks() -> dict[str, Task]:
    return {
        "a": Task(nn.Linear(4, 1), nn.MSELoss(), {"mae": MeanAbsoluteError()}),
        "b": Task(nn.Linear(4, 3), nn.CrossEntropyLoss()),
    }


def _model(seed: int = 0, **kwargs) -> MultiTaskModule:
    torch.manual_seed(seed)
    kwargs.setdefault("optimizer", partial(torch.optim.SGD, lr=0.1))
    return MultiTaskModule(nn.Sequential(nn.Linear(3, 4), nn.Tanh()), _tasks(), **kwargs).double()


def _batches(count: int, size: int = 4) -> list:
    generator = torch.Generator().manual_seed(7)
    return [
        (
            torch.randn(size, 3, generator=generator, dtype=torch.float64),
            {
                "a": torch.randn(size, 1, generator=generator, dtype=torch.float64),
                "b": torch.randint(0, 3, (size,), generator=generator),
            },
        )
        for _ in range(count)
    ]


def _loader(batches: list) -> DataLoader:
    return DataLoader(batches, batch_size=None)


def _loss(model: MultiTaskModule, batch) -> torch.Tensor:
    predictions = model(batch[0])
    return nn.functional.mse_loss(predictions["a"], batch[1]["a"]) + nn.functional.cross_entropy(
        predictions["b"], batch[1]["b"]
    )


def _same_parameters(one: nn.Module, other: nn.Module, tolerance: float = 1e-12) -> None:
    for (name, p), (_, q) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


class Rates(L.Callback):
    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer, pl_module, *args) -> None:
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_without_a_balancing_callback_it_is_plain_training_on_the_sum(quiet_trainer) -> None:
    model, reference, batches = _model(), _model(), _batches(5)
    quiet_trainer(max_epochs=2).fit(model, _loader(batches))
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for batch in batches * 2:
        optimizer.zero_grad()
        _loss(reference, batch).backward()
        optimizer.step()
    _same_parameters(model, reference)


def test_accumulation_takes_the_mean_gradient_and_the_last_window_of_an_epoch_is_shorter(quiet_trainer) -> None:
    model, reference, batches = _model(accumulate_grad_batches=2), _model(), _batches(5)
    trainer = quiet_trainer(max_epochs=2)
    trainer.fit(model, _loader(batches))
    assert trainer.global_step == 6
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for window in (batches[:2], batches[2:4], batches[4:]) * 2:
        optimizer.zero_grad()
        (sum(_loss(reference, batch) for batch in window) / len(window)).backward()
        optimizer.step()
    _same_parameters(model, reference)


def test_clipping_bounds_the_norm_of_the_whole_gradient(quiet_trainer) -> None:
    model, reference, batches = _model(gradient_clip_val=0.05), _model(), _batches(5)
    quiet_trainer(max_epochs=1).fit(model, _loader(batches))
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for batch in batches:
        optimizer.zero_grad()
        _loss(reference, batch).backward()
        norm = nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        assert norm > 0.05
        optimizer.step()
    _same_parameters(model, reference)


def test_clipping_comes_after_balancing(quiet_trainer) -> None:
    norms = []

    class Norm(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args) -> None:
            norms.append(trainer.optimizers[0].last_norm)

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            result = super().step(closure)  # Lightning runs backward and clipping inside the closure
            gradients = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
            self.last_norm = torch.cat(gradients).norm().item()
            return result

    model = _model(gradient_clip_val=0.05, optimizer=partial(Recording, lr=0.1))
    quiet_trainer(max_epochs=1, callbacks=[GradNorm(), Norm()]).fit(model, _loader(_batches(5)))
    assert norms == pytest.approx([0.05] * 5, rel=1e-4)


def test_a_schedule_by_step_is_followed_at_every_optimizer_step(quiet_trainer) -> None:
    scheduler = {"scheduler": partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5), "interval": "step"}
    model, rates = _model(lr_scheduler=scheduler, accumulate_grad_batches=2), Rates()
    quiet_trainer(max_epochs=1, callbacks=[rates]).fit(model, _loader(_batches(4)))
    assert rates.seen == [0.1, 0.05, 0.05, 0.025]


def test_a_schedule_by_epoch_is_followed_at_every_epochs_end(quiet_trainer) -> None:
    model = _model(lr_scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5))
    rates = Rates()
    quiet_trainer(max_epochs=3, callbacks=[rates]).fit(model, _loader(_batches(2)))
    assert rates.seen == [0.1, 0.1, 0.05, 0.05, 0.025, 0.025]


def test_a_plateau_schedule_follows_the_validation_loss(quiet_trainer) -> None:
    scheduler = partial(torch.optim.lr_scheduler.ReduceLROnPlateau, patience=0, factor=0.1, threshold=1e9)
    model, rates = _model(lr_scheduler=scheduler), Rates()
    quiet_trainer(max_epochs=3, callbacks=[rates]).fit(model, _loader(_batches(1)), _loader(_batches(1)))
    assert rates.seen == pytest.approx([0.1, 0.01, 0.001])  # never better by such a threshold


def test_a_plateau_schedule_on_an_unlogged_metric_is_an_error(quiet_trainer) -> None:
    scheduler = {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau, "monitor": "val/los"}
    with pytest.raises(ValueError, match=r"monitors 'val/los', which is not logged; did you mean 'val/loss'\?"):
        quiet_trainer(max_epochs=1).fit(_model(lr_scheduler=scheduler), _loader(_batches(1)), _loader(_batches(1)))


def test_losses_and_metrics_are_logged_by_task(quiet_trainer) -> None:
    model, batches = _model(), _batches(3)
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(model, _loader(batches), _loader(batches))
    logged = set(trainer.callback_metrics)
    assert {"train/loss", "train/loss/a", "train/loss/b", "val/loss", "val/loss/a", "val/loss/b", "val/mae/a"} <= logged
    (tested,) = trainer.test(model, _loader(batches), verbose=False)
    with torch.no_grad():
        inputs, targets = torch.cat([b[0] for b in batches]), torch.cat([b[1]["a"] for b in batches])
        errors = model(inputs)["a"] - targets
    assert tested["test/mae/a"] == pytest.approx(errors.abs().mean().item())
    assert tested["test/loss/a"] == pytest.approx(errors.square().mean().item())
    assert tested["test/loss"] == pytest.approx(tested["test/loss/a"] + tested["test/loss/b"])


def test_metrics_of_an_epoch_are_not_the_mean_over_batches(quiet_trainer) -> None:
    """A root of a mean over all samples differs from the mean of the batches' roots."""
    tasks = _tasks()
    tasks["a"] = Task(nn.Linear(4, 1), nn.MSELoss(), {"rmse": MeanSquaredError(squared=False)})
    torch.manual_seed(0)
    model = MultiTaskModule(nn.Linear(3, 4), tasks, optimizer=torch.optim.SGD).double()
    batches = _batches(1, size=1) + _batches(3, size=6)
    (tested,) = quiet_trainer().test(model, _loader(batches), verbose=False)
    with torch.no_grad():
        errors = torch.cat([model(b[0])["a"] - b[1]["a"] for b in batches])
    assert tested["test/rmse/a"] == pytest.approx(errors.square().mean().sqrt().item())


def test_predict_returns_a_dict_by_task(quiet_trainer) -> None:
    model, batches = _model(), _batches(2)
    for loader in (batches, [inputs for inputs, _ in batches]):
        predicted = quiet_trainer().predict(model, _loader(loader))
        for batch, prediction in zip(batches, predicted, strict=True):
            assert set(prediction) == {"a", "b"}
            torch.testing.assert_close(prediction["a"], model(batch[0])["a"])


def test_a_task_without_targets_is_absent_from_that_step(quiet_trainer) -> None:
    batches = _batches(4)
    batches[1] = (batches[1][0], {"a": batches[1][1]["a"]})
    batches[2] = (batches[2][0], {"a": None, "b": batches[2][1]["b"]})
    model, reference = _model(), _model()
    quiet_trainer(max_epochs=1).fit(model, _loader(batches))
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.1)
    for inputs, targets in batches:
        optimizer.zero_grad()
        predictions = reference(inputs)
        loss = torch.zeros((), dtype=torch.float64)
        if targets.get("a") is not None:
            loss = loss + nn.functional.mse_loss(predictions["a"], targets["a"])
        if targets.get("b") is not None:
            loss = loss + nn.functional.cross_entropy(predictions["b"], targets["b"])
        loss.backward()
        optimizer.step()
    _same_parameters(model, reference)


def test_with_only_some_tasks_it_is_the_module_of_these_and_ignores_the_targets_of_the_others(quiet_trainer) -> None:
    batches = _batches(5)
    chosen = _model(only=["b"])
    torch.manual_seed(0)
    encoder, tasks = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), _tasks()
    alone = MultiTaskModule(encoder, {"b": tasks["b"]}, optimizer=partial(torch.optim.SGD, lr=0.1)).double()
    assert list(chosen.task_heads) == ["b"]
    quiet_trainer().fit(chosen, _loader(batches))
    quiet_trainer().fit(alone, _loader([(inputs, {"b": targets["b"]}) for inputs, targets in batches]))
    _same_parameters(chosen, alone, tolerance=0)
    assert chosen.state_dict().keys() == alone.state_dict().keys()
    trainer = quiet_trainer()
    assert set(trainer.test(chosen, _loader(batches), verbose=False)[0]) == {"test/loss", "test/loss/b"}
    with pytest.raises(ValueError, match="the batch has targets of 'c', which is not a task"):
        chosen.task_losses((batches[0][0], {"c": batches[0][1]["a"]}))


def test_a_checkpoint_knows_which_tasks_were_chosen(quiet_trainer, tmp_path) -> None:
    model, batches = _model(only=["b"]), _batches(2)
    trainer = quiet_trainer()
    trainer.fit(model, _loader(batches))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    loaded = MultiTaskModule.load_from_checkpoint(tmp_path / "one.ckpt").double()
    assert list(loaded.tasks) == ["b"]
    torch.testing.assert_close(loaded.task_losses(batches[0]), model.task_losses(batches[0]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (["c"], "there is no task 'c' to train; it has 'a', 'b'"),
        ([], r"only should be None or a list of tasks, each once, such as \['depth'\]; got \[\]"),
        ("a", "only should be None or a list of tasks"),
    ],
)
def test_the_chosen_tasks_have_to_be_tasks(only, expected) -> None:
    with pytest.raises(ValueError, match=expected):
        _model(only=only)
