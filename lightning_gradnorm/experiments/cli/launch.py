"""Processes that torchrun or SLURM has started, on one machine or several: they write into one folder."""

from __future__ import annotations

import os
import time
from datetime import timedelta

_PATIENCE = timedelta(minutes=10)
"""How long a process waits for the first one to begin; the machines need not be equally fast at reading the packages."""


def _by_torchrun() -> bool:
    """Say whether torchrun has started this process, as Lightning finds out."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    return TorchElasticEnvironment.detect()


def _job_id() -> int | None:
    """Return the number of the SLURM job that this process is in, as Lightning finds out."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    return SLURMEnvironment.job_id()


def rank() -> int:
    """Return this process's rank among those that torchrun or SLURM has started; 0 if neither has."""
    if _by_torchrun():
        return int(os.environ["RANK"])
    return int(os.environ.get("SLURM_PROCID", 0)) if _slurm_job() is not None else 0


def began() -> str:
    """Return what a run's folder is called after: when the command was given, or the SLURM job.

    It is the same in all processes. Each has a clock of its own, and starts when it can: torchrun's have the first one's
    time, by the store in which they are about to meet; those of SLURM have the number of their job.
    """
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    if _by_torchrun():
        return _that_of_the_first(now)
    return _slurm_job() or now


def _that_of_the_first(value: str) -> str:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):  # there is none yet: see `guards.OneFolder`
        return value
    from torch.distributed.rendezvous import rendezvous

    store, rank, _ = next(rendezvous("env://", timeout=_PATIENCE))
    key = f"gradnorm-train/began/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if rank == 0:
        store.set(key, value)
    return bytes(store.get(key)).decode()


def _slurm_job() -> str | None:
    """Return the name of the job, if it has several processes and srun has started them."""
    job, tasks = _job_id(), int(os.environ.get("SLURM_NTASKS", 1))
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
    is_started = {"torchrun": _by_torchrun(), "slurm": _job_id() is not None}
    by = {"torchrun": "torchrun --nproc-per-node 2 --no-python gradnorm-train", "slurm": "srun gradnorm-train"}
    if trainer in by and not is_started[trainer]:
        raise ValueError(
            f"trainer={trainer} is for processes that {by[trainer].split()[0]} has started, and it has not started this one. "
            f"Give the command as `{by[trainer]} trainer={trainer} …`, or another trainer: cpu, gpu, ddp or ddp_cpu."
        )


def overrides() -> list[str]:
    """Return what only the first of several processes is to write: Hydra's own record of the run."""
    return ["hydra.output_subdir=null"] if rank() > 0 else []
