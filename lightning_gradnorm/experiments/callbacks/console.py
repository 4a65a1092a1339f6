"""Terminal output of a run: a line about the network, and a progress bar with losses and weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import BarColumn
from torch import nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_gradnorm.callbacks.logging import is_logged_step

_WEIGHT = re.compile(r"(?:gradnorm|balancing)/weight/(.+)")
_MOST = 4
"""Number of task weights that fit in a line."""


class LossBar(RichProgressBar):
    """Lightning's progress bar, with the training and validation loss and the weights of up to four tasks.

    It shows the numbers of the last logged step (``log_every_n_steps``), because reading others would synchronize with the
    GPU. It also shows metrics that the model logs with ``prog_bar=True``.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[LossBar()], logger=False)
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._shown = {}
        super().on_train_start(trainer, pl_module)

    @override
    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._shown = numbers(trainer.callback_metrics)
        super().on_validation_end(trainer, pl_module)

    @override
    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        if is_logged_step(trainer) and trainer.training:
            self._shown = numbers(trainer.callback_metrics)
        return {**self._shown, **trainer.progress_bar_metrics}

    @override
    def configure_columns(self, trainer: L.Trainer) -> list[Any]:
        columns: list[Any] = super().configure_columns(trainer)
        for column in columns:
            if isinstance(column, BarColumn):
                column.bar_width = 10  # leaves room for the numbers
        return columns


def numbers(metrics: Mapping[str, Any]) -> dict[str, str]:
    """Return the part of the metrics that the bar shows.

    Example:
        >>> numbers({"train/loss": 1.23456, "val/loss": 2, "gradnorm/weight/a": 0.25, "gradnorm/weight/b": 1.75})
        {'train': '1.235', 'val': '2', 'w': 'a 0.25, b 1.75'}
    """
    losses = {name: metrics[f"{name}/loss"] for name in ("train", "val") if f"{name}/loss" in metrics}
    shown = {name: f"{float(value):.4g}" for name, value in losses.items()}
    found = {match[1]: value for name, value in metrics.items() if (match := _WEIGHT.fullmatch(name))}
    if found:
        first = [f"{task} {float(value):.3g}" for task, value in list(found.items())[:_MOST]]
        shown["w"] = ", ".join([*first, *["…"] * (len(found) > _MOST)])
    return shown


class ShowNetwork(L.Callback):
    """Prints the size of the network and its parts in one line."""

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        rank_zero_info(as_text(pl_module))


def as_text(module: nn.Module) -> str:
    """Return a line with the parameter counts of a network's parts.

    Example:
        >>> as_text(nn.ModuleDict({"encoder": nn.Linear(4, 8), "tasks": nn.ModuleDict({"a": nn.Linear(8, 1)})}))
        'Network: encoder 40, tasks.a 9; 49 parameters, all trained'
    """
    counts: dict[str, int] = {}
    total = trained = 0
    for name, parameter in module.named_parameters():
        count = 0 if is_lazy(parameter) else parameter.numel()
        path = name.split(".")
        part = ".".join(path[: 2 if path[0] == "tasks" else 1])
        counts[part] = counts.get(part, 0) + count
        total, trained = total + count, trained + count * parameter.requires_grad
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items())
    which = "all trained" if trained == total else f"{trained:,} of them trained"
    return f"Network: {parts}; {total:,} parameters, {which}"
