"""A last training batch of one image, which the DeepLab head rejects, can be left out."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from indoor import frames
from lightning.pytorch.callbacks import LambdaCallback
from nyuv2_writers import write_mtan
from torch import nn

from lightning_gradnorm import GradNorm, MultiTaskModule
from lightning_gradnorm.experiments.problems.dense.networks import DeepLabHead
from lightning_gradnorm.experiments.problems.dense.nyuv2 import NYUv2
from lightning_gradnorm.experiments.problems.dense.rooms import RoomsDataModule
from lightning_gradnorm.experiments.problems.dense.tasks import nyuv2_tasks

SIZE = (12, 16)
Make = Callable[..., L.LightningDataModule]


@pytest.fixture(params=["rooms", "nyuv2"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """`make(batch_size=2)` has nine training images, two or more for validation."""
    sizes: dict[str, Any] = {"input_size": SIZE, "output_size": (6, 8), "tasks": ["depth", "normals"]}
    if request.param == "rooms":
        return partial(RoomsDataModule, **sizes, train_size=9, val_size=3, test_size=1)
    write_mtan(tmp_path / "nyuv2", frames(19, size=SIZE), frames(1, first=19, size=SIZE))
    return partial(NYUv2, tmp_path / "nyuv2", **sizes, check=False, seed=0)


def network() -> MultiTaskModule:
    torch.manual_seed(0)
    head = partial(DeepLabHead, channels=4, dropout=0)  # whose random state is in no checkpoint
    return MultiTaskModule(nn.Conv2d(3, 8, 3, 2, 1), nyuv2_tasks(["depth", "normals"], 8, head=head))


@pytest.fixture
def fit(quiet_trainer: Callable[..., L.Trainer]) -> Callable[..., list[int]]:
    """`fit(data)` trains with DeepLab heads and returns how many images the batches had."""

    def run(data: L.LightningDataModule, **options: Any) -> list[int]:
        sizes: list[int] = []
        notes = LambdaCallback(on_train_batch_end=lambda trainer, model, out, batch, i: sizes.append(len(batch[0])))
        quiet_trainer(callbacks=[GradNorm(), notes], **options).fit(network(), data)
        return sizes

    return run


def test_a_last_batch_of_one_image_is_an_error_that_explains_how_to_drop_it(make: Make, fit: Any) -> None:
    with pytest.raises(ValueError, match=r"DeepLabHead: a training batch should have 2 images .*: drop_last=True"):
        fit(make(batch_size=2))


def test_it_can_be_left_out(make: Make, fit: Any) -> None:
    assert fit(make(batch_size=2, drop_last=True), max_epochs=2) == [2, 2, 2, 2] * 2
    assert fit(make(batch_size=3, drop_last=True)) == [3, 3, 3]


def test_validation_and_test_leave_nothing_out(make: Make) -> None:
    data: Any = make(batch_size=2, drop_last=True)
    data.setup()
    for loader, images in ((data.val_dataloader(), data.val_data), (data.test_dataloader(), data.test_data)):
        assert sum(len(batch[0]) for batch in loader) == len(images)


def test_each_epoch_leaves_out_other_images(make: Make) -> None:
    data: Any = make(batch_size=8, drop_last=True)
    data.setup()
    loader, seen = data.train_dataloader(), []
    for epoch in range(6):
        loader.sampler.set_epoch(epoch)
        ((images, _),) = loader
        seen.append({image.sum().item() for image in images})
    assert len(set.union(*seen)) == 9
    assert all(len(of_epoch) == 8 for of_epoch in seen)


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 4, 5])
def test_a_run_resumed_within_an_epoch_is_bit_identical(quiet_trainer: Any, tmp_path: Path, step: int) -> None:
    rooms = partial(RoomsDataModule, SIZE, (6, 8), ["depth", "normals"], 9, 3, 1, batch_size=2, drop_last=True)

    def run(**options: Any) -> dict[str, torch.Tensor]:
        save = LambdaCallback(
            on_train_batch_end=lambda trainer, *_: trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")
        )
        model = network()
        quiet_trainer(max_epochs=2, callbacks=[GradNorm(), save]).fit(model, rooms(), **options)
        return model.state_dict()

    whole = run()
    resumed = run(ckpt_path=tmp_path / f"{step}.ckpt", weights_only=True)
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


def test_on_two_ranks_each_leaves_out_its_own(make: Make, quiet_trainer: Any, tmp_path: Path) -> None:
    def write(trainer: L.Trainer, model: L.LightningModule) -> None:
        (tmp_path / f"rank_{trainer.global_rank}").write_text(str(trainer.global_step))
        trainer.strategy.barrier()

    options = {"devices": 2, "strategy": "ddp_fork", "callbacks": [LambdaCallback(on_train_end=write)]}
    # Five images each, of nine: one is repeated.
    quiet_trainer(**options).fit(network(), make(batch_size=4, drop_last=True))
    assert [(tmp_path / f"rank_{rank}").read_text() for rank in (0, 1)] == ["1", "1"]


def test_if_nothing_is_left_the_batch_size_is_named(make: Make, fit: Any) -> None:
    with pytest.raises(ValueError, match=r"batch_size should be at most 9, .* \(drop_last\); got 10"):
        fit(make(batch_size=10, drop_last=True))
