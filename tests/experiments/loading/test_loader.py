"""A run that stops anywhere resumes as if it had not stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.types import _Stateful
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.utils.data import RandomSampler

from lightning_gradnorm.experiments.loading import EpochSampler, InMemoryDataModule, ResumableLoader, TaskTensors

BATCHES, BATCH_SIZE, EPOCHS = 5, 4, 2

# The resumed runs write no checkpoints of their own.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


class Numbered(InMemoryDataModule):
    """Sample `i` is the number `i`, so a batch shows which samples it holds."""

    def __init__(self, num_workers: int = 0, train_size: int = BATCHES * BATCH_SIZE, seed: int = 3) -> None:
        super().__init__(train_size, 4, 4, BATCH_SIZE, seed, num_workers)

    def make_splits(self) -> dict[str, TaskTensors]:
        sizes = {"train": self.train_size, "val": 4, "test": 4}
        return {
            split: TaskTensors(x := torch.arange(n).float().unsqueeze(1), {"same": x}) for split, n in sizes.items()
        }


class Recorder(L.LightningModule):
    """Remembers the samples of each batch it was trained on."""

    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(1, 1)
        self.seen: list[tuple[int, ...]] = []
        self.fail_at = fail_at

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if len(self.seen) == self.fail_at:
            raise KeyboardInterrupt
        inputs, targets = batch
        self.seen.append(tuple(inputs[:, 0].int().tolist()))
        return ((self.layer(inputs / 10) - targets["same"] / 10) ** 2).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.layer(batch[0]).mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class Manual(Recorder):
    def __init__(self, fail_at: int | None = None) -> None:
        super().__init__(fail_at)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = super().training_step(batch, batch_idx)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


def each_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.fixture
def fit(quiet_trainer: Callable[..., L.Trainer]) -> Callable[..., Recorder]:
    def run(model: Recorder, data: L.LightningDataModule, ckpt_path: Path | None = None, **options: Any) -> Recorder:
        options = {"max_epochs": EPOCHS, "enable_checkpointing": bool(options.get("callbacks")), **options}
        quiet_trainer(**options).fit(model, data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
        return model

    return run


@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.each_value_once
@pytest.mark.parametrize("kind", [Recorder, Manual])
@pytest.mark.parametrize("validate", [True, False], ids=["validating", "not validating"])
def test_run_resumed_after_any_batch_is_bit_identical(fit: Any, tmp_path: Path, kind: Any, validate: bool) -> None:
    options = {} if validate else {"limit_val_batches": 0}
    whole = fit(kind(), Numbered(), callbacks=[each_step(tmp_path)], **options)
    assert len(whole.seen) == EPOCHS * BATCHES
    for step in range(1, EPOCHS * BATCHES + 1):
        resumed = fit(kind(), Numbered(), tmp_path / f"step={step}.ckpt", **options)
        assert resumed.seen == whole.seen[step:], f"resumed after step {step}"
        for name, parameter in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], parameter), f"{name} resumed after step {step}"


@pytest.mark.parametrize(
    "step", [pytest.param(1, marks=pytest.mark.slow), 4, pytest.param(5, marks=pytest.mark.slow), 7]
)
def test_workers_that_prefetch_change_nothing(fit: Any, tmp_path: Path, step: int) -> None:
    whole = fit(Recorder(), Numbered())
    stopped = fit(Recorder(), Numbered(num_workers=2), callbacks=[each_step(tmp_path)])
    resumed = fit(Recorder(), Numbered(num_workers=2), tmp_path / f"step={step}.ckpt")
    assert stopped.seen == whole.seen
    assert resumed.seen == whole.seen[step:]


def test_run_resumed_within_an_epoch_by_steps_is_bit_identical(fit: Any, tmp_path: Path) -> None:
    steps = {"max_epochs": -1, "max_steps": EPOCHS * BATCHES}
    whole = fit(Recorder(), Numbered(), callbacks=[each_step(tmp_path)], **steps)
    for step in (2, BATCHES, BATCHES + 3):
        assert fit(Recorder(), Numbered(), tmp_path / f"step={step}.ckpt", **steps).seen == whole.seen[step:]


@pytest.mark.parametrize("moment", ["on_train_epoch_end", "on_validation_end"])
def test_run_resumed_from_the_end_of_an_epoch_begins_the_next(fit: Any, tmp_path: Path, moment: str) -> None:
    def save(trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    callback = Callback()
    setattr(callback, moment, save)
    whole = fit(Recorder(), Numbered(), callbacks=[callback], enable_checkpointing=False)
    for workers in (0, 2):
        resumed = fit(Recorder(), Numbered(workers), tmp_path / f"{BATCHES}.ckpt")
        assert resumed.seen == whole.seen[BATCHES:]


def test_run_validated_within_the_epoch_resumes_there(fit: Any, tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, filename="{step}", monitor="val_loss", save_top_k=-1)
    whole = fit(Recorder(), Numbered(), callbacks=[best], val_check_interval=2)
    resumed = fit(Recorder(), Numbered(), tmp_path / "step=2.ckpt", val_check_interval=2)
    assert resumed.seen == whole.seen[2:]


@pytest.mark.each_value_once
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("trained", [0, 2, 5, 8])
def test_batch_during_which_the_run_was_interrupted_is_trained_on_again(
    fit: Any, tmp_path: Path, trained: int, workers: int
) -> None:
    class Rescue(Callback):
        def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
            trainer.save_checkpoint(tmp_path / "rescue.ckpt")

    whole = fit(Recorder(), Numbered())
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(Recorder(fail_at=trained), Numbered(workers), callbacks=[Rescue()], enable_checkpointing=False)
    resumed = fit(Recorder(), Numbered(workers), tmp_path / "rescue.ckpt")
    assert resumed.seen == whole.seen[trained:]


def test_last_batch_may_be_smaller(fit: Any, tmp_path: Path) -> None:
    whole = fit(Recorder(), Numbered(train_size=18), callbacks=[each_step(tmp_path)])
    assert [len(batch) for batch in whole.seen] == [4, 4, 4, 4, 2] * EPOCHS
    assert fit(Recorder(), Numbered(train_size=18), tmp_path / "step=4.ckpt").seen == whole.seen[4:]


def test_limited_epochs_resume_within(fit: Any, tmp_path: Path) -> None:
    whole = fit(Recorder(), Numbered(), callbacks=[each_step(tmp_path)], limit_train_batches=3)
    resumed = fit(Recorder(), Numbered(), tmp_path / "step=2.ckpt", limit_train_batches=3)
    assert len(whole.seen) == 6
    assert resumed.seen == whole.seen[2:]


@pytest.mark.filterwarnings("ignore:You requested to overfit but enabled")
def test_overfit_batches_sees_the_first_samples_in_order(fit: Any) -> None:
    model = fit(Recorder(), Numbered(), overfit_batches=2)
    assert model.seen == [(0, 1, 2, 3), (4, 5, 6, 7)] * EPOCHS


def test_skipped_batches_are_never_loaded() -> None:
    class Watched(TaskTensors):
        loaded: ClassVar[list[int]] = []

        def __getitems__(self, indices: Any) -> Any:
            self.loaded += indices
            return super().__getitems__(indices)

    data = Watched(torch.arange(12.0), {})
    loader = ResumableLoader(data, batch_size=4, collate_fn=lambda batch: batch)
    loader.load_state_dict({**loader.state_dict(), "batches": 2})
    assert len(list(loader)) == 1
    assert Watched.loaded == [8, 9, 10, 11]
    assert len(loader) == 3


def test_epoch_after_a_resumed_one_is_whole() -> None:
    loader = ResumableLoader(range(8), sampler=EpochSampler(range(8)), batch_size=2)
    loader.load_state_dict({**loader.state_dict(), "batches": 3})
    assert len(list(loader)) == 1
    loader.sampler.set_epoch(1)
    assert len(list(loader)) == 4


def test_workers_read_the_order_of_the_epoch_set_after_iter() -> None:
    def epoch_of(workers: int, set_before: bool) -> list[list[int]]:
        loader = ResumableLoader(range(8), sampler=EpochSampler(range(8)), batch_size=2, num_workers=workers)
        if set_before:
            loader.sampler.set_epoch(4)
        batches = iter(loader)
        loader.sampler.set_epoch(4)
        return [batch.tolist() for batch in batches]

    assert epoch_of(2, set_before=False) == epoch_of(0, set_before=True)


def test_order_follows_from_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = EpochSampler(range(50), seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == list(range(50))
    assert len({tuple(order(seed, epoch)) for seed, epoch in [(0, 0), (0, 1), (5, 0), (5, 1)]}) == 4


def test_loader_leaves_the_global_random_state_alone() -> None:
    data = Numbered()
    data.setup()
    before = torch.get_rng_state()
    list(data.train_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("skip", [0, 2])
def test_two_ranks_share_each_batch_of_one_process(skip: int) -> None:
    def batches(ranks: int, rank: int, size: int) -> list[list[int]]:
        sampler = EpochSampler(range(24), seed=7, num_replicas=ranks, rank=rank)
        loader = ResumableLoader(range(24), sampler=sampler, batch_size=size)
        loader.load_state_dict({**loader.state_dict(), "epoch": 3, "batches": skip})
        return [batch.tolist() for batch in loader]

    alone, first, second = batches(1, 0, 8), batches(2, 0, 4), batches(2, 1, 4)
    assert len(alone) == len(first) == len(second) == 3 - skip
    for whole, one, other in zip(alone, first, second, strict=True):
        assert not set(one) & set(other)
        assert set(one) | set(other) == set(whole)


def test_two_processes_of_a_trainer_see_disjoint_shares(quiet_trainer: Any, tmp_path: Path) -> None:
    class Report(Callback):
        def on_train_end(self, trainer: L.Trainer, module: Any) -> None:
            torch.save(module.seen, tmp_path / f"{trainer.global_rank}.pt")
            trainer.strategy.barrier()

    quiet_trainer(devices=2, strategy="ddp_fork", callbacks=[Report()]).fit(Recorder(), Numbered(train_size=24))
    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    alone = EpochSampler(range(24), seed=3)
    expected = list(alone)
    for k, (mine, yours) in enumerate(zip(one, other, strict=True)):
        assert list(mine) == expected[8 * k : 8 * k + 8 : 2]
        assert list(yours) == expected[8 * k + 1 : 8 * k + 8 : 2]


def test_resuming_within_an_epoch_with_other_batches_is_refused() -> None:
    saved = ResumableLoader(range(8), batch_size=2)
    next(iter(saved))
    other = ResumableLoader(range(8), batch_size=4)
    with pytest.raises(ValueError, match=r"should continue with batch_size=2; got batch_size=4\. Resume with the same"):
        other.load_state_dict(saved.state_dict())


def test_resuming_between_epochs_with_other_batches_is_allowed(fit: Any, tmp_path: Path) -> None:
    class Larger(Numbered):
        def __init__(self) -> None:
            super().__init__()
            self.batch_size = 10

    fit(Recorder(), Numbered(), callbacks=[ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)])
    assert [len(batch) for batch in fit(Recorder(), Larger(), tmp_path / "epoch=0.ckpt").seen] == [10, 10]


def test_loader_is_stateful_in_lightnings_sense() -> None:
    assert isinstance(ResumableLoader(range(3)), _Stateful)


def test_sampler_whose_order_is_lost_is_refused() -> None:
    with pytest.raises(TypeError, match=r"sampler should be an EpochSampler.*got RandomSampler"):
        ResumableLoader(range(3), sampler=RandomSampler(range(3)))
