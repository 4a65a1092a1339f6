"""The description of another project's model for a test, and shared helpers."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from textbook import Forward
from torch import Tensor

QUIET = {"enable_progress_bar": False, "logger": False, "enable_checkpointing": False}
STEPS = 5


@dataclass
class Project:
    """A model from another project.

    Args:
        packages: what has to be installed.
        gradnorm: the arguments of GradNorm that a user writes.
        fit: trains a new model; takes the callbacks and the Trainer's further options. Returns the model.
        losses: what a copy of the network gives for a batch.
    """

    packages: Sequence[str]
    gradnorm: Mapping[str, Any]
    fit: Callable[..., Any]
    losses: Callable[[Any, Any], Forward]
    coefficients: Mapping[str, float] = field(default_factory=dict)
    computes_in_float32: bool = False
    """Whether it does so, in part, in a model of float64 too."""
    found: str = ""
    """What GradNorm should say that it has found."""


def trainer(package: ModuleType, callbacks: Sequence[Any], **options: Any) -> Any:
    quiet = {"accelerator": "cpu", "max_epochs": 1, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return package.Trainer(**{**QUIET, **quiet, **options}, callbacks=list(callbacks))


def import_lightning(name: str = "lightning") -> ModuleType:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    return importlib.import_module(name)


def loader(*tensors: Tensor, size: int) -> Any:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*tensors), batch_size=size)
