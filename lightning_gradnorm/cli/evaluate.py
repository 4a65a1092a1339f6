"""`gradnorm-eval`: test a checkpoint with the configuration of its run."""

from __future__ import annotations

from pathlib import Path

import lightning as L
from omegaconf import DictConfig
from rich.console import Console

from lightning_gradnorm.cli import entry, errors, runs
from lightning_gradnorm.cli.build import build, build_model
from lightning_gradnorm.cli.config import conf_dir
from lightning_gradnorm.report import task_table

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
    with entry.more_overrides(["hydra.run.dir=.", "hydra.output_subdir=null", "hydra/job_logging=none"]):
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

    Args:
        config: a run's ``config.yaml`` with ``ckpt_path``.

    Returns:
        The test metrics.

    Raises:
        ValueError: no checkpoint is given, it cannot be read, or its weights are of another network.
    """
    if config.ckpt_path is None:
        raise ValueError("ckpt_path should be given: gradnorm-eval ckpt_path=RUN/checkpoints/best.ckpt")
    checkpoint = runs.find_checkpoint(config.ckpt_path)
    weights = runs.read_weights(checkpoint)
    entry.seed_everything(config.seed)
    data = build(config, "data")
    model = build_model(config)
    with runs.loading(checkpoint):
        model.load_state_dict(weights)
    trainer: L.Trainer = build(config, "trainer", logger=False, callbacks=[], enable_checkpointing=False)
    with entry.without_idle_warnings():
        trainer.test(model, datamodule=data, verbose=False)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    Console(quiet=not trainer.is_global_zero).print(task_table(metrics))
    return metrics


if __name__ == "__main__":
    main()
