"""Processes that torchrun or SLURM has started, on one machine or several: they write into one folder."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from torch.distributed.rendezvous import rendezvous
from typing_extensions import override

_PATIENCE = timedelta(minutes=10)
"""How long a process waits for the first one to begin; the machines need not be equally fast at reading the packages."""


def rank() -> int:
    """Return this process's rank among those that torchrun or SLURM has started; 0 if neither has."""
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment().global_rank()
    return int(os.environ.get("SLURM_PROCID", 0)) if _slurm_job() is not None else 0


def began() -> str:
    """Return what a run's folder is called after: when the command was given, or the SLURM job.

    It is the same in all processes. Each has a clock of its own, and starts when it can: torchrun's have the first one's
    time, by the store in which they are about to meet; those of SLURM have the number of their job.
    """
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    if TorchElasticEnvironment.detect():
        return _that_of_the_first(now)
    return _slurm_job() or now


def _that_of_the_first(value: str) -> str:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):  # there is none yet: see `OneFolder`
        return value
    store, rank, _ = next(rendezvous("env://", timeout=_PATIENCE))
    key = f"gradnorm-train/began/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if rank == 0:
        store.set(key, value)
    return bytes(store.get(key)).decode()


def _slurm_job() -> str | None:
    """Return the name of the job, if it has several processes and srun has started them."""
    job, tasks = SLURMEnvironment.job_id(), int(os.environ.get("SLURM_NTASKS", 1))
    if job is None or tasks == 1:
        return None
    return f"job_{job}_{os.environ.get('SLURM_STEP_ID', 0)}"  # a job may train several times, each time a step


def refuse_without_launcher(trainer: str | None) -> None:
    """Refuse to train as one process what was meant for as many as torchrun or srun starts.

    Args:
        trainer: the option of that group that was chosen.

    Raises:
        ValueError: it is ``torchrun`` or ``slurm``, which has not started this process.
    """
    is_started = {"torchrun": TorchElasticEnvironment.detect(), "slurm": SLURMEnvironment.job_id() is not None}
    by = {"torchrun": "torchrun --nproc-per-node 2 --no-python gradnorm-train", "slurm": "srun gradnorm-train"}
    if trainer in by and not is_started[trainer]:
        raise ValueError(
            f"trainer={trainer} is for processes that {by[trainer].split()[0]} has started, and it has not started this one. "
            f"Give the command as `{by[trainer]} trainer={trainer} …`, or another trainer: cpu, gpu, ddp or ddp_cpu."
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
        if not (dist.is_available() and dist.is_initialized()):
            return
        folders = [""] * dist.get_world_size()
        dist.all_gather_object(folders, self.folder)
        other = next((rank for rank, folder in enumerate(folders) if folder != folders[0]), None)
        if other is None:
            return
        raise ValueError(
            f"hydra.run.dir should be the same in all processes, in a folder that all machines see; got {folders[0]} in the "
            f"first process, {folders[other]} in process {other}. Give hydra.run.dir=FOLDER, an absolute path."
        )


def overrides() -> list[str]:
    """Return what only the first of several processes is to write: Hydra's own record of the run."""
    return ["hydra.output_subdir=null"] if rank() > 0 else []
