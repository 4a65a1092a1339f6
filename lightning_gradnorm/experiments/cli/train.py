"""`gradnorm-train`: from the command line to a run. What trains is in `training`, and imported once it is needed."""

from __future__ import annotations

from typing import Any

from hydra._internal.utils import get_args_parser
from omegaconf import DictConfig, OmegaConf

from lightning_gradnorm.experiments.cli import console, errors, hydra_entry, launch, run_folder, single_task, sweep
from lightning_gradnorm.experiments.cli.config import conf_dir

COMMAND = "gradnorm-train"


def main() -> None:
    """Train as the command line says; ``gradnorm-train --help`` explains it."""
    try:
        more = _options_to_go_on_with()
    except errors.wrong_input() as error:
        if errors.wants_traceback():
            raise
        errors.leave(COMMAND, error)
    with hydra_entry.more_overrides([*more, *launch.overrides()]), sweep.told_at_the_end(COMMAND):
        hydra_entry.run(_train_and_compare, command=COMMAND, folder=conf_dir(), config_name="config")


def _options_to_go_on_with() -> list[str]:
    """Return the options and the folder of the run whose checkpoint is given; what is given anew prevails."""
    given = hydra_entry.given_overrides()
    path = hydra_entry.value_of("ckpt_path", given)
    folder = None if path is None else run_folder.run_folder(run_folder.find_checkpoint(path))
    if folder is None:
        return []
    options = run_folder.options_of_run(folder, given)
    if hydra_entry.value_of("search", given) is None:
        options.append("hydra.mode=RUN")  # the run may be one of a search, which would begin anew
    is_sweep = get_args_parser().parse_args().multirun
    if is_sweep or hydra_entry.value_of("hydra.run.dir", given) is not None:
        return options
    return [*options, f"hydra.run.dir={run_folder.quoted(str(folder))}"]


def _train_and_compare(config: DictConfig) -> Any:
    return sweep.run_job(config, train) if hydra_entry.is_multirun() else sweep.objective(config, train(config))


def train(config: DictConfig) -> dict[str, float]:
    """Train, test and write the run's folder; see `training.train`."""
    refuse_what_is_plainly_wrong(config)
    console.import_lightning()
    from lightning_gradnorm.experiments.cli import training

    return training.train(config)


def refuse_what_is_plainly_wrong(config: DictConfig) -> None:
    """Say what is wrong as far as that can be known without torch, which takes seconds to import.

    Raises:
        ValueError, FileNotFoundError: an option is wrong; says which.
    """
    if config.ckpt_path is not None:
        run_folder.find_checkpoint(config.ckpt_path)
    hydra_entry.check_seed(config.seed)
    launch.refuse_without_launcher(hydra_entry.chosen("trainer"))
    single_task.results_in(config.get("single_task"))
    for group in ("balancing", "trainer"):  # what refers to a value of another type
        OmegaConf.to_container(config[group], resolve=True)


if __name__ == "__main__":
    main()
