"""`gradnorm-eval`: tests a checkpoint with the configuration of its run, and compares it with single-task runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lightning_gradnorm.experiments.cli import console, errors, hydra_entry, run_folder, single_task
from lightning_gradnorm.experiments.cli.build import build, build_model
from lightning_gradnorm.experiments.cli.config import conf_dir
from lightning_gradnorm.experiments.report import Run, comparison_table, task_table

if TYPE_CHECKING:
    from lightning import Trainer

COMMAND = "gradnorm-eval"


def main() -> None:
    """Test the checkpoint on the command line. See ``gradnorm-eval --help``."""
    try:
        folder = _run_folder()
    except errors.wrong_input() as error:
        if errors.wants_traceback():
            raise
        errors.leave(COMMAND, error)
    if folder is None:  # prints the help, or the error that shows how to call it
        hydra_entry.run(evaluate, command=COMMAND, folder=conf_dir(), config_name="eval")
        return
    # Compose the run's own configuration, so data.batch_size=… is an override like any other.
    ours = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "++single_task=null"]
    ours += _here_alone(folder)
    with hydra_entry.more_overrides(ours):
        hydra_entry.run(evaluate, command=COMMAND, folder=folder, config_name=Path(run_folder.CONFIG).stem)


def _run_folder() -> Path | None:
    path = hydra_entry.value_of("ckpt_path", hydra_entry.given_overrides())
    if path is None:
        return None
    checkpoint = run_folder.find_checkpoint(path)
    folder = run_folder.run_folder(checkpoint)
    if folder is None:
        raise FileNotFoundError(
            f"ckpt_path should be in the folder of its run; there is no {run_folder.CONFIG} next to {checkpoint} or one folder "
            f"above. Move it back, or use MultiTaskModule.load_from_checkpoint in Python."
        )
    return folder


def _here_alone(folder: Path) -> list[str]:
    """Return overrides that test a run of several machines in one process, which would otherwise wait forever for the rest."""
    nodes = OmegaConf.select(OmegaConf.load(folder / run_folder.CONFIG), "trainer.num_nodes", default=1)
    return ["trainer.num_nodes=1", "trainer.devices=1", "trainer.strategy=auto"] if nodes > 1 else []


def evaluate(config: DictConfig) -> dict[str, float]:
    """Test the checkpoint ``config.ckpt_path`` and print the metrics of each task.

    If ``config.single_task`` names folders of runs, the table also shows the metrics of their single-task runs,
    with Δm as the last row.

    Args:
        config: a run's ``config.yaml`` with ``ckpt_path`` and optionally ``single_task``.

    Returns:
        The test metrics.

    Raises:
        FileNotFoundError: the checkpoint does not exist, or a folder of ``single_task`` has no finished run.
        ValueError: the checkpoint is not set, cannot be read, belongs to another network, or has a task without a
            single-task run.
    """
    if config.ckpt_path is None:
        raise ValueError("ckpt_path should be set: gradnorm-eval ckpt_path=RUN/checkpoints/best.ckpt")
    checkpoint = run_folder.find_checkpoint(config.ckpt_path)
    baseline = single_task.results_in(config.get("single_task"))
    console.import_lightning()
    from lightning_gradnorm.experiments.cli import guards

    guards.refuse_without_gpu(config)
    weights = run_folder.read_weights(checkpoint)
    hydra_entry.seed_everything(config.seed)
    data = build(config, "data")
    model = build_model(config)
    with run_folder.loading(checkpoint):
        model.load_state_dict(weights)
    trainer: Trainer = build(config, "trainer", logger=False, callbacks=[], enable_checkpointing=False)
    with hydra_entry.without_idle_warnings():
        trainer.test(model, datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    terminal = Console(quiet=not trainer.is_global_zero)
    if baseline is None:
        terminal.print(task_table(metrics))
    else:
        both = [Run("single-task", baseline), Run("this run", metrics)]
        terminal.print(comparison_table(both, single_task=baseline))
        single_task.refuse_half_a_comparison(metrics, baseline)
    return metrics


if __name__ == "__main__":
    main()
