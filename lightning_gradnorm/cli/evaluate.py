"""`gradnorm-eval`: test a checkpoint with the configuration of its run, and compare it with single-task runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig
from rich.console import Console

from lightning_gradnorm.cli import entry, errors, runs
from lightning_gradnorm.cli.build import build, build_model
from lightning_gradnorm.cli.config import conf_dir
from lightning_gradnorm.report import (
    Run,
    comparison_table,
    delta_m_or_none,
    read_runs,
    single_task_results,
    task_table,
    tasks_of,
)

COMMAND = "gradnorm-eval"


def main() -> None:
    """Test a checkpoint as the command line says; ``gradnorm-eval --help`` explains it."""
    try:
        folder = _run_folder()
    except errors.WRONG_INPUT as error:
        if errors.wants_traceback():
            raise
        errors.leave(COMMAND, error)
    if folder is None:  # the help, or the error that says how to call it
        entry.run(evaluate, command=COMMAND, folder=conf_dir(), config_name="eval")
        return
    # The run's own configuration is the one that is composed, so that data.batch_size=… is an override like any other.
    ours = ["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none", "++single_task=null"]
    with entry.more_overrides(ours):
        entry.run(evaluate, command=COMMAND, folder=folder, config_name=Path(runs.CONFIG).stem)


def _run_folder() -> Path | None:
    path = entry.value_of("ckpt_path", entry.given_overrides())
    if path is None:
        return None
    checkpoint = runs.find_checkpoint(path)
    folder = runs.run_folder(checkpoint)
    if folder is None:
        raise FileNotFoundError(
            f"ckpt_path should lie in the folder of its run; there is no {runs.CONFIG} beside {checkpoint} or one folder "
            f"above. Move it back, or use MultiTaskModule.load_from_checkpoint in Python."
        )
    return folder


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
    checkpoint = runs.find_checkpoint(config.ckpt_path)
    weights = runs.read_weights(checkpoint)
    single_task = _single_task_results(config.get("single_task"))
    entry.seed_everything(config.seed)
    data = build(config, "data")
    model = build_model(config)
    with runs.loading(checkpoint):
        model.load_state_dict(weights)
    trainer: L.Trainer = build(config, "trainer", logger=False, callbacks=[], enable_checkpointing=False)
    with entry.without_idle_warnings():
        trainer.test(model, datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    console = Console(quiet=not trainer.is_global_zero)
    if single_task is None:
        console.print(task_table(metrics))
    else:
        both = [Run("single-task", single_task), Run("this run", metrics)]
        console.print(comparison_table(both, single_task=single_task))
        _refuse_half_a_comparison(metrics, single_task)
    return metrics


def _single_task_results(folders: Any) -> dict[str, float] | None:
    """Return the metrics of the single-task runs in these folders; ``None`` if none are given."""
    if folders is None:
        return None
    given = [folders] if isinstance(folders, str) else list(folders)
    found = single_task_results(run for folder in given for run in read_runs(folder))
    if not found:
        raise ValueError(
            f"single_task should be the folders of runs of one task each; in {', '.join(given)} there is none. Make some: "
            "gradnorm-train … 'tasks=[TASK]'."
        )
    return found


def _refuse_half_a_comparison(metrics: Mapping[str, float], single_task: Mapping[str, float]) -> None:
    """Say why there is no Δm."""
    missing = [task for task in tasks_of(metrics) if task not in tasks_of(single_task)]
    if missing:
        raise ValueError(
            f"single_task should have a run of each task, for Δm; there is none of {', '.join(missing)} alone, but of "
            f"{', '.join(tasks_of(single_task))}."
        )
    if delta_m_or_none(metrics, single_task) is None:
        raise ValueError(
            "single_task: there is no Δm without metrics of each task, the same ones in both, beside the losses."
        )


if __name__ == "__main__":
    main()
