"""The tasks of NYUv2 in a `MultiTaskModule`: trained, evaluated, saved, configured, on one rank and on two."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import dense
import hydra
import lightning as L
import pytest
import torch
from harness import Batches, MemoryLogger
from lightning.pytorch.strategies import DDPStrategy
from omegaconf import OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradnorm import GradNorm, MultiTaskModule
from lightning_gradnorm.experiments.problems.dense.losses import AbsoluteDepthLoss, SquaredDepthLoss
from lightning_gradnorm.experiments.problems.dense.tasks import OUT_CHANNELS, nyuv2_metrics, nyuv2_tasks

SETS = {
    "seg": ["segmentation", "depth", "normals"],
    "kpts": ["depth", "normals", "keypoints"],
    "all": list(OUT_CHANNELS),
}
Batch = tuple[torch.Tensor, dense.Targets]


def module(
    names: list[str], head: Callable[[int, int], nn.Module] = partial(nn.Conv2d, kernel_size=1)
) -> MultiTaskModule:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
    return MultiTaskModule(
        encoder, nyuv2_tasks(names, in_channels=8, head=head), optimizer=partial(torch.optim.Adam, lr=0.01)
    )


def batches(names: list[str], count: int = 2, size: int = 3) -> list[Batch]:
    made = []
    for seed in range(count):
        targets = dense.targets(batch=size, seed=seed)
        images = torch.rand(size, 3, *dense.SIZE, generator=torch.Generator().manual_seed(seed))
        made.append((images, {name: targets[name] for name in names}))
    return made


@pytest.mark.parametrize("names", SETS.values(), ids=SETS)
def test_every_metric_of_every_task_is_logged_in_training_with_gradnorm(
    names: list[str], quiet_trainer: Callable[..., L.Trainer]
) -> None:
    model, data, logger = module(names), batches(names), MemoryLogger()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    trainer = quiet_trainer(max_epochs=2, logger=logger, callbacks=[GradNorm()])
    trainer.fit(model, Batches(data), Batches(data))
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), f"{name} was not trained"
    expected = {f"val/{metric}/{task}" for task in names for metric in nyuv2_metrics(task)}
    assert expected <= logger.scalars.keys()
    assert all(math.isfinite(value) for key in expected for value in logger.scalars[key])
    assert sum(trainer.callbacks[0].weights.values()) == pytest.approx(len(names))  # type: ignore[attr-defined]


def test_test_metrics_count_all_pixels(quiet_trainer: Callable[..., L.Trainer]) -> None:
    names = SETS["all"]
    model, data = module(names), batches(names, count=3)
    (tested,) = quiet_trainer().test(model, Batches(data), verbose=False)
    with torch.no_grad():
        predictions = model(torch.cat([images for images, _ in data]))
    for task in names:
        target = torch.cat([targets[task] for _, targets in data])
        for name, metric in nyuv2_metrics(task).items():
            metric.update(predictions[task], target)
            assert tested[f"test/{name}/{task}"] == pytest.approx(metric.compute().item(), rel=1e-5)


def test_a_step_without_anything_known_of_one_task_leaves_its_head_alone(
    quiet_trainer: Callable[..., L.Trainer],
) -> None:
    names = SETS["seg"]
    model, (images, targets) = module(names), batches(names, count=1)[0]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.optimizer = partial(torch.optim.SGD, lr=0.1)
    quiet_trainer().fit(model, Batches([(images, {**targets, "depth": torch.zeros_like(targets["depth"])})]))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("tasks.depth"), name


def test_a_checkpoint_holds_heads_losses_and_metrics(quiet_trainer: Callable[..., L.Trainer], tmp_path: Path) -> None:
    names = SETS["all"]
    model, data = module(names), batches(names)
    trainer = quiet_trainer()
    trainer.fit(model, Batches(data))
    trainer.save_checkpoint(tmp_path / "model.ckpt")
    (expected,) = trainer.test(model, Batches(data), verbose=False)
    loaded = MultiTaskModule.load_from_checkpoint(tmp_path / "model.ckpt")
    assert quiet_trainer().test(loaded, Batches(data), verbose=False) == [expected]


def test_a_configuration_makes_them() -> None:
    tasks = hydra.utils.instantiate(
        OmegaConf.create(
            {
                "_target_": "lightning_gradnorm.experiments.problems.dense.tasks.nyuv2_tasks",
                "names": ["segmentation", "depth"],
                "in_channels": 8,
                "losses": {
                    "depth": {"_target_": "lightning_gradnorm.experiments.problems.dense.losses.AbsoluteDepthLoss"}
                },
                "head": {"_target_": "torch.nn.Conv2d", "_partial_": True, "kernel_size": 3, "padding": 1},
            }
        )
    )
    assert list(tasks) == ["segmentation", "depth"]
    assert isinstance(tasks["depth"].loss, AbsoluteDepthLoss)
    assert tasks["segmentation"].head(torch.zeros(2, 8, 5, 6)).shape == (2, 13, 5, 6)
    assert tasks["segmentation"].head.kernel_size == (3, 3)


def test_the_defaults_are_the_papers() -> None:
    tasks = nyuv2_tasks(list(OUT_CHANNELS), in_channels=64)
    assert {name: sum(p.numel() for p in task.head.parameters()) for name, task in tasks.items()} == {
        "segmentation": 65 * 13,
        "depth": 65,
        "normals": 65 * 3,
        "keypoints": 65 * 48,
    }
    assert isinstance(tasks["depth"].loss, SquaredDepthLoss)


def test_tasks_share_no_metric_with_another_call() -> None:
    one, other = (nyuv2_tasks(["depth"], in_channels=1)["depth"].metrics["rmse"] for _ in range(2))
    one.update(torch.ones(1), torch.ones(1))
    assert other.update_count == 0


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="NYUv2 has no task 'normal'; did you mean 'normals'"):
        nyuv2_tasks(["normal"], in_channels=8)
    with pytest.raises(ValueError, match=r"names should be a list of one or more of .*; got 'depth'"):
        nyuv2_tasks("depth", in_channels=8)
    with pytest.raises(ValueError, match="names should be a list of one or more"):
        nyuv2_tasks([], in_channels=8)
    with pytest.raises(ValueError, match="losses has a task 'normals' that is not in names; it has 'depth'"):
        nyuv2_tasks(["depth"], in_channels=8, losses={"normals": nn.MSELoss()})
    with pytest.raises(ValueError, match="head should be a function that creates a head"):
        nyuv2_tasks(["depth"], in_channels=8, head=nn.Conv2d(8, 1, 1))  # type: ignore[arg-type]


def test_two_ranks_report_the_metrics_of_one(quiet_trainer: Callable[..., L.Trainer]) -> None:
    names = SETS["all"]
    samples = [
        (images[i], {name: target[i] for name, target in targets.items()})
        for images, targets in batches(names, count=2)
        for i in range(3)
    ]
    loader = DataLoader(samples, batch_size=2)  # type: ignore[arg-type]
    (expected,) = quiet_trainer().test(module(names), loader, verbose=False)
    two = DDPStrategy(start_method="fork", timeout=timedelta(seconds=60))
    trainer = quiet_trainer(devices=2, strategy=two, use_distributed_sampler=False)
    (found,) = trainer.test(module(names), datamodule=_Shares(samples), verbose=False)
    compared = {
        key: value for key, value in found.items() if "loss" not in key
    }  # a mean over ranks of means over pixels
    assert compared == pytest.approx({key: expected[key] for key in compared}, rel=1e-5)
    assert len(compared) == sum(len(nyuv2_metrics(name)) for name in names)


class _Shares(L.LightningDataModule):
    """Two samples for the first rank, four for the second: means of means would be another number."""

    def __init__(self, samples: list[Batch]) -> None:
        super().__init__()
        self.samples = samples

    def test_dataloader(self) -> DataLoader[Batch]:
        assert self.trainer is not None
        own = self.samples[:2] if self.trainer.global_rank == 0 else self.samples[2:]
        return DataLoader(own, batch_size=4)  # type: ignore[arg-type]
