"""The smallest training of any configuration: two optimizer steps, in this process or in two that share it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import traceback
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path

import lightning as L
import torch
from configurations import compose_run, options, tiny
from omegaconf import DictConfig

from lightning_gradnorm.experiments.cli.config import conf_dir
from lightning_gradnorm.experiments.cli.train import train
from lightning_gradnorm.experiments.registry import read_strategies
from lightning_gradnorm.strategies import GradNormRule

SETTINGS = {
    "toy": ["task_0", "task_1"],
    "sinusoids": ["first", "second"],
    "multimnist": ["left", "right", "sum"],
    "toy_ten": [f"task_{i}" for i in range(10)],
    "nyuv2_seg_vgg": ["segmentation", "depth", "normals"],
    "nyuv2_seg_small": ["segmentation", "depth", "normals"],
    "nyuv2_mtan": ["segmentation", "depth", "normals"],
    "nyuv2_kpts_vgg": ["depth", "normals", "keypoints"],
    "nyuv2_kpts_resnet": ["depth", "normals", "keypoints"],
    "nyuv2_kpts_small": ["depth", "normals", "keypoints"],
    "cmapss_small": ["rul", "health"],
    "cmapss_mlp": ["rul", "health"],
    "cmapss_fd001": ["rul", "health"],
    "cmapss_fd002": ["rul", "health"],
    "cmapss_fd003": ["rul", "health"],
    "cmapss_fd004": ["rul", "health"],
    "tabular": ["a", "b"],
    "pinn_poisson": ["pde", "boundary"],
    "pinn_helmholtz": ["pde", "boundary"],
    "pinn_burgers": ["pde", "boundary", "initial"],
    "pinn_plate": ["pde", "boundary", "moment"],
}
"""The experiments with their tasks."""

STRATEGIES = read_strategies(conf_dir())

FAMILIES = ["toy_ten", "sinusoids", "multimnist", "nyuv2_seg_small", "cmapss_small", "tabular", "pinn_burgers"]
"""One of each kind of data; those on NYUv2, or on C-MAPSS, differ in numbers and networks, not in what strategies receive."""

TINY = [
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=2",
    "trainer.limit_val_batches=1",
    "trainer.num_sanity_val_steps=0",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "trainer.log_every_n_steps=1",
    "callbacks=none",
    "logger=none",
    "test=false",
    "+callbacks.steps._target_=grid.TwoSteps",
]


class TwoSteps(L.Callback):
    """Asserts that two steps were made, that the network is another one now, and the same on all ranks."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.before = self._network(pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        now = self._network(pl_module)
        assert trainer.global_step == 2
        assert now.isfinite().all()
        assert not torch.equal(now, self.before)
        if trainer.world_size > 1:
            of_all = [torch.empty_like(now) for _ in range(trainer.world_size)]
            torch.distributed.all_gather(of_all, now)
            assert all(torch.equal(one, now) for one in of_all), "the ranks have different networks"

    def _network(self, module: L.LightningModule) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


def needed(balancing: str, tasks: Sequence[str], folder: Path) -> list[str]:
    """What a strategy cannot do without."""
    if balancing == "fixed":
        return ["balancing.weights={" + ",".join(f"{task}: 1.5" for task in tasks) + "}"]
    if balancing == "lr_annealing":
        return [f"balancing.rule.residual={tasks[0]}"]
    if balancing == "gradnorm_static":
        checkpoint = folder / "gradnorm.ckpt"
        torch.save({"callbacks": {"GradNorm": GradNormRule(list(tasks)).state_dict()}}, checkpoint)
        return [f"balancing.from_run={checkpoint}"]
    if "pde" in tasks and STRATEGIES[balancing].kind == "representation":
        return ["balancing.at=parameters"]  # there are no heads that would read a representation
    return []


def composed(folder: Path, combinations: Sequence[Sequence[str]]) -> list[DictConfig]:
    """Compose each, with the run's folder in ``folder``."""
    return [compose_run(folder, *overrides) for overrides in combinations]


def combination(setting: str, balancing: str, folder: Path, *more: str) -> list[str]:
    """The overrides of one training."""
    tasks, small = SETTINGS[setting], tiny(setting)
    return [f"experiment={setting}", f"balancing={balancing}", *needed(balancing, tasks, folder), *TINY, *small, *more]


def problem(config: DictConfig) -> str | None:
    """Train; return what went wrong, if anything did."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("error")
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            metrics = train(config)
        if metrics.get("balancing/fallbacks", 0.0) != 0.0:
            return f"fallbacks: {metrics['balancing/fallbacks']}"
    except Exception:
        return traceback.format_exc()
    return None


def problems_on_two_ranks(setting: str, folder: Path, balancings: Sequence[str] | None = None) -> Mapping[str, str]:
    """Train with each of the strategies, one after the other, in one pair of processes; return what went wrong with which.

    ``trainer=ddp_cpu`` forks a pair for each run; here all share one, as torchrun would start it.
    """
    balancings = options("balancing") if balancings is None else balancings
    configs = composed(
        folder,
        [combination(setting, one, folder, "trainer=ddp_cpu", "trainer.strategy=ddp") for one in balancings],
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.start_processes(
        _rank, args=(port, dict(zip(balancings, configs, strict=True)), folder), nprocs=2, start_method="fork"
    )
    found = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    assert all(list(one) == list(balancings) for one in found)
    return {name: told for one in found for name, told in one.items() if told is not None}


def _rank(rank: int, port: int, configs: Mapping[str, DictConfig], folder: Path) -> None:
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "grid",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
    }
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=60))
    told = {name: problem(config) for name, config in configs.items()}
    (folder / f"{rank}.json").write_text(json.dumps(told))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
