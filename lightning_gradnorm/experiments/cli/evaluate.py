"""`gradnorm-eval`: test a checkpoint with the configuration of its run, and compare it with single-task runs."""

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
    """Test a checkpoint as the command line says; ``gradnorm-eval --help`` explains it."""
    try:
        folder = _run_folder()
    except errors.wrong_input() as error:
        if errors.wants_traceback():
            raise
        errors.leave(COMMAND, error)
    if folder is None:  # the help, or the error that says how to call it
        hydra_entry.run(evaluate, command=COMMAND, folder=conf_dir(), config_name="eval")
        return
    # The run's own configuration is the one that is composed, so that data.batch_size=… is an override like any other.
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
            f"ckpt_path should lie in the folder of its run; there is no {run_folder.CONFIG} beside {checkpoint} or one folder "
            f"above. Move it back, or use MultiTaskModule.load_from_checkpoint in Python."
        )
    return folder


def _here_alone(folder: Path) -> list[str]:
    """Return what has one process test a run of several machines, which would wait for the others for ever."""
    nodes = OmegaConf.select(OmegaConf.load(folder / run_folder.CONFIG), "trainer.num_nodes", default=1)
    return ["trainer.num_nodes=1", "trainer.devices=1", "trainer.strategy=auto"] if nodes > 1 else []


def evaluate(config: DictConfig) -> dict[str, float]:
    """Test the checkpoint ``config.ckpt_path`` and print the metrics by task.

    If ``config.single_task`` names folders of runs, they stand beside those of the runs in them that have one task alone,
    with Δm as the last row.

    Args:
        config: a run's ``config.yaml`` with ``ckpt_path`` and, if wanted, ``single_task``.

    Returns:
        The test metrics.

    Raises:
        FileNotFoundError: there is no such checkpoint, or no finished run in a folder of ``single_task``.
        ValueError: no checkpoint is given, it cannot be read, its weights are of another network, or a task of it has no
            single-task run.
    """
    if config.ckpt_path is None:
        raise ValueError("ckpt_path should be given: gradnorm-eval ckpt_path=RUN/checkpoints/best.ckpt")
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
