"""Where the configurations are, and what they may use: resolvers and schemas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from lightning import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import OmegaConf

from lightning_gradnorm import FixedWeights, GradNorm, MultiTaskModule
from lightning_gradnorm.callbacks import TensorBoardDashboard
from lightning_gradnorm.cli.checkpoints import SaveLast
from lightning_gradnorm.cli.interrupt import SaveOnInterrupt
from lightning_gradnorm.cli.schema import schema_of
from lightning_gradnorm.data import MultiMNISTDataModule, SinusoidsDataModule, ToyDataModule

WITH_SCHEMA: tuple[Callable[..., Any], ...] = (
    CSVLogger,
    FixedWeights,
    GradNorm,
    LearningRateMonitor,
    ModelCheckpoint,
    MultiMNISTDataModule,
    MultiTaskModule,
    SaveLast,
    SaveOnInterrupt,
    SinusoidsDataModule,
    TensorBoardDashboard,
    TensorBoardLogger,
    ToyDataModule,
    Trainer,
)
"""What a yaml names in its defaults list, for example ``/schema/GradNorm@_here_``."""

GIVEN_BY_US = {"Trainer": ("callbacks", "logger")}
"""Parameters that are no option: groups of their own make them."""


def conf_dir() -> Path:
    """Return the folder of the configurations: the one shipped in the wheel, or the checkout's ``conf``.

    Raises:
        FileNotFoundError: there is neither; the installation is damaged.

    Example:
        >>> (conf_dir() / "config.yaml").is_file()
        True
    """
    package = Path(__file__).resolve().parents[1]
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
    store = ConfigStore.instance()
    for constructor in WITH_SCHEMA:
        name = constructor.__name__
        store.store(group="schema", name=name, node=schema_of(constructor, leave_out=GIVEN_BY_US.get(name, ())))


def _length(values: Sequence[Any]) -> int:
    return len(values)


def _first(*values: Any) -> Any:
    """Return the first value that is not null."""
    return next((value for value in values if value is not None), None)
