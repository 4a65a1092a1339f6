"""Finds the configurations, and registers the resolvers and schemas that they use."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.utils import get_object
from omegaconf import MISSING, DictConfig, OmegaConf

from lightning_gradnorm.experiments.cli import signatures
from lightning_gradnorm.experiments.cli.build import build
from lightning_gradnorm.experiments.cli.schema import schema_from, schema_of
from lightning_gradnorm.experiments.strategy_kinds import SAYS_THE_TASKS, help_text

_PROBLEMS = "lightning_gradnorm.experiments.problems"
_CALLBACKS = "lightning_gradnorm.experiments.callbacks"
_STRATEGIES = "lightning_gradnorm.strategies"

_OURS = (
    f"{_PROBLEMS}.engines.cmapss.CMAPSS",
    f"{_PROBLEMS}.dense.predictions_callback.DensePredictions",
    "lightning.pytorch.loggers.CSVLogger",
    "lightning.pytorch.callbacks.LearningRateMonitor",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    f"{_PROBLEMS}.small.MultiMNISTDataModule",
    "lightning_gradnorm.MultiTaskModule",
    f"{_PROBLEMS}.dense.nyuv2.NYUv2",
    f"{_PROBLEMS}.dense.rooms.RoomsDataModule",
    f"{_CALLBACKS}.loss_ratios.LossRatios",
    f"{_CALLBACKS}.save_last.SaveLast",
    f"{_CALLBACKS}.save_on_interrupt.SaveOnInterrupt",
    f"{_CALLBACKS}.weights_image.WeightsImage",
    f"{_PROBLEMS}.small.SinusoidsDataModule",
    *(
        f"{_PROBLEMS}.pde.{name}"
        for name in (
            "Burgers",
            "CollocationDataModule",
            "Helmholtz",
            "KirchhoffPlate",
            "PINN",
            "Poisson",
            "SolutionPicture",
        )
    ),
    f"{_PROBLEMS}.tabular.TabularDataModule",
    "lightning_gradnorm.callbacks.TensorBoardDashboard",
    "lightning.pytorch.loggers.TensorBoardLogger",
    f"{_PROBLEMS}.small.ToyDataModule",
    "lightning.Trainer",
    f"{_PROBLEMS}.engines.turbofan.TurbofanDataModule",
)
"""Schemas for defaults lists, such as ``/schema/Trainer@_here_``, besides the public callbacks and strategies."""

_GIVEN_BY_US = {"MultiTaskModule": ("only",), "Trainer": ("callbacks", "logger")}
"""Parameters that are not options, because another group or a key of the main file sets them."""


@cache
def with_schema() -> dict[str, Callable[..., Any]]:
    """Return all constructors with a schema, keyed by name without ``/schema/``. Imports all of them."""
    from lightning_gradnorm.experiments.registry import SCHEMAS

    return {dotted.rpartition(".")[2]: get_object(dotted) for dotted in _OURS} | dict(SCHEMAS)


def left_out(constructor: Callable[..., Any]) -> tuple[str, ...]:
    """Return the parameters that a schema leaves out, because they are set elsewhere."""
    from lightning_gradnorm.experiments.registry import made_for_tasks

    return _GIVEN_BY_US.get(constructor.__name__, ()) or made_for_tasks(constructor)


def conf_dir() -> Path:
    """Return the folder with the configurations: the one shipped in the wheel, or the checkout's ``conf``.

    Raises:
        FileNotFoundError: neither exists, so the installation is damaged.

    Example:
        >>> (conf_dir() / "config.yaml").is_file()
        True
    """
    package = Path(__file__).resolve().parents[2]
    # A checkout has no conf inside the package. A conf next to an installed package would belong to something else.
    candidates = [package / "conf", package.parent / "conf"]
    for folder in candidates:
        if (folder / "config.yaml").is_file():
            return folder
    raise FileNotFoundError(
        f"gradnorm-train: the configurations should be in one of {', '.join(map(str, candidates))}; found none. "
        f"Install lightning-gradnorm again."
    )


def register() -> None:
    """Register the resolvers and schemas with Hydra. You may call this more than once."""
    OmegaConf.register_new_resolver("len", _length, replace=True)
    OmegaConf.register_new_resolver("first", _first, replace=True)
    OmegaConf.register_new_resolver("sum", _sum, replace=True)
    for name in ("out_channels", "out_features"):
        OmegaConf.register_new_resolver(name, partial(_of_network, name), replace=True)
    OmegaConf.register_new_resolver("of_data", _of_data, replace=True)
    OmegaConf.register_new_resolver("relative", os.path.relpath, replace=True)
    OmegaConf.register_new_resolver("strategies", lambda: help_text(conf_dir()), replace=True)
    _store_schemas()


@cache
def _store_schemas() -> None:
    store = ConfigStore.instance()
    store.repo["schema"] = _Schemas({name: _Schemas(group=name) for name in ("scalarization", "aggregation", "norms")})
    store.repo = _Shared(store.repo)


class _Shared(dict[str, Any]):
    """A dict that is never copied. Hydra would copy it whole for every composition, group look-up and schema it loads."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class _Schemas(_Shared):
    """Schemas made on first use: a command needs only a dozen of them."""

    def __init__(self, content: Mapping[str, Any] | None = None, *, group: str = "") -> None:
        super().__init__(content or {})
        self.group = group

    def __contains__(self, name: object) -> bool:
        if not super().__contains__(name):
            if not str(name).endswith(".yaml") or super().__contains__(str(name).removesuffix(".yaml")):
                return False  # a group
            made = schema_named("/".join(filter(None, [self.group, str(name).removesuffix(".yaml")])))
            if made is None:
                return False
            node = OmegaConf.structured(made)
            self[str(name)] = ConfigNode(str(name), node, "/".join(filter(None, ["schema", self.group])), None, None)
        return True


@cache
def schema_named(path: str) -> type | None:
    """Return a schema by its name without ``/schema/``, or ``None`` if no such schema exists.

    It is derived from the constructor's source, or from the imported constructor if the source is not explicit enough.

    Example:
        >>> schema_named("aggregation/MGDA")._target_
        'torchjd.aggregation.MGDA'
    """
    name = path.rpartition("/")[2]
    try:
        found, target = _definition(path)
        parameters = signatures.parameters(found)
    except signatures.UnreadableError:
        constructor = with_schema().get(path)
        if constructor is None:
            return None
        hidden = left_out(constructor)
        return schema_of(constructor, leave_out=hidden, partial=path != name and bool(hidden))
    needed = [one.name for one in parameters if one.default is signatures.REQUIRED and one.name in SAYS_THE_TASKS]
    for_tasks = needed if path != name else []
    return schema_from(target, parameters, leave_out=(*_GIVEN_BY_US.get(name, ()), *for_tasks), partial=bool(for_tasks))


def keys_of_option(file: Path) -> set[str]:
    """Return the keys of an option's file, including those of the schema that it begins with.

    Example:
        >>> {"path", "targets"} <= keys_of_option(conf_dir() / "data" / "tabular.yaml")
        True
    """
    content = OmegaConf.load(file)
    if not isinstance(content, DictConfig):
        return set()
    schemas = [
        schema_named(str(entry).removeprefix("/schema/").removesuffix("@_here_"))
        for entry in content.get("defaults", [])
        if str(entry).startswith("/schema/") and str(entry).endswith("@_here_")
    ]
    fields = [field.name for one in schemas if one is not None for field in dataclasses.fields(one)]
    return {key for key in [*map(str, content), *fields] if not key.startswith("_") and key != "defaults"}


def _definition(path: str) -> tuple[signatures.Definition, str]:
    """Return the definition of a schema's constructor and its public name.

    Raises:
        UnreadableError: the source does not contain it.
    """
    group, _, name = path.rpartition("/")
    if not group:
        dotted = next((one for one in _OURS if one.endswith(f".{name}")), f"lightning_gradnorm.{name}")
        found = signatures.find(dotted)
        return found, signatures.public_name(found)
    begins = re.compile(rf"^(class|def) {re.escape(name)}\b", re.MULTILINE)
    for file in sorted((Path(__file__).parents[2] / "strategies").glob("*.py")):
        if begins.search(file.read_text(encoding="utf-8")):
            found = signatures.find(f"{_STRATEGIES}.{file.stem}.{name}")
            is_at_the_top = signatures.public_name(found) == f"lightning_gradnorm.{name}"
            return found, f"lightning_gradnorm.{name}" if is_at_the_top else f"{_STRATEGIES}.{name}"
    found = signatures.find(f"torchjd.{group}.{name}")
    return found, signatures.public_name(found)


def _length(values: Sequence[Any]) -> int:
    return len(values)


def _first(*values: Any) -> Any:
    """Return the first value that is not null."""
    return next((value for value in values if value is not None), None)


def _sum(*numbers: int) -> int:
    return sum(numbers)


def _of_network(attribute: str, network: DictConfig) -> int:
    """Return an attribute that follows from a network's options, such as its output channels. Initializes no weights."""
    import torch

    options = {str(key): value for key, value in network.items() if key not in ("_target_", "pretrained")}
    with torch.device("meta"):
        found: int = getattr(get_object(network._target_)(**options), attribute)
    return found


def _of_data(attribute: str, data: DictConfig) -> Any:
    """Return an attribute known once the data are read, such as the number of inputs."""
    options = OmegaConf.to_container(data, resolve=True)
    assert isinstance(options, dict)
    # Some sizes do not need the files. The data module reports missing files itself.
    given = {key: "not given" if value == MISSING else value for key, value in options.items()}
    found = build(OmegaConf.create({"data": given}), "data")
    if not hasattr(type(found), attribute):
        raise ValueError(f"the model needs data with '{attribute}', such as data=tabular; got {type(found).__name__}")
    known = getattr(found, attribute)
    return OmegaConf.create(known) if isinstance(known, dict) else known  # tuples inside can be saved, but not loaded
