"""Losses and metrics of a table's targets against scikit-learn: missing targets do not count, and units are the table's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import r2_score, root_mean_squared_error
from torch import nn

from lightning_gradnorm import GradNorm, MultiTaskModule
from lightning_gradnorm.experiments.loading import TaskTensors
from lightning_gradnorm.experiments.problems.small import MLP
from lightning_gradnorm.experiments.problems.tabular import (
    RMSE,
    CoefficientOfDetermination,
    MaskedMSELoss,
    RelativeRMSE,
    tabular_tasks,
)
from lightning_gradnorm.experiments.problems.tabular.module import PartialTargets
from lightning_gradnorm.experiments.report.metric_direction import higher_is_better

NAN = float("nan")


def pairs(missing: float, offset: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Predictions and targets, float32, in three batches' worth of samples."""
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(90, 1)) * 4 + offset
    prediction = target + rng.normal(size=(90, 1))
    target[rng.random((90, 1)) < missing] = np.nan
    return torch.tensor(prediction, dtype=torch.float32), torch.tensor(target, dtype=torch.float32)


@pytest.mark.parametrize("unit", [1.0, 0.01, 250.0])
@pytest.mark.parametrize("offset", [0.0, 3.0, 10_000.0])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_metrics_agree_with_scikit_learn_in_the_tables_units(missing: float, offset: float, unit: float) -> None:
    prediction, target = pairs(missing, offset)
    mean = offset + 0.5
    metrics = [RMSE(mean, unit), RelativeRMSE(mean, unit), CoefficientOfDetermination(mean, unit)]
    for start in (0, 30, 60):
        for metric in metrics:
            metric.update(prediction[start : start + 30], target[start : start + 30])
    there = ~target.isnan().numpy()
    y, p = (one.double().numpy()[there] * unit for one in (target, prediction))
    rmse = root_mean_squared_error(y, p)
    of_the_mean = root_mean_squared_error(y, np.full_like(y, mean * unit))
    assert [float(metric.compute()) for metric in metrics] == pytest.approx(
        [rmse, rmse / of_the_mean, r2_score(y, p)], rel=2e-5
    )


def test_metrics_of_too_few_targets_are_no_numbers_and_do_not_fail() -> None:
    for target, sizes in (([NAN, NAN], 0), ([1.0, NAN], 1)):
        for metric in (RMSE(), RelativeRMSE(), CoefficientOfDetermination()):
            metric.update(torch.zeros(2, 1), torch.tensor(target)[:, None])
            assert metric.compute().isnan() == (sizes == 0 or isinstance(metric, CoefficientOfDetermination))
            metric.reset()


def test_the_report_knows_which_way_the_metrics_are_better() -> None:
    (task,) = tabular_tasks(2, {"a": (0.0, 1.0)}).values()
    assert {name: higher_is_better(name) for name in task.metrics} == {
        "rmse": False,
        "relative_rmse": False,
        "r2": True,
    }
    for name, metric in task.metrics.items():
        assert metric.higher_is_better == higher_is_better(name)


@pytest.mark.parametrize("there", [[0, 1, 2, 3], [2], [0, 3], []])
def test_the_loss_and_its_gradient_only_count_existing_targets(there: list[int]) -> None:
    target = torch.full((4, 1), NAN, dtype=torch.float64)
    target[there] = torch.tensor([[1.0], [-2.0], [30.0], [4.0]], dtype=torch.float64)[there]
    prediction = torch.arange(4.0, dtype=torch.float64)[:, None].requires_grad_()
    loss = MaskedMSELoss()(prediction, target)
    (gradient,) = torch.autograd.grad(loss, prediction)
    expected = torch.zeros(4, 1, dtype=torch.float64)
    for i in there:
        expected[i] = 2 * (prediction[i].detach() - target[i]) / len(there)
    assert torch.equal(gradient, expected)
    if there:
        assert loss == nn.functional.mse_loss(prediction[there], target[there])
    else:
        assert loss == 0


@pytest.mark.parametrize("made", [MaskedMSELoss(), RMSE(), RelativeRMSE(), CoefficientOfDetermination()])
def test_shapes_that_differ_are_refused(made: Any) -> None:
    with pytest.raises(ValueError, match=r"should have the same shape; got \(3, 1\) and \(3,\). Squeeze or unsqueeze"):
        made(torch.zeros(3, 1), torch.zeros(3))


@pytest.mark.parametrize("hidden", [(), (5,), (6, 5)])
def test_an_untrained_head_predicts_about_the_training_mean(hidden: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tasks = tabular_tasks(8, {"a": (1000.0, 1.0), "b": (0.0, 20.0)}, hidden)
    representation = torch.rand(50, 8)
    for name, mean in (("a", 1000.0), ("b", 0.0)):
        prediction = tasks[name].head(representation)
        assert prediction.shape == (50, 1)
        assert (prediction - mean).abs().max() < 3
        assert sum(isinstance(layer, nn.Linear) for layer in tasks[name].head.modules()) == len(hidden) + 1


def test_a_batch_lacks_the_tasks_that_none_of_its_samples_has() -> None:
    a, b = torch.tensor([[1.0], [2.0], [NAN]]), torch.tensor([[NAN], [NAN], [3.0]])
    data = PartialTargets(torch.zeros(3, 2), {"a": a, "b": b})
    assert [set(data.__getitems__(rows)[1]) for rows in ([0, 1], [1, 2], [2])] == [{"a"}, {"a", "b"}, {"b"}]
    assert isinstance(data, TaskTensors)


def test_raw_and_standardized_targets_give_the_same_metrics_for_the_same_predictions() -> None:
    prediction, target = pairs(0.2, offset=40.0)
    mean, std = 39.0, 4.2
    raw = [metric(prediction, target) for metric in tabular_tasks(1, {"a": (mean, 1.0)})["a"].metrics.values()]
    standard = [
        metric((prediction - mean) / std, (target - mean) / std)
        for metric in tabular_tasks(1, {"a": (0.0, std)})["a"].metrics.values()
    ]
    assert torch.tensor(raw) == pytest.approx(torch.tensor(standard), rel=1e-5)


def test_a_checkpoint_is_loaded_with_nothing_else_given(quiet_trainer: Any, tmp_path: Any) -> None:
    inputs = torch.randn(40, 3)
    targets = {"a": inputs[:, :1] + 5, "b": torch.where(inputs[:, 1:2] > 0, inputs[:, :1], NAN)}
    loader = torch.utils.data.DataLoader(PartialTargets(inputs, targets), batch_size=10, collate_fn=lambda batch: batch)
    network = MultiTaskModule(MLP(3, [8]), tabular_tasks(8, {"a": (5.0, 1.0), "b": (0.0, 2.0)}))
    trainer = quiet_trainer(max_epochs=1, callbacks=[GradNorm()])
    trainer.fit(network, loader)
    trainer.save_checkpoint(tmp_path / "network.ckpt")
    loaded = MultiTaskModule.load_from_checkpoint(tmp_path / "network.ckpt")
    trainer.test(network, loader, verbose=False)
    expected = dict(trainer.callback_metrics)
    trainer.test(loaded, loader, verbose=False)
    assert {f"test/{m}/{t}" for m in ("loss", "rmse", "relative_rmse", "r2") for t in "ab"} < set(expected)
    assert all(torch.equal(trainer.callback_metrics[name], value) for name, value in expected.items())
