"""Several processes give the weights and the network of one process on the concatenated batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from models import Automatic, multi_task_module, vector_batches
from torch.utils.data import DataLoader, DistributedSampler

from lightning_gradnorm import GradNorm

STEPS = 12
T = 3


class Rows(torch.utils.data.Dataset):
    """Single rows, so that a batch of one process and the batches of several are cut from the same list."""

    def __init__(self, pairs: bool) -> None:
        batches = vector_batches(T, STEPS, size=8)
        self.rows = [{name: value[i] for name, value in batch.items()} for batch in batches for i in range(8)]
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        row = dict(self.rows[index])
        return (row.pop("x"), row) if self.pairs else row


class Writer(L.Callback):
    """Writes each rank's final parameters and weights; waits for the others before the processes part."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        gradnorm = next(c for c in trainer.callbacks if isinstance(c, GradNorm))
        state = {name: value.detach().clone() for name, value in pl_module.state_dict().items()}
        torch.save({"weights": gradnorm.weights, "network": state}, self.folder / f"{trainer.global_rank}.pt")
        trainer.strategy.barrier()


def _fit(folder: Path, make: Any, options: dict[str, Any], ranks: int, accumulate: int = 1) -> list[dict[str, Any]]:
    folder.mkdir()
    model = make()
    automatic = model.automatic_optimization
    data = Rows(pairs=not isinstance(model, Automatic))

    class Data(L.LightningDataModule):
        def train_dataloader(self) -> DataLoader:
            sampler = DistributedSampler(data, ranks, self.trainer.global_rank, shuffle=False)
            return DataLoader(data, batch_size=8 // ranks // accumulate, sampler=sampler)

    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy="ddp_fork" if ranks > 1 else "auto",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate if automatic else 1,
        callbacks=[GradNorm(**options), Writer(folder)],
    )
    trainer.fit(model, datamodule=Data())
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def _agree(one: dict[str, Any], other: dict[str, Any], tolerance: float) -> None:
    for task, weight in one["weights"].items():
        assert abs(weight - other["weights"][task]) <= tolerance, (task, one["weights"], other["weights"])
    for name, value in one["network"].items():
        torch.testing.assert_close(value, other["network"][name], rtol=0, atol=tolerance)


NAMES = ["seg", "depth", "normal"]
AT_HEADS = {"tasks": NAMES, "shared_layer": "encoder.2", "heads": Automatic(T).heads()}
CASES = {
    "automatic, from the losses": (lambda: Automatic(T), {"tasks": NAMES, "shared_layer": "encoder.2"}),
    "automatic, at the heads": (lambda: Automatic(T), AT_HEADS),
    "activation": (lambda: Automatic(T), {**AT_HEADS, "norm_of": "activation"}),
    "MultiTaskModule": (lambda: multi_task_module(T), {}),
}


@pytest.mark.parametrize("case", CASES)
def test_two_processes_give_the_weights_of_one(tmp_path: Path, case: str) -> None:
    make, options = CASES[case]
    (one,) = _fit(tmp_path / "one", make, options, ranks=1)
    two = _fit(tmp_path / "two", make, options, ranks=2)
    assert max(abs(weight - 1) for weight in one["weights"].values()) > 0.05
    for rank in two:
        _agree(one, rank, 1e-9)


def test_two_processes_with_accumulation_give_the_weights_of_one(tmp_path: Path) -> None:
    make, options = CASES["automatic, at the heads"]
    (one,) = _fit(tmp_path / "one", make, options, ranks=1)
    for rank in _fit(tmp_path / "two", make, options, ranks=2, accumulate=2):
        _agree(one, rank, 1e-9)


class Absent(Automatic):
    """No task at all on the second rank in some steps, one task in others."""

    def training_step(self, batch, batch_idx):
        output = super().training_step(batch, batch_idx)
        if self.global_rank == 1 and batch_idx % 3 == 0:
            output |= dict.fromkeys(NAMES)
        if self.global_rank == 1 and batch_idx % 3 == 1:
            output["depth"] = None
        return output


@pytest.mark.parametrize("heads", [False, True])
def test_tasks_absent_on_one_rank_stop_nobody_and_weights_agree(tmp_path: Path, heads: bool) -> None:
    options = AT_HEADS if heads else {**AT_HEADS, "heads": None}
    first, second = _fit(tmp_path / "two", lambda: Absent(T), options, ranks=2)
    _agree(first, second, 0.0)
    assert sum(first["weights"].values()) == pytest.approx(3)
