"""Support for processes started by torchrun or SLURM, on one machine or several. They all write to one folder."""

from __future__ import annotations

import os
import time
from datetime import timedelta

_PATIENCE = timedelta(minutes=10)
"""How long a process waits for the first one to start. Some machines load the packages more slowly than others."""


def _by_torchrun() -> bool:
    """Return True if torchrun started this process, according to Lightning."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    return TorchElasticEnvironment.detect()


def _job_id() -> int | None:
    """Return the SLURM job ID of this process, according to Lightning."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment

    return SLURMEnvironment.job_id()


def rank() -> int:
    """Return this process's rank if torchrun or SLURM started it, otherwise 0."""
    if _by_torchrun():
        return int(os.environ["RANK"])
    return int(os.environ.get("SLURM_PROCID", 0)) if _slurm_job() is not None else 0


def began() -> str:
    """Return the last part of the run folder's name: the start time, or the SLURM job.

    It is the same in all processes, although each has its own clock and start time. With torchrun, all use the time of the
    first process, shared through the rendezvous store. With SLURM, all use the job ID.
    """
    now = time.strftime("%Y-%m-%d_%H-%M-%S")
    if _by_torchrun():
        return _that_of_the_first(now)
    return _slurm_job() or now


def _that_of_the_first(value: str) -> str:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):  # no store yet, see `guards.OneFolder`
        return value
    from torch.distributed.rendezvous import rendezvous

    store, rank, _ = next(rendezvous("env://", timeout=_PATIENCE))
    key = f"gradnorm-train/began/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    if rank == 0:
        store.set(key, value)
    return bytes(store.get(key)).decode()


def _slurm_job() -> str | None:
    """Return the name of the job if it has several processes that srun started."""
    job, tasks = _job_id(), int(os.environ.get("SLURM_NTASKS", 1))
    if job is None or tasks == 1:
        return None
    return f"job_{job}_{os.environ.get('SLURM_STEP_ID', 0)}"  # a job may train several times, once per step


def refuse_without_launcher(trainer: str | None) -> None:
    """Refuse to train in a single process if the trainer expects processes from torchrun or srun.

    Args:
        trainer: the chosen option of the group ``trainer``.

    Raises:
        ValueError: it is ``torchrun`` or ``slurm``, but that launcher did not start this process.
    """
    is_started = {"torchrun": _by_torchrun(), "slurm": _job_id() is not None}
    by = {"torchrun": "torchrun --nproc-per-node 2 --no-python gradnorm-train", "slurm": "srun gradnorm-train"}
    if trainer in by and not is_started[trainer]:
        raise ValueError(
            f"trainer={trainer} is for processes started by {by[trainer].split()[0]}, which did not start this one. "
            f"Run `{by[trainer]} trainer={trainer} …`, or use another trainer: cpu, gpu, ddp or ddp_cpu."
        )


def overrides() -> list[str]:
    """Return overrides that make only the first process write Hydra's own record of the run."""
    return ["hydra.output_subdir=null"] if rank() > 0 else []
