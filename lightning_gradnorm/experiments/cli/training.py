"""One run of `gradnorm-train`, from the configuration to the test metrics."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import lightning as L
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from omegaconf import DictConfig
from rich.console import Console

from lightning_gradnorm import MultiTaskModule
from lightning_gradnorm.experiments.callbacks.console import LossBar, ShowNetwork
from lightning_gradnorm.experiments.callbacks.save_last import SaveLast, write_whole
from lightning_gradnorm.experiments.callbacks.save_on_interrupt import SaveOnInterrupt
from lightning_gradnorm.experiments.cli import (
    errors,
    guards,
    hparams,
    hydra_entry,
    records,
    run_folder,
    single_task,
    sweep,
)
from lightning_gradnorm.experiments.cli.build import build, build_model
from lightning_gradnorm.experiments.cli.console import executable
from lightning_gradnorm.experiments.report import DELTA_M, delta_m_or_none, task_table, write_metrics

COMMAND = "gradnorm-train"


def train(config: DictConfig) -> dict[str, float]:
    """Train, test and write the run's folder, ``config.paths.run_dir``.

    The folder contains ``config.yaml`` (resolved), ``checkpoints/``, the loggers' files, ``training.json`` (seconds,
    steps, epochs), ``metrics.json``, ``test_metrics.json`` and, with a balancing strategy, ``weights.json``. A failed run
    writes ``failure.json``.

    Args:
        config: the composed ``conf/config.yaml``.

    Returns:
        The last metrics of training, validation and test.

    Raises:
        ValueError, TypeError: an option is wrong; the message names it.
        SystemExit: Ctrl-C stopped the run; status 130.
    """
    guards.refuse_without_gpu(config)
    run_dir = Path(config.paths.run_dir)
    resumed_from = None if config.ckpt_path is None else run_folder.find_checkpoint(config.ckpt_path)
    if resumed_from is not None:
        run_folder.read_weights(resumed_from)  # before anything is written
    hydra_entry.seed_everything(config.seed)
    single = single_task.results_in(config.get("single_task"))
    data = build(config, "data")
    model = build_model(config)
    if isinstance(model, MultiTaskModule):
        _refuse_flags_that_the_module_has(config.trainer)
        if single is not None:
            to_come = {f"test/{name}/{task}": 1.0 for task in model.tasks for name in model.metric_names[task]}
            single_task.refuse_half_a_comparison(to_come, single)
    alone = _the_only_task(config)
    balancing = build(config, "balancing") if alone is None else None
    given = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    weights_record = records.WeightsRecord(run_dir, balancing)
    options = hparams.options(
        config, alone=alone, overrides=hydra_entry.swept(given) if hydra_entry.is_multirun() else given
    )
    line = hparams.HParamsRecord(options, delta_m=single is not None)
    its_folder = (
        records.RunRecord(run_dir, config, given),
        records.TimeRecord(run_dir),
        records.FailureRecord(run_dir),
    )
    written = (*its_folder, weights_record, line)
    refusals = (guards.EveryRankIsThere(), guards.OneFolder(run_dir))
    callbacks = [one for one in (*refusals, balancing, *_all_of(config, "callbacks"), *written) if one is not None]
    loggers = _all_of(config, "logger")
    if not loggers:  # LearningRateMonitor needs one
        callbacks = [one for one in callbacks if not isinstance(one, LearningRateMonitor)]
    shown = _shown(config.trainer)
    trainer: L.Trainer = build(
        config, "trainer", callbacks=[*callbacks, *shown], logger=loggers, enable_model_summary=False
    )
    sweep.refuse_to_replay(trainer)
    write_whole(trainer)

    terminal = Console(quiet=not trainer.is_global_zero)
    prefix, told = getattr(data, "stands_in_for", (None, ""))
    if prefix is not None and (hydra_entry.chosen("experiment") or "").startswith(prefix):
        terminal.print(told, highlight=False)
    if alone is not None and "_target_" in config.balancing:
        terminal.print(f"One task, {alone}: there is nothing to balance.", highlight=False)
    if resumed_from is not None and (end := run_folder.reached_limit(resumed_from, config.trainer)) is not None:
        limit, reached = end
        length = f"{reached} {limit.removeprefix('max_')}" if reached != 1 else limit.removeprefix("max_")[:-1]
        terminal.print(
            f"This run has finished its {length}; add trainer.{limit}=… to train longer.",
            highlight=False,
        )
    in_folder_of_before = hydra_entry.is_multirun() or _is_inside(resumed_from, run_dir)
    with hydra_entry.without_idle_warnings(in_folder_of_before=in_folder_of_before):
        try:
            with errors.of_processes(), run_folder.loading(resumed_from):
                trainer.fit(model, datamodule=data, ckpt_path=resumed_from)
        except SystemExit:
            if not trainer.interrupted:
                raise
            terminal.print(_how_to_resume(trainer), soft_wrap=True, highlight=False)
            sys.exit(130)
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        if resumed_from is not None and not metrics:  # nothing was left to train
            metrics = run_folder.read_whole(run_dir / run_folder.LAST_METRICS)
        if trainer.is_global_zero:
            run_folder.write_whole(run_dir / run_folder.LAST_METRICS, metrics)
        if config.test:
            trainer.callback_metrics.clear()  # forked processes add to them
            trainer.test(model, datamodule=data, ckpt_path=_to_test(trainer), verbose=False)
            tested = {name: float(value) for name, value in trainer.callback_metrics.items()}
            gain = _compared(trainer, tested, single)
            metrics |= tested | gain
    if trainer.is_global_zero:
        if config.test:
            run_folder.write_whole(run_dir / run_folder.LAST_METRICS, metrics)
            write_metrics(run_dir, tested)  # written last: it marks a run as finished
            terminal.print(task_table(tested | gain, weights_record.read().get("weights")))
        terminal.print(f"run folder   {hydra_entry.short(run_dir)}", soft_wrap=True, highlight=False)
        if any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
            terminal.print(_how_to_look(run_dir), soft_wrap=True, highlight=False)
    return metrics


def _compared(trainer: L.Trainer, tested: dict[str, float], single: dict[str, float] | None) -> dict[str, float]:
    """Return Δm if it can be computed, and log it to TensorBoard."""
    delta_m = None if single is None else delta_m_or_none(tested, single)
    if delta_m is None:
        return {}
    gain = {DELTA_M: delta_m}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):  # after other processes ended, a CSVLogger would start its file over
            logger.log_metrics(gain, step=trainer.global_step)
            logger.save()
    return gain


def _how_to_look(run_dir: Path) -> str:
    """Return the command and address of the run's dashboard and, in a sweep, the address that compares its runs."""
    folder = Path(HydraConfig.get().sweep.dir) if hydra_entry.is_multirun() else run_dir
    address = "http://localhost:6006"  # TensorBoard's default
    lines = [
        f"view         {executable('tensorboard')} --logdir {shlex.quote(hydra_entry.short(folder))}",
        f"{'':13}{address}/#custom_scalars",
    ]
    if hydra_entry.is_multirun():
        lines.append(f"{'':13}{address}/#hparams compares the runs")
    return "\n".join(lines)


def _is_inside(checkpoint: Path | None, folder: Path) -> bool:
    return checkpoint is not None and checkpoint.resolve().is_relative_to(folder.resolve())


def _all_of(config: DictConfig, group: str) -> list[Any]:
    """Return the objects of a group with several named nodes, except those that are null."""
    built = []
    for name, node in (config[group] or {}).items():
        one = build(config, f"{group}.{name}")
        if one is None and node is not None:
            raise ValueError(f"{group}.{name} should be null or name a _target_; got {node!r}")
        built.append(one)
    return [one for one in built if one is not None]


def _shown(flags: DictConfig) -> list[L.Callback]:
    """Return the callbacks that show the network and the progress instead of Lightning's, unless you switch them off."""
    network = [] if flags.get("enable_model_summary") is False else [ShowNetwork()]
    return [*network, *([] if flags.get("enable_progress_bar") is False else [LossBar()])]


def _to_test(trainer: L.Trainer) -> str | None:
    """Return the best checkpoint, or else the last, or ``None`` to test the current model."""
    checkpoint = trainer.checkpoint_callback
    if not isinstance(checkpoint, ModelCheckpoint) or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    return checkpoint.best_model_path or checkpoint.last_model_path or None


def _the_only_task(config: DictConfig) -> str | None:
    tasks = config.get("tasks")
    return None if tasks is None or len(set(tasks)) != 1 else str(tasks[0])


def _refuse_flags_that_the_module_has(flags: DictConfig) -> None:
    """Refuse Trainer flags that do not work with manual optimization, and name the model option to use instead."""
    for flag, off in (("accumulate_grad_batches", (1,)), ("gradient_clip_val", (None, 0))):
        value = flags.get(flag, off[0])
        if value not in off:
            raise ValueError(
                f"trainer.{flag} should not be set for a MultiTaskModule, which optimizes manually; got {value}. Use "
                f"model.{flag}={value} instead."
            )


def _how_to_resume(trainer: L.Trainer) -> str:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    saved = [c.checkpoint for c in callbacks if isinstance(c, SaveOnInterrupt) and c.interrupted]
    saved += [c.checkpoint for c in callbacks if isinstance(c, SaveLast)]
    saved += [Path(c.last_model_path) for c in callbacks if isinstance(c, ModelCheckpoint) and c.last_model_path]
    existing = [path for path in saved if path.is_file()]
    if not existing:
        return "Interrupted; there is no checkpoint yet."
    if hydra_entry.is_multirun():
        return "Interrupted."  # the sweep prints at its end how to resume all of it
    words = [
        executable(COMMAND),
        *hydra_entry.config_options(),
        f"ckpt_path={run_folder.quoted(hydra_entry.short(existing[0]))}",
    ]
    return f"Interrupted. Resume with:\n  {shlex.join(words)}"
