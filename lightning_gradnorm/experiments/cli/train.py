"""`gradnorm-train`: reads the command line and starts a run. `training` does the training and is imported only if needed."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

from lightning_gradnorm.experiments.cli import console, errors, hydra_entry, launch, run_folder, single_task, sweep
from lightning_gradnorm.experiments.cli.config import conf_dir
from lightning_gradnorm.experiments.report.collect import read, strategy_of

COMMAND = "gradnorm-train"


def main() -> None:
    """Train with the options on the command line. See ``gradnorm-train --help``."""
    try:
        hydra_entry.refuse_dashes(conf_dir())
        more = _options_of_resumed_run()
    except errors.wrong_input() as error:
        if errors.wants_traceback():
            raise
        errors.leave(COMMAND, error)
    with hydra_entry.more_overrides([*more, *launch.overrides()]), sweep.told_at_the_end(COMMAND):
        hydra_entry.run(_train_and_compare, command=COMMAND, folder=conf_dir(), config_name="config")


def _options_of_resumed_run() -> list[str]:
    """Return the options and the folder of the run whose checkpoint is given. Options on the command line win."""
    given = hydra_entry.given_overrides()
    path = hydra_entry.value_of("ckpt_path", given)
    folder = None if path is None else run_folder.run_folder(run_folder.find_checkpoint(path))
    if folder is None:
        return []
    options = run_folder.options_of_run(folder, given)
    if hydra_entry.value_of("search", given) is None:
        options.append("hydra.mode=RUN")  # the run may belong to a search, which would start over
    is_sweep = get_args_parser().parse_args().multirun
    if is_sweep or hydra_entry.value_of("hydra.run.dir", given) is not None:
        return options
    # The record of how the run began, including its strategy, should outlive a resume that is refused.
    return [*options, f"hydra.run.dir={run_folder.quoted(str(folder))}", "hydra.output_subdir=null"]


def _train_and_compare(config: DictConfig) -> Any:
    return sweep.run_job(config, train) if hydra_entry.is_multirun() else sweep.objective(config, train(config))


def train(config: DictConfig) -> dict[str, float]:
    """Train, test and write the run's folder. See `training.train`."""
    refuse_what_is_plainly_wrong(config)
    console.import_lightning()
    from lightning_gradnorm.experiments.cli import training

    try:
        return training.train(config)
    finally:
        _finish_wandb()


def _finish_wandb() -> None:
    """End an open run of Weights & Biases, which the next job of a sweep would otherwise continue."""
    wandb: Any = sys.modules.get("wandb")
    if getattr(wandb, "run", None) is not None:
        wandb.finish()


def refuse_what_is_plainly_wrong(config: DictConfig) -> None:
    """Check what can be checked without torch, which takes seconds to import.

    Raises:
        ValueError, FileNotFoundError: an option is wrong; the message names it.
    """
    if config.ckpt_path is not None:
        _refuse_another_strategy(config, run_folder.find_checkpoint(config.ckpt_path))
    hydra_entry.check_seed(config.seed)
    launch.refuse_without_launcher(hydra_entry.chosen("trainer"))
    single_task.results_in(config.get("single_task"))
    refuse_missing_loggers(config)
    for group in ("balancing", "trainer"):  # finds references to values of the wrong type
        OmegaConf.to_container(config[group], resolve=True)


def _refuse_another_strategy(config: DictConfig, checkpoint: Path) -> None:
    """Refuse to resume a run in its own folder with another strategy: its results would be those of a mixture.

    Raises:
        ValueError: the run was trained with another strategy.
    """
    folder = run_folder.run_folder(checkpoint)
    if folder is None or folder != Path(config.paths.run_dir).resolve():
        return
    run = read(folder, folder.name)
    old, new = strategy_of(run.group("balancing")), strategy_of(OmegaConf.to_container(config.balancing))
    chosen = hydra_entry.chosen("balancing") or new
    if not run.began or (old == new and run.strategy in (old, chosen)):
        return
    ours = hydra_entry.short(folder)
    raise ValueError(
        f"{ours} was trained with balancing={run.strategy}, so it cannot be resumed with balancing={chosen}: its results "
        f"would mix both. Leave balancing out to continue it. To start a new run from the checkpoint, add "
        f"hydra.run.dir={ours}_{chosen} and a larger trainer.max_epochs."
    )


_PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow", "CometLogger": "comet_ml", "NeptuneLogger": "neptune"}
"""Lightning's loggers that need another package."""


def refuse_missing_loggers(config: DictConfig) -> None:
    """Check that the packages of the chosen loggers are installed.

    Raises:
        ValueError: a package is not installed.
    """
    targets = [node.get("_target_") for node in (config.logger or {}).values() if isinstance(node, DictConfig)]
    needed = {one: _PACKAGES.get(str(one).rpartition(".")[2]) for one in targets}
    missing = [package for package in needed.values() if package is not None and find_spec(package) is None]
    if missing:
        names = " and ".join(missing)
        which = "which are not installed. Install them" if len(missing) > 1 else "which is not installed. Install it"
        asked = hydra_entry.chosen("logger") or missing[0]
        raise ValueError(
            f"logger={asked} needs {names}, {which}: pip install {' '.join(missing)}; "
            "or use logger=default, CSV and TensorBoard."
        )


if __name__ == "__main__":
    main()
