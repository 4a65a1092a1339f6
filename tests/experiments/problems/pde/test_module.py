"""The network and the LightningModule: losses, metrics, LBFGS, and strategies on top."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_gradnorm import FixedWeights, GradNorm, Scalarization
from lightning_gradnorm.experiments.problems.pde import (
    PINN,
    Burgers,
    CollocationDataModule,
    Equation,
    Helmholtz,
    KirchhoffPlate,
    Poisson,
    RelativeL2,
    TanhMLP,
)
from lightning_gradnorm.strategies import ReLoBRaLo

Build = Callable[..., Any]
POINTS = {"pde": 20, "boundary": 12, "initial": 12, "moment": 12}
EQUATIONS = {"poisson": Poisson, "helmholtz": Helmholtz, "burgers": Burgers, "plate": KirchhoffPlate}


def made(equation: Equation, steps: int = 4, seed: int = 0, **options: Any) -> tuple[PINN, CollocationDataModule]:
    torch.manual_seed(seed)
    resample = options.pop("resample", False)
    points = {task: POINTS[task] for task in equation.tasks}
    data = CollocationDataModule(equation, points, resample, steps_per_epoch=steps, val_size=30, seed=seed)
    return PINN(equation, TanhMLP(equation, hidden=[8, 8]), **options), data


class Network(L.Callback):
    """Records the network after each step."""

    def __init__(self) -> None:
        self.after: list[Tensor] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.after.append(torch.cat([one.detach().flatten().clone() for one in pl_module.parameters()]))


def test_relative_l2_is_its_closed_form_over_batches() -> None:
    metric = RelativeL2()
    metric.update(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.5], [2.0]]))
    metric.update(torch.tensor([[-4.0]]), torch.tensor([[-3.0]]))
    assert metric.compute().item() == pytest.approx(math.sqrt((0.25 + 1) / (2.25 + 4 + 9)))
    assert RelativeL2()(torch.zeros(3), torch.ones(3)).item() == 1.0
    assert RelativeL2()(torch.ones(3), torch.ones(3)).item() == 0.0


def test_the_network_standardizes_the_box_and_begins_as_glorot_has_it() -> None:
    network = TanhMLP(KirchhoffPlate(side=4.0), hidden=[200, 300])
    seen: list[Tensor] = []
    network.layers.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    network(torch.tensor([[0.0, 4.0], [2.0, 1.0]]))
    edge = 3**0.5  # of a uniform variable with standard deviation 1
    assert seen[0].flatten().tolist() == pytest.approx([-edge, edge, 0.0, -edge / 2])
    second = network.layers[2]
    assert second.weight.std().item() == pytest.approx(math.sqrt(2 / 500), rel=0.02)
    assert all((layer.bias == 0).all() for layer in network.layers if isinstance(layer, nn.Linear))
    with pytest.raises(ValueError, match=r"TanhMLP: hidden should be at least one layer of positive width; got \[\]"):
        TanhMLP(Poisson(), hidden=[])


@pytest.mark.parametrize("name", EQUATIONS)
def test_training_validation_and_test_log_the_same_values_as_plain_loops(name: str, quiet_trainer: Build) -> None:
    equation = EQUATIONS[name]()
    model, data = made(equation, steps=1, optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer = quiet_trainer(max_epochs=1)
    trainer.fit(model, datamodule=data)
    trained = dict(trainer.callback_metrics)
    trainer.test(model, datamodule=data, verbose=False)
    logged = trained | dict(trainer.callback_metrics)
    for stage, loader in (
        ("train", data.train_dataloader()),
        ("val", data.val_dataloader()),
        ("test", data.test_dataloader()),
    ):
        (batch,) = loader
        losses = {
            task: sum(float(one) ** 2 for one in equation.residual(task, model.network, batch[task]).detach())
            / len(batch[task])
            for task in equation.tasks
        }
        for task, loss in losses.items():
            assert float(logged[f"{stage}/loss/{task}"]) == pytest.approx(loss, rel=1e-4)
        assert float(logged[f"{stage}/loss"]) == pytest.approx(sum(losses.values()), rel=1e-4)
        if stage != "train":
            points, exact = batch["reference"]
            difference = (model(points) - exact).detach()
            expected = (difference.square().sum() / exact.square().sum()).sqrt()
            assert float(logged[f"{stage}/relative_l2"]) == pytest.approx(float(expected), rel=1e-5)


def test_a_step_is_that_of_a_plain_loop(quiet_trainer: Build) -> None:
    model, data = made(Burgers(), resample=True, optimizer=partial(torch.optim.Adam, lr=0.01),
                       lr_scheduler=partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.5))  # fmt: skip
    seen = Network()
    quiet_trainer(max_epochs=2, callbacks=[seen]).fit(model, datamodule=data)
    plain, data = made(Burgers(), resample=True)
    data.setup()
    optimizer = torch.optim.Adam(plain.network.parameters(), lr=0.01)
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 0.01 * 0.5**step
        optimizer.zero_grad()
        points = data.train_data.draw(step)
        sum(plain.equation.residual(t, plain.network, points[t]).pow(2).mean() for t in plain.tasks).backward()
        optimizer.step()
        expected = torch.cat([one.detach().flatten() for one in plain.parameters()])
        torch.testing.assert_close(seen.after[step], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", EQUATIONS)
def test_fixed_weights_are_a_weighted_loss(name: str, quiet_trainer: Build) -> None:
    equation = EQUATIONS[name]()
    weights = {task: 0.5 + number for number, task in enumerate(equation.tasks)}
    seen = Network()
    model, data = made(equation, optimizer=partial(torch.optim.SGD, lr=1e-3))
    quiet_trainer(max_epochs=1, callbacks=[FixedWeights(weights), seen]).fit(model, datamodule=data)
    plain, data = made(equation)
    data.setup()
    optimizer = torch.optim.SGD(plain.network.parameters(), lr=1e-3)
    for step in range(4):
        optimizer.zero_grad()
        losses = plain.task_losses(data.train_data.points)
        sum(weights[task] * loss for task, loss in losses.items()).backward()
        optimizer.step()
        expected = torch.cat([one.detach().flatten() for one in plain.parameters()])
        torch.testing.assert_close(seen.after[step], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", EQUATIONS)
def test_gradnorm_finds_the_last_layer_and_reads_the_norms_of_separate_passes(name: str, quiet_trainer: Build) -> None:
    equation = EQUATIONS[name]()
    model, data = made(equation, steps=1, optimizer=partial(torch.optim.SGD, lr=0.0))
    gradnorm = GradNorm(alpha=1.0)
    trainer = quiet_trainer(max_epochs=1, callbacks=[gradnorm])
    trainer.fit(model, datamodule=data)
    losses = model.task_losses(data.train_data.points)
    last = model.network.layers[-1].weight
    for task, loss in losses.items():
        (found,) = torch.autograd.grad(loss, last, retain_graph=True)
        norm = float(trainer.callback_metrics[f"gradnorm/grad_norm/{task}"])
        assert norm == pytest.approx(found.norm().item(), rel=1e-4)
    assert gradnorm.weights == pytest.approx(gradnorm.weights)
    assert len(gradnorm.weights) == len(equation.tasks)
    assert sum(gradnorm.weights.values()) == pytest.approx(len(equation.tasks))


@pytest.mark.parametrize(
    "balancing", [None, GradNorm, lambda: Scalarization(ReLoBRaLo)], ids=["equal", "gradnorm", "relobralo"]
)
def test_lbfgs_lowers_the_loss_with_a_closure(balancing: Callable[[], L.Callback] | None, quiet_trainer: Build) -> None:
    lbfgs = partial(torch.optim.LBFGS, max_iter=10, history_size=10, line_search_fn="strong_wolfe")
    model, data = made(Poisson(), steps=6, optimizer=lbfgs)
    data.setup()
    before = sum(model.task_losses(data.train_data.points).values()).item()
    calls = 0
    network_losses = model.task_losses

    def counted(batch: Any) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        return network_losses(batch)

    model.task_losses = counted
    callbacks = [] if balancing is None else [balancing()]
    trainer = quiet_trainer(max_epochs=1, callbacks=callbacks, limit_val_batches=0)
    trainer.fit(model, datamodule=data)
    assert trainer.global_step == 6
    assert calls > 30
    after = sum(network_losses(data.train_data.points).values()).item()
    assert after < before / 20


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_run_resumed_within_an_epoch_ends_with_the_same_network(
    name: str, quiet_trainer: Build, tmp_path: Path
) -> None:
    file = tmp_path / "within.ckpt"

    class Saves(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
            if trainer.global_step == 6:  # the second step of the second epoch
                trainer.save_checkpoint(file)

    found = []
    for checkpoint in (None, file):
        model, data = made(EQUATIONS[name](), resample=True)
        gradnorm = GradNorm()
        trainer = quiet_trainer(max_epochs=3, callbacks=[gradnorm, Saves()])
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
        assert trainer.global_step == 12
        weights = torch.tensor(list(gradnorm.weights.values()))
        found.append(torch.cat([weights, *(one.detach().flatten() for one in model.parameters())]))
    assert torch.equal(*found)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_poissons_equation_is_learned(seed: int, quiet_trainer: Build) -> None:
    model, data = made(Poisson(), steps=250, seed=seed, optimizer=partial(torch.optim.Adam, lr=0.01))
    trainer = quiet_trainer(max_epochs=6)
    trainer.fit(model, datamodule=data)
    trainer.test(model, datamodule=data, verbose=False)
    assert float(trainer.callback_metrics["test/relative_l2"]) < 0.03
