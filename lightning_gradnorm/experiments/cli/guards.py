"""Checks that refuse to train in a broken setup: without the requested GPU, or with processes that do not work together."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch
from omegaconf import DictConfig
from torch import distributed
from typing_extensions import override


def refuse_without_gpu(config: DictConfig) -> None:
    """Report a missing GPU before reading any data.

    Raises:
        ValueError: the trainer's accelerator is a GPU, but torch finds none.
    """
    asked = config.trainer.get("accelerator")
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if asked not in ("gpu", *found) or found.get(asked, any(found.values())):
        return
    why = "this build of torch has no CUDA" if torch.version.cuda is None else "see the output of nvidia-smi"
    raise ValueError(
        f"trainer.accelerator={asked} needs a GPU, but torch {torch.__version__} finds none ({why}). Use trainer=cpu, or "
        "trainer.accelerator=auto for any available device."
    )


class EveryRankIsThere(L.Callback):
    """Refuses to train if the sampler would give part of the data to processes that do not exist.

    This happens if ``LOCAL_RANK`` is set although the process runs alone.
    """

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not (distributed.is_available() and distributed.is_initialized()):
            return
        found = distributed.get_world_size()
        if found != trainer.world_size:
            raise ValueError(
                f"trainer.devices and trainer.num_nodes ask for {trainer.world_size} processes, which share the data; "
                f"{found} of them train{'s' * (found == 1)}. Start the command again, without the variable LOCAL_RANK "
                f"unless torchrun or srun sets it."
            )


class OneFolder(L.Callback):
    """Refuses to train if the processes would write to different folders.

    Args:
        folder: the run's folder in this process.
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
            f"first process, {folders[other]} in process {other}. Set hydra.run.dir=FOLDER, an absolute path."
        )
