"""The jobs of a sweep. Each runs once and resumes where it stopped. A failed job does not stop the others."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig
from typing_extensions import override

from lightning_gradnorm._messages import did_you_mean
from lightning_gradnorm.experiments.cli import console, errors, hydra_entry, job_runner, launch, run_folder
from lightning_gradnorm.experiments.cli.console import executable
from lightning_gradnorm.experiments.report import DELTA_M

if TYPE_CHECKING:
    from lightning import Trainer

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

JOBS = ".jobs"
"""A folder inside the sweep's folder with the result of each job, one file per job. It exists while the sweep runs."""

DONE, BEFORE, FAILED = "done", "finished before", "failed"


class Sweep(Callback):
    """Hydra callback that records the sweep's folder, because jobs may run in other processes or on other machines.

    For a single run it records the folders that the run will create.
    """

    @override
    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.run.dir).resolve()
        new = [one for one in (folder, *folder.parents) if not one.exists()]
        hydra_entry.CommandLine.instance().created = new if launch.rank() == 0 else []

    @override
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = Path(config.hydra.sweep.dir).resolve()
        shutil.rmtree(folder / JOBS, ignore_errors=True)
        hydra_entry.CommandLine.instance().sweep = folder


# ---- one job ---------------------------------------------------------------------------------------------------------


class OwnCommandNeededError(Exception):
    """Lightning would start the job's other processes with the command line, which is that of the whole sweep."""


class CommandFailedError(ValueError):
    """A job that ran as a separate command failed and reported why."""


def refuse_to_replay(trainer: Trainer) -> None:
    """Prevent a job of a sweep from starting processes with the command line. Each would run the whole sweep, out of sync.

    Raises:
        OwnCommandNeededError: this job would do that.
    """
    from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

    if hydra_entry.is_multirun() and isinstance(trainer.strategy.launcher, _SubprocessScriptLauncher):
        raise OwnCommandNeededError


def run_job(config: DictConfig, train: Callable[[DictConfig], dict[str, float]]) -> Any:
    """Run one job of a sweep, unless it is finished.

    An interrupted job resumes from its last checkpoint, if it has one. A failed job is recorded, and the next one starts.

    Args:
        config: configuration of the job.
        train: function that trains, tests and returns the metrics.

    Returns:
        The metric in ``optimized_metric``, or ``None`` if the job failed or did not log it. Only a search needs it.

    Raises:
        SystemExit: Ctrl-C stopped this job, or was pressed before or during it (130).
    """
    folder = Path(config.paths.run_dir)
    if hydra_entry.CommandLine.instance().interrupted and launch.rank() == 0:
        hydra_entry.remove_untouched(folder)  # Hydra has just created it
    _stop_if_interrupted()
    try:
        _refuse_a_metric_that_will_not_be(config)
        with _alone_in(folder) as lock:
            metrics, state = _metrics(config, folder, train, lock)
        result = objective(config, metrics)
    except Exception as error:
        _note_failure(folder, error)
        _stop_if_interrupted()
        if _is_search():
            raise
        return None
    _note(state)
    _stop_if_interrupted()
    return result


def _stop_if_interrupted() -> None:
    if hydra_entry.CommandLine.instance().interrupted:
        sys.exit(130)


def _metrics(
    config: DictConfig, folder: Path, train: Callable[[DictConfig], dict[str, float]], lock: int | None
) -> tuple[dict[str, float], str]:
    overrides = list(HydraConfig.get().overrides.task)
    if job_runner.is_finished(folder, overrides, tested=config.test):
        print(f"{folder.name} was finished before", flush=True)
        return _recorded(folder), BEFORE
    (folder / run_folder.FAILURE).unlink(missing_ok=True)
    checkpoint = _to_resume_from(folder, overrides, config)
    if checkpoint is not None:
        print(f"{folder.name} resumes from {checkpoint.name}", flush=True)
        config.ckpt_path = str(checkpoint)
    try:
        return train(config), DONE
    except OwnCommandNeededError:
        _run_as_command(folder, overrides, checkpoint, lock)
        return _recorded(folder), DONE


def _recorded(folder: Path) -> dict[str, float]:
    return run_folder.read_whole(folder / run_folder.LAST_METRICS) | run_folder.read_whole(folder / run_folder.METRICS)


def _to_resume_from(folder: Path, overrides: list[str], config: DictConfig) -> Path | None:
    """Return the newest checkpoint of this job if training can resume from it.

    Raises:
        ValueError: it belongs to a run with other overrides.
    """
    found = [file for name in ("last", "interrupted") if (file := folder / f"checkpoints/{name}.ckpt").is_file()]
    if not found:
        return None
    job_runner.refuse_another(folder, overrides)
    newest = max(found, key=lambda file: file.stat().st_mtime_ns)
    if (folder / run_folder.LAST_METRICS).is_file() or run_folder.reached_limit(newest, config.trainer) is None:
        return newest
    for file in found:  # killed as training ended: the last logged metrics are lost, so it has to start over
        file.unlink()
    return None


def _run_as_command(folder: Path, overrides: list[str], checkpoint: Path | None, lock: int | None) -> None:
    """Run the job as a separate command.

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
        except KeyboardInterrupt:  # the terminal also sent it to the job, which stops by itself
            interrupted = True
    if interrupted or process.returncode == 130:
        sys.exit(130)
    if process.returncode != 0:
        said = run_folder.read_whole(folder / run_folder.FAILURE).get("error", "see its output")
        raise CommandFailedError(f"gradnorm-train for this job ended with status {process.returncode}: {said}")


@contextmanager
def _alone_in(folder: Path) -> Iterator[int | None]:
    """Wait until no other process runs the job in this folder. The kernel releases the lock of a process that dies."""
    console.import_lightning()
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    if fcntl is None or rank_zero_only.rank != 0:  # type: ignore[attr-defined]
        yield None
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is running {folder.name}; waiting for it", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:  # a file system without locks
            pass
        yield lock
    finally:
        os.close(lock)


# ---- the objective of a search ---------------------------------------------------------------------------------------


def objective(config: DictConfig, metrics: Mapping[str, float]) -> Any:
    """Return the metric in ``optimized_metric``, or a tuple if that is a list.

    Raises:
        ValueError: a search needs a metric that is not logged; lists the logged ones.
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
    """Report before a long training that the search's metric will be missing after it."""
    if not _is_search():
        return
    for name in _wanted(config):
        if name == DELTA_M and config.get("single_task") is None:
            raise ValueError(f"optimized_metric={name} needs single_task=FOLDERS, the single-task runs; got null.")
        if name.startswith("test/") and not config.test:
            raise ValueError(f"optimized_metric={name} is a test metric, but test=false skips the test. Use test=true.")


def _is_search() -> bool:
    """Return True if the sweeper uses the results, as Optuna's does. Hydra's own only works through a list."""
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
    """Summarize the jobs at the end of a sweep. If any failed, list them and exit with status 1.

    Args:
        command: the command's name.

    Raises:
        SystemExit: a job failed (1), or the sweep was interrupted (130).
    """
    line = hydra_entry.CommandLine.instance()
    line.sweep, line.interrupted = None, False
    try:
        with _remembering_ctrl_c():
            yield
    except (KeyboardInterrupt, SystemExit) as left:
        if line.sweep is None:
            raise
        if isinstance(left, SystemExit) and left.code != 130 and not line.interrupted:
            _tell(command, line.sweep)
            raise
        _tell(command, line.sweep, " so far")
        print(f"Interrupted. Resume with:\n  {again(command, line.sweep)}", flush=True)
        sys.exit(130)
    except BaseException:
        if line.sweep is not None:
            _tell(command, line.sweep)
        raise
    if line.sweep is not None and _tell(command, line.sweep):
        sys.exit(1)


@contextmanager
def _remembering_ctrl_c() -> Iterator[None]:
    """Record that Ctrl-C was pressed, then do what Python does anyway: raise KeyboardInterrupt.

    Code that a job calls may swallow the exception: a destructor, a callback from C, a broad ``except``. The sweep would run
    to its end.
    """
    usual = signal.getsignal(signal.SIGINT)
    if not callable(usual) or threading.current_thread() is not threading.main_thread():
        yield  # Ctrl-C is ignored, as in the background of a shell, or handled in another thread
        return
    handle: Callable[[int, FrameType | None], Any] = usual

    def remember(signum: int, frame: FrameType | None) -> None:
        hydra_entry.CommandLine.instance().interrupted = True
        handle(signum, frame)

    signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, usual)


def again(command: str, folder: Path) -> str:
    """Return the command that resumes the sweep in this folder."""
    words = [word for word in hydra_entry.arguments() if not word.startswith("hydra.sweep.dir=")]
    return shlex.join([executable(command), *words, f"hydra.sweep.dir={run_folder.quoted(hydra_entry.short(folder))}"])


def _report_on(folder: Path) -> str:
    return f"{executable('gradnorm-report')} {shlex.quote(hydra_entry.short(folder))}"


def _tell(command: str, folder: Path, so_far: str = "") -> bool:
    """Print how many jobs are done and which ones failed. Return True if any failed."""
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
    if len(of_state[FAILED]) < len(jobs):
        print(f"compare      {_report_on(folder)}", flush=True)
    failed = of_state[FAILED]
    if failed:
        lines = [f"  {job['job']}: {job['error']}" for job in failed]
        sys.stderr.write(
            f"{command}: {len(failed)} of {len(jobs)} jobs failed\n" + "\n".join(lines) + "\n"
            f"To run only these again:\n  {again(command, folder)}\n"
        )
    return bool(failed)
