"""Where the configurations are, and what they may use: resolvers and schemas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from hydra.utils import get_object
from lightning import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from torchjd import aggregation, scalarization

from lightning_gradnorm import (
    Aggregation,
    FixedWeights,
    GradientNormMonitor,
    GradNorm,
    GradNormStatic,
    MultiTaskModule,
    RandomWeights,
    Scalarization,
)
from lightning_gradnorm.callbacks import TensorBoardDashboard
from lightning_gradnorm.experiments.callbacks.save_last import SaveLast
from lightning_gradnorm.experiments.callbacks.save_on_interrupt import SaveOnInterrupt
from lightning_gradnorm.experiments.cli.schema import schema_of
from lightning_gradnorm.experiments.problems.dense.nyuv2 import NYUv2
from lightning_gradnorm.experiments.problems.dense.predictions_callback import DensePredictions
from lightning_gradnorm.experiments.problems.dense.rooms import RoomsDataModule
from lightning_gradnorm.experiments.problems.engines.cmapss import CMAPSS
from lightning_gradnorm.experiments.problems.engines.turbofan import TurbofanDataModule
from lightning_gradnorm.experiments.problems.small import MultiMNISTDataModule, SinusoidsDataModule, ToyDataModule
from lightning_gradnorm.strategies import AMNL, DBMTL, GABA, LogSum, Uncertainty, with_equal_preferences

WITH_SCHEMA: tuple[Callable[..., Any], ...] = (
    Aggregation,
    CMAPSS,
    CSVLogger,
    DensePredictions,
    FixedWeights,
    GradNorm,
    GradNormStatic,
    GradientNormMonitor,
    LearningRateMonitor,
    ModelCheckpoint,
    MultiMNISTDataModule,
    MultiTaskModule,
    NYUv2,
    RandomWeights,
    RoomsDataModule,
    SaveLast,
    SaveOnInterrupt,
    Scalarization,
    SinusoidsDataModule,
    TensorBoardDashboard,
    TensorBoardLogger,
    ToyDataModule,
    Trainer,
    TurbofanDataModule,
)
"""What a yaml names in its defaults list, for example ``/schema/GradNorm@_here_``."""

GIVEN_BY_US = {"MultiTaskModule": ("only",), "Trainer": ("callbacks", "logger")}
"""Parameters that are no option: groups of their own make them, or a key of the main file."""

SCALARIZERS: tuple[Callable[..., Any], ...] = (
    AMNL,
    LogSum,
    Uncertainty,
    scalarization.COSMOS,
    scalarization.DWA,
    scalarization.FAMO,
    scalarization.GeometricMean,
    scalarization.IMTLL,
    scalarization.PBI,
    scalarization.Random,
    scalarization.STCH,
    scalarization.UW,
    with_equal_preferences,
)
"""Likewise, for example ``/schema/scalarization/DWA@scalarizer``."""

AGGREGATORS: tuple[Callable[..., Any], ...] = (
    DBMTL,
    GABA,
    aggregation.AlignedMTL,
    aggregation.CAGrad,
    aggregation.ConFIG,
    aggregation.CRMOGMWeighting,
    aggregation.DualProj,
    aggregation.ExcessMTL,
    aggregation.FairGrad,
    aggregation.GradDrop,
    aggregation.GradVac,
    aggregation.IMTLG,
    aggregation.Krum,
    aggregation.MGDA,
    aggregation.NashMTL,
    aggregation.PCD,
    aggregation.PCGrad,
    aggregation.Random,
    aggregation.TrimmedMean,
    aggregation.UPGrad,
    aggregation.UPGradWeighting,
)
"""Likewise, for example ``/schema/aggregation/CAGrad@aggregator``."""

MADE_FOR_TASKS = {
    "COSMOS": ("weights",),
    "FAMO": ("shape",),
    "IMTLL": ("shape",),
    "NashMTL": ("n_tasks",),
    "PBI": ("weights",),
    "UW": ("shape",),
    "with_equal_preferences": ("number_of_tasks",),
}
"""Of what is made when the number of tasks is known (``_partial_: true``): the parameters that say it."""


def conf_dir() -> Path:
    """Return the folder of the configurations: the one shipped in the wheel, or the checkout's ``conf``.

    Raises:
        FileNotFoundError: there is neither; the installation is damaged.

    Example:
        >>> (conf_dir() / "config.yaml").is_file()
        True
    """
    package = Path(__file__).resolve().parents[2]
    # A checkout has no conf inside the package. Beside an installed package, conf would be somebody else's.
    candidates = [package / "conf", package.parent / "conf"]
    for folder in candidates:
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"gradnorm-train: the configurations should be in one of {', '.join(map(str, candidates))}; found none. "
        f"Install lightning-gradnorm again."
    )


def register() -> None:
    """Make the resolvers and schemas known to Hydra; may be called more than once."""
    OmegaConf.register_new_resolver("len", _length, replace=True)
    OmegaConf.register_new_resolver("first", _first, replace=True)
    OmegaConf.register_new_resolver("sum", _sum, replace=True)
    for name in ("out_channels", "out_features"):
        OmegaConf.register_new_resolver(name, partial(_of_network, name), replace=True)
    store = ConfigStore.instance()
    for constructor in WITH_SCHEMA:
        name = constructor.__name__
        store.store(group="schema", name=name, node=schema_of(constructor, leave_out=GIVEN_BY_US.get(name, ())))
    for group, parts in (("schema/scalarization", SCALARIZERS), ("schema/aggregation", AGGREGATORS)):
        for part in parts:
            given = MADE_FOR_TASKS.get(part.__name__)
            node = schema_of(part, leave_out=given or (), partial=given is not None)
            store.store(group=group, name=part.__name__, node=node)


def _length(values: Sequence[Any]) -> int:
    return len(values)


def _first(*values: Any) -> Any:
    """Return the first value that is not null."""
    return next((value for value in values if value is not None), None)


def _sum(*numbers: int) -> int:
    return sum(numbers)


def _of_network(attribute: str, network: DictConfig) -> int:
    """Return what follows from a network's other options, such as the channels it makes; no weight is drawn for it."""
    options = {str(key): value for key, value in network.items() if key not in ("_target_", "pretrained")}
    with torch.device("meta"):
        found: int = getattr(get_object(network._target_)(**options), attribute)
    return found
