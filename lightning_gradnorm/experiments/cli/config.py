"""Where the configurations are, and what they may use: resolvers and schemas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from hydra.core.config_store import ConfigStore
from hydra.utils import get_object
from lightning import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from omegaconf import MISSING, DictConfig, OmegaConf

from lightning_gradnorm import MultiTaskModule
from lightning_gradnorm.callbacks import TensorBoardDashboard
from lightning_gradnorm.experiments.callbacks.save_last import SaveLast
from lightning_gradnorm.experiments.callbacks.save_on_interrupt import SaveOnInterrupt
from lightning_gradnorm.experiments.cli.build import build
from lightning_gradnorm.experiments.cli.schema import schema_of
from lightning_gradnorm.experiments.problems.dense.nyuv2 import NYUv2
from lightning_gradnorm.experiments.problems.dense.predictions_callback import DensePredictions
from lightning_gradnorm.experiments.problems.dense.rooms import RoomsDataModule
from lightning_gradnorm.experiments.problems.engines.cmapss import CMAPSS
from lightning_gradnorm.experiments.problems.engines.turbofan import TurbofanDataModule
from lightning_gradnorm.experiments.problems.pde import (
    PINN,
    Burgers,
    CollocationDataModule,
    Helmholtz,
    KirchhoffPlate,
    Poisson,
    SolutionPicture,
)
from lightning_gradnorm.experiments.problems.small import MultiMNISTDataModule, SinusoidsDataModule, ToyDataModule
from lightning_gradnorm.experiments.problems.tabular import TabularDataModule
from lightning_gradnorm.experiments.registry import SCHEMAS, help_text, made_for_tasks

WITH_SCHEMA: dict[str, Callable[..., Any]] = {
    **{
        one.__name__: one
        for one in (
            Burgers,
            CMAPSS,
            CSVLogger,
            CollocationDataModule,
            DensePredictions,
            Helmholtz,
            KirchhoffPlate,
            LearningRateMonitor,
            ModelCheckpoint,
            MultiMNISTDataModule,
            MultiTaskModule,
            NYUv2,
            PINN,
            Poisson,
            RoomsDataModule,
            SaveLast,
            SaveOnInterrupt,
            SinusoidsDataModule,
            SolutionPicture,
            TabularDataModule,
            TensorBoardDashboard,
            TensorBoardLogger,
            ToyDataModule,
            Trainer,
            TurbofanDataModule,
        )
    },
    **SCHEMAS,
}
"""What a yaml names in its defaults list, such as ``/schema/GradNorm@_here_``; the strategies are the registry's."""

_GIVEN_BY_US = {"MultiTaskModule": ("only",), "Trainer": ("callbacks", "logger")}
"""Parameters that are no option: groups of their own make them, or a key of the main file."""


def left_out(constructor: Callable[..., Any]) -> tuple[str, ...]:
    """Return the parameters that a schema leaves out, because they are given in another way."""
    return _GIVEN_BY_US.get(constructor.__name__, ()) or made_for_tasks(constructor)


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
    OmegaConf.register_new_resolver("of_data", _of_data, replace=True)
    OmegaConf.register_new_resolver("strategies", lambda: help_text(conf_dir()), replace=True)
    _store_schemas()


@cache
def _store_schemas() -> None:
    store = ConfigStore.instance()
    for path, constructor in WITH_SCHEMA.items():
        group, _, name = f"schema/{path}".rpartition("/")
        for_tasks = bool(made_for_tasks(constructor))
        store.store(
            group=group, name=name, node=schema_of(constructor, leave_out=left_out(constructor), partial=for_tasks)
        )
    store.repo = _Shared(store.repo)


class _Shared(dict[str, Any]):
    """Is not copied: Hydra copies all that is stored each time it composes or looks into a group, and each schema it loads."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


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


def _of_data(attribute: str, data: DictConfig) -> Any:
    """Return what is known as soon as the data are read, such as the number of inputs."""
    options = OmegaConf.to_container(data, resolve=True)
    assert isinstance(options, dict)
    # Some sizes follow without the files; that these are missing is for the data themselves to say.
    given = {key: "not given" if value == MISSING else value for key, value in options.items()}
    found = build(OmegaConf.create({"data": given}), "data")
    if not hasattr(type(found), attribute):
        raise ValueError(f"the model needs data with '{attribute}', such as data=tabular; got {type(found).__name__}")
    known = getattr(found, attribute)
    return OmegaConf.create(known) if isinstance(known, dict) else known  # tuples inside could be saved, but not loaded
