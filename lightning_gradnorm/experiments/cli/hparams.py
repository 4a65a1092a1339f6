"""TensorBoard's HPARAMS tab: one line per run of a sweep, with its options and results."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.override_parser.overrides_parser import OverridesParser
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig, OmegaConf
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionStartInfo
from tensorboard.summary.writer.record_writer import RecordWriter
from typing_extensions import override

from lightning_gradnorm import MultiTaskModule
from lightning_gradnorm.experiments.callbacks.loss_ratios import OF_BEST, TOTAL, LossRatios
from lightning_gradnorm.experiments.cli import hydra_entry
from lightning_gradnorm.experiments.problems.pde import PINN
from lightning_gradnorm.experiments.report import DELTA_M
from lightning_gradnorm.experiments.report.collect import strategy_of
from lightning_gradnorm.experiments.report.methods import HOUSEKEEPING, is_below

FILE = "events.out.tfevents.0000000000.hparams"
"""A file next to the run's other events. It is replaced, because TensorBoard keeps the first options that it reads."""

_COLUMNS: dict[str, Any] = {"strategy": "", "alpha": 0.0, "seed": ""}
"""Columns of every run, filled or not, and their type. TensorBoard takes the columns of all runs from a single one."""


def options(config: DictConfig, *, alone: str | None, overrides: Sequence[str]) -> dict[str, Any]:
    """Return the options that distinguish a run from others, as plain values.

    Args:
        config: the whole configuration.
        alone: the only task of a single-task run.
        overrides: overrides on the command line, in a sweep only the varied ones. All but the housekeeping is added.
    """
    shown: dict[str, Any] = {"strategy": _strategy(config) if alone is None else f"{alone} alone"}
    if alone is None and "GradNorm" in str(config.balancing.get("_target_")) and "alpha" in config.balancing:
        shown["alpha"] = config.balancing.alpha
    shown["seed"] = str(config.seed)  # a name rather than a number: TensorBoard writes 1.0000
    known = {*_COLUMNS, "balancing", "balancing.alpha", *(["tasks"] if alone is not None else [])}
    for one in OverridesParser.create().parse_overrides(list(overrides)):
        key = one.key_or_group
        if is_below(key, HOUSEKEEPING) or key in known:
            continue
        value = OmegaConf.select(config, key) if "." in key else one.value()
        shown[key] = value if isinstance(value, bool | int | float | str) else str(value)
    return shown


def _validated(trainer: L.Trainer) -> str:
    """Return the name of the validation loss of the checkpoint to test: the best, or else the last."""
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    has_best = any(isinstance(one, ModelCheckpoint) and one.monitor is not None for one in callbacks)
    return OF_BEST if has_best and any(isinstance(one, LossRatios) for one in callbacks) else TOTAL


def _strategy(config: DictConfig) -> str:
    """Return the name of the chosen option, or of the class if the choice is not recorded."""
    return hydra_entry.chosen("balancing") or strategy_of(OmegaConf.to_container(config.balancing))


class HParamsRecord(L.Callback):
    """Writes a line of the HPARAMS tab when training begins. Its numbers are the logged scalars.

    A resumed run replaces its own line, which then shows the options it resumed with.

    Args:
        options: name → value.
        delta_m: True if Δm will be logged, as `DELTA_M`.
    """

    def __init__(self, options: Mapping[str, Any], *, delta_m: bool = False) -> None:
        self.options, self.delta_m = dict(options), delta_m

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        folders = [Path(one.log_dir) for one in trainer.loggers if isinstance(one, TensorBoardLogger)]
        if trainer.is_global_zero:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
                self._write(folder / FILE, [_validated(trainer), *self._results(pl_module)])

    def _results(self, module: L.LightningModule) -> Iterable[str]:
        """Return the names that the test will log, for all tasks, selected or not. TensorBoard shows only the first five."""
        found = module.metric_names if isinstance(module, MultiTaskModule | PINN) else {}
        if self.delta_m:
            yield DELTA_M
        if isinstance(module, PINN):
            yield "test/relative_l2"
        of_tasks = [[f"test/{metric}/{task}" for metric in metrics] for task, metrics in found.items()]
        yield from (names[0] for names in of_tasks if names)
        yield "test/loss"
        yield from (name for names in of_tasks for name in names[1:])
        yield from (f"test/loss/{task}" for task in found)

    def _write(self, file: Path, results: Iterable[str]) -> None:
        names = dict.fromkeys([*_COLUMNS, *self.options])
        columns = [
            api_pb2.HParamInfo(name=name, type=_type_of(self.options.get(name, _COLUMNS.get(name))), differs=True)
            for name in names
        ]
        metrics = [api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in results]
        now = time.time()
        session = SessionStartInfo(start_time_secs=now)
        for name, value in self.options.items():
            kind = {str: "string_value", bool: "bool_value"}.get(type(value), "number_value")
            setattr(session.hparams[name], kind, value)
        content = {
            metadata.EXPERIMENT_TAG: HParamsPluginData(
                experiment=api_pb2.Experiment(hparam_infos=columns, metric_infos=metrics, time_created_secs=now)
            ),
            metadata.SESSION_START_INFO_TAG: HParamsPluginData(session_start_info=session),
        }
        part = file.with_name("hparams.part")  # TensorBoard does not read files with this name
        with part.open("wb") as lines:
            writer = RecordWriter(lines)
            writer.write(Event(wall_time=now, file_version="brain.Event:2").SerializeToString())
            for tag, data in content.items():
                value = Summary.Value(
                    tag=tag, metadata=metadata.create_summary_metadata(data), tensor=metadata.NULL_TENSOR
                )
                writer.write(Event(wall_time=now, summary=Summary(value=[value])).SerializeToString())
        part.replace(file)


def _type_of(value: Any) -> Any:
    kinds = {str: api_pb2.DATA_TYPE_STRING, bool: api_pb2.DATA_TYPE_BOOL}
    return kinds.get(type(value), api_pb2.DATA_TYPE_FLOAT64)
