"""The jobs of a sweep: each is done once, goes on where it stopped, and keeps no other from running if it fails."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig
from typing_extensions import override

from lightning_gradnorm._messages import did_you_mean
from lightning_gradnorm.experiments.cli import errors, hydra_entry, job_runner, run_folder
from lightning_gradnorm.experiments.cli.console import executable
from lightning_gradnorm.experiments.report import DELTA_M

if TYPE_CHECKING:
    from lightning import Trainer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

JOBS = ".jobs"
"""Below the sweep's folder, while it runs: what has come of each job, one file for each."""

DONE, BEFORE, FAILED = "done", "finished before", "failed"


class Sweep(Callback):
    """Hydra's callback that says where the sweep is: its jobs may run in other processes, on other machines."""

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir).resolve()
        shutil.rmtree(folder / JOBS, ignore_errors=True)
        hydra_entry.CommandLine.instance().sweep = folder


# ---- one job ---------------------------------------------------------------------------------------------------------


class OwnCommandNeededError(Exception):
    """Lightning would start the job's other processes by the command line, and that is the whole sweep's."""


class CommandFailedError(ValueError):
    """A job that was run as a command of its own has failed, and has said why."""


def refuse_to_replay(trainer: Trainer) -> None:
    """Let no job of a sweep start processes by the command line: each of them would run the whole sweep, out of step.

    Raises:
        OwnCommandNeededError: this one would.
    """
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

    if hydra_entry.is_multirun() and isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        raise OwnCommandNeededError


def run_job(config: DictConfig, train: Callable[[DictConfig], dict[str, float]]) -> Any:
    """Do one job of a sweep, unless it was done before.

    A job that was interrupted goes on from its last checkpoint, if it has one. One that fails is noted, and the next has
    its turn.

    Args:
        config: of the job.
        train: what trains and tests, and returns the metrics.

    Returns:
        What ``optimized_metric`` names; ``None`` if the job failed or the metric is not there, which only a search minds.
    """
    folder = Path(config.paths.run_dir)
    try:
        _refuse_a_metric_that_will_not_be(config)
        with _alone_in(folder) as lock:
            metrics, state = _metrics(config, folder, train, lock)
        result = objective(config, metrics)
    except Exception as error:
        _note_failure(folder, error)
        if _is_search():
            raise
        return None
    _note(state)
    return result


def _metrics(
    config: DictConfig, folder: Path, train: Callable[[DictConfig], dict[str, float]], lock: int | None
) -> tuple[dict[str, float], str]:
    overrides = list(HydraConfig.get().overrides.task)
    if job_runner.is_finished(folder, overrides, tested=config.test):
        print(f"{folder.name} was finished before", flush=True)
        return _recorded(folder), BEFORE
    (folder / run_folder.FAILURE).unlink(missing_ok=True)
    checkpoint = _to_go_on_from(folder, overrides, config)
    if checkpoint is not None:
        print(f"{folder.name} goes on from {checkpoint.name}", flush=True)
        config.ckpt_path = str(checkpoint)
    try:
        return train(config), DONE
    except OwnCommandNeededError:
        _run_as_command(folder, overrides, checkpoint, lock)
        return _recorded(folder), DONE


def _recorded(folder: Path) -> dict[str, float]:
    return run_folder.read_whole(folder / run_folder.LAST_METRICS) | run_folder.read_whole(folder / run_folder.METRICS)


def _to_go_on_from(folder: Path, overrides: list[str], config: DictConfig) -> Path | None:
    """Return the newest checkpoint of this job, if it is one to go on from.

    Raises:
        ValueError: it is of a run with other overrides.
    """
    found = [file for name in ("last", "interrupted") if (file := folder / f"checkpoints/{name}.ckpt").is_file()]
    if not found:
        return None
    job_runner.refuse_another(folder, overrides)
    newest = max(found, key=lambda file: file.stat().st_mtime_ns)
    if (folder / run_folder.LAST_METRICS).is_file() or not _is_of_the_end(newest, config):
        return newest
    for file in found:  # killed as the training ended: what it logged last is lost, so that it has to begin anew
        file.unlink()
    return None


def _is_of_the_end(checkpoint: Path, config: DictConfig) -> bool:
    import torch

    content: Any = torch.load(checkpoint, map_location="cpu", weights_only=True)
    epochs, steps = config.trainer.get("max_epochs"), config.trainer.get("max_steps")
    done = content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    return any(
        isinstance(limit, int) and 0 <= limit <= reached
        for limit, reached in ((epochs, done), (steps, content["global_step"]))
    )


def _run_as_command(folder: Path, overrides: list[str], checkpoint: Path | None, lock: int | None) -> None:
    """Run the job as if it had been asked for alone.

    Raises:
        CommandFailedError: it failed.
        SystemExit: it was interrupted.
    """
    given = HydraConfig.get()
    ours = [one for one in given.overrides.hydra if one.startswith(("hydra.searchpath", "hydra.job"))]
    more = [] if checkpoint is None else [f"ckpt_path={run_folder.quoted(str(checkpoint))}"]
    words = job_runner.command([*hydra_entry.config_options(), *ours, "hydra.mode=RUN", *overrides, *more], folder)
    process = subprocess.Popen(words, pass_fds=() if lock is None else (lock,))
    interrupted = False
    while process.returncode is None:
        try:
            process.wait()
        except KeyboardInterrupt:  # the terminal has sent it to the job, too, which stops in its own way
            interrupted = True
    if interrupted or process.returncode == 130:
        sys.exit(130)
    if process.returncode != 0:
        said = run_folder.read_whole(folder / run_folder.FAILURE).get("error", "see what it printed")
        raise CommandFailedError(f"gradnorm-train for this job ended with status {process.returncode}: {said}")


@contextmanager
def _alone_in(folder: Path) -> Iterator[int | None]:
    """Wait until no other process runs the job in this folder; the kernel takes the lock from whoever dies."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    if fcntl is None or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        yield None
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"{folder.name} is being run by another process; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield lock
    finally:
        os.close(lock)


# ---- what is looked for ----------------------------------------------------------------------------------------------


def objective(config: DictConfig, metrics: Mapping[str, float]) -> Any:
    """Return the metric that ``optimized_metric`` names; if it is a list, a tuple of them.

    Raises:
        ValueError: a search needs one that is not logged; says which are.
    """
    names = _wanted(config)
    missing = [name for name in names if name not in metrics]
    if missing and _is_search():
        raise ValueError(f"optimized_metric '{missing[0]}' is not logged; {did_you_mean(missing[0], metrics)}")
    if missing:
        return None
    found = tuple(metrics[name] for name in names)
    return found if isinstance(config.optimized_metric, ListConfig) else found[0]


def _wanted(config: DictConfig) -> list[str]:
    wanted = config.optimized_metric
    return [str(name) for name in (wanted if isinstance(wanted, ListConfig) else [wanted])]


def _refuse_a_metric_that_will_not_be(config: DictConfig) -> None:
    """Say before a long training what a search will miss after it."""
    if not _is_search():
        return
    for name in _wanted(config):
        if name == DELTA_M and config.get("single_task") is None:
            raise ValueError(
                f"optimized_metric={name} needs single_task=FOLDERS, the runs of one task each; it is null."
            )
        if name.startswith("test/") and not config.test:
            raise ValueError(
                f"optimized_metric={name} is a metric of the test, which test=false leaves out. Give test=true."
            )


def _is_search() -> bool:
    """Say whether the sweeper looks at the results, as Optuna's does; Hydra's own only goes through a list."""
    sweeper = HydraConfig.get().sweeper if hydra_entry.is_multirun() else None
    return sweeper is not None and not str(sweeper.get("_target_")).endswith(".BasicSweeper")


# ---- all jobs --------------------------------------------------------------------------------------------------------


def _note(state: str, error: str = "") -> None:
    given = HydraConfig.get()
    notes = Path(given.sweep.dir) / JOBS
    notes.mkdir(parents=True, exist_ok=True)
    name = Path(given.runtime.output_dir).name
    run_folder.write_whole(notes / f"{given.job.num}.json", {"job": name, "state": state, "error": error})


def _note_failure(folder: Path, error: Exception) -> None:
    is_defect = not isinstance(error, errors.wrong_input())
    if is_defect or errors.wants_traceback():
        traceback.print_exc()
    said = errors.explain(error) if not is_defect else run_folder.in_one_line(error)
    print(f"{folder.name} failed: {said}", file=sys.stderr, flush=True)
    _note(FAILED, said)
    is_ours = not ((folder / run_folder.METRICS).is_file() or (folder / run_folder.FAILURE).is_file())
    if is_ours and folder.is_dir():
        run_folder.write_whole(folder / run_folder.FAILURE, {"error": " ".join(said.split())})


@contextmanager
def told_at_the_end(command: str) -> Iterator[None]:
    """Say at the end of a sweep what has come of its jobs; name those that failed, and leave with status 1.

    Args:
        command: the command's name.

    Raises:
        SystemExit: a job failed (1), or the sweep was interrupted (130).
    """
    line = hydra_entry.CommandLine.instance()
    line.sweep = None
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as left:
        if line.sweep is None:
            raise
        if isinstance(left, SystemExit) and left.code != 130:
            _tell(command, line.sweep)
            raise
        _tell(command, line.sweep, " so far")
        print(f"Interrupted. To go on:\n  {again(command, line.sweep)}", flush=True)
        sys.exit(130)
    except BaseException:
        if line.sweep is not None:
            _tell(command, line.sweep)
        raise
    if line.sweep is not None and _tell(command, line.sweep):
        sys.exit(1)


def again(command: str, folder: Path) -> str:
    """Return the command line that goes on with the sweep in this folder."""
    words = [word for word in hydra_entry.arguments() if not word.startswith("hydra.sweep.dir=")]
    return shlex.join([executable(command), *words, f"hydra.sweep.dir={run_folder.quoted(hydra_entry.short(folder))}"])


def _tell(command: str, folder: Path, so_far: str = "") -> bool:
    """Print how many jobs were done and which failed; return whether any did."""
    notes = sorted((folder / JOBS).glob("*.json"), key=lambda file: int(file.stem))
    jobs = [run_folder.read_whole(file) for file in notes]
    shutil.rmtree(folder / JOBS, ignore_errors=True)
    if not jobs:
        return False
    of_state = {state: [job for job in jobs if job["state"] == state] for state in (DONE, BEFORE, FAILED)}
    counts = ", ".join(f"{len(found)} {state}" for state, found in of_state.items() if found)
    print(
        f"sweep folder {hydra_entry.short(folder)}: {len(jobs)} job{'s' * (len(jobs) != 1)}{so_far}, {counts}",
        flush=True,
    )
    failed = of_state[FAILED]
    if failed:
        lines = [f"  {job['job']}: {job['error']}" for job in failed]
        sys.stderr.write(
            f"{command}: {len(failed)} of {len(jobs)} jobs failed\n" + "\n".join(lines) + "\n"
            f"To run them again, and no other:\n  {again(command, folder)}\n"
        )
    return bool(failed)
