"""What refuses to train where it cannot be done as asked: no GPU, or processes that would not do together what they should."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from omegaconf import DictConfig
from torch import distributed
from typing_extensions import override


def refuse_without_gpu(config: DictConfig) -> None:
    """Say before anything is read that there is no GPU.

    Raises:
        ValueError: the trainer's accelerator is a GPU, and torch finds none.
    """
    asked = config.trainer.get("accelerator")
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if asked not in ("gpu", *found) or found.get(asked, any(found.values())):
        return
    why = "this build of torch has no CUDA" if torch.version.cuda is None else "see what nvidia-smi says"
    raise ValueError(
        f"trainer.accelerator={asked} needs a GPU, and torch {torch.__version__} finds none ({why}). Give trainer=cpu, or "
        "trainer.accelerator=auto for whatever is there."
    )


class EveryRankIsThere(L.Callback):
    """Refuses to train on part of the data: the sampler shares it out to processes that do not exist.

    That is what happens if a process is told that it is one of several (``LOCAL_RANK``) and is not.
    """

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        found = distributed.get_world_size()
        if found != trainer.world_size:
            raise ValueError(
                f"trainer.devices and trainer.num_nodes ask for {trainer.world_size} processes, which share the data; "
                f"{found} of them train{'s' * (found == 1)}. Start the command anew, and without the variable LOCAL_RANK "
                f"unless torchrun or srun sets it."
            )


class OneFolder(L.Callback):
    """Refuses to train in processes that would write into several folders.

    Args:
        folder: the run's folder, as this process knows it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder.resolve())

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        folders = [""] * distributed.get_world_size()
        distributed.all_gather_object(folders, self.folder)
        other = next((rank for rank, folder in enumerate(folders) if folder != folders[0]), None)
        if other is None:
            return
        raise ValueError(
            f"hydra.run.dir should be the same in all processes, in a folder that all machines see; got {folders[0]} in the "
            f"first process, {folders[other]} in process {other}. Give hydra.run.dir=FOLDER, an absolute path."
        )
