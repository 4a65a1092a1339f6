"""A study: runs of `gradnorm-train`, each in a folder of its own; one that is finished is not run again.

What a script's study and a sweep on the command line have in common is here: when a run counts as finished, and how one
is run as a command of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lightning_gradnorm._messages import check
from lightning_gradnorm.experiments.cli import run_folder
from lightning_gradnorm.experiments.report import Run, read_run

LOG = "output.txt"
"""What a run printed, in its folder."""


@dataclass(frozen=True)
class Failure:
    """A run that ended without test metrics."""

    name: str
    reason: str


def carry_out(
    jobs: Mapping[str, Sequence[str]], folder: str | Path, *, at_once: int = 1, threads: int | None = None
) -> tuple[list[Run], list[Failure]]:
    """Run the jobs that are not finished yet, each as a `gradnorm-train` of its own.

    A job that was interrupted begins anew; one that fails does not keep the others from running.

    Args:
        jobs: name, which is that of the run's folder below ``folder``, to the overrides of the command line.
        folder: where the runs are.
        at_once: how many run side by side.
        threads: of the processor, for each run; ``None`` for torch's default.

    Returns:
        The finished runs and those that failed, both in the order of the jobs.

    Raises:
        ValueError: a finished run has the name of a job, but was started with other overrides.
    """
    check("carry_out", at_once >= 1, "at_once", "1 or more", at_once)
    folder = Path(folder).resolve()
    waiting = [name for name, overrides in jobs.items() if not is_finished(folder / name, overrides)]
    done = len(jobs) - len(waiting)
    failures: dict[str, Failure] = {}

    def run(name: str) -> str | None:
        return _run(folder / name, jobs[name], threads)

    with ThreadPoolExecutor(at_once) as pool:
        for number, (name, reason) in enumerate(zip(waiting, pool.map(run, waiting), strict=True), start=done + 1):
            if reason is not None:
                failures[name] = Failure(name, reason)
            print(f"[{number}/{len(jobs)}] {name}{'' if reason is None else ' failed'}", flush=True)
    finished = [read_run(folder / name, name) for name in jobs if name not in failures]
    return finished, list(failures.values())


def is_finished(folder: Path, overrides: Sequence[str], *, tested: bool = True) -> bool:
    """Say whether the run with these overrides was done to the end in this folder.

    Args:
        folder: of the run.
        overrides: of the command line, in any order.
        tested: whether the run ends with the test; otherwise with training.

    Raises:
        ValueError: a run was done to the end there, but with other overrides.
    """
    if not (folder / (run_folder.METRICS if tested else run_folder.LAST_METRICS)).is_file():
        return False
    refuse_another(folder, overrides)
    return True


def refuse_another(folder: Path, overrides: Sequence[str]) -> None:
    """Say that what lies in the folder is of a run with other overrides.

    Raises:
        ValueError: it is.
    """
    before = run_folder.overrides_of(folder)
    if before is None or _of_the_run(before) != _of_the_run(overrides):
        known = "something unknown" if before is None else " ".join(before)
        raise ValueError(
            f"{folder} should be a run of {' '.join(overrides)}; it is one of {known}. Choose another folder, or "
            f"remove the run."
        )


def _of_the_run(overrides: Sequence[str]) -> list[str]:
    """Return the overrides in order, without that which only says what a search looks at afterwards."""
    return sorted(override for override in overrides if not override.startswith("optimized_metric="))


def command(overrides: Sequence[str], folder: Path) -> list[str]:
    """Return the command that trains with these overrides in this folder, whatever the current Python was started with."""
    module = "lightning_gradnorm.experiments.cli.train"
    return [sys.executable, "-m", module, *overrides, f"hydra.run.dir={run_folder.quoted(str(folder))}"]


def _run(folder: Path, overrides: Sequence[str], threads: int | None) -> str | None:
    """Run one job; return why it failed, or None."""
    folder.mkdir(parents=True, exist_ok=True)
    environment = os.environ | ({} if threads is None else {"OMP_NUM_THREADS": str(threads)})
    words = command(overrides, folder)
    with (folder / LOG).open("w") as log:
        status = subprocess.run(words, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False).returncode
    if status == 0 and (folder / run_folder.METRICS).is_file():
        return None
    printed = [line for line in (folder / LOG).read_text().splitlines() if line.strip() and not line.startswith("(")]
    return f"status {status}: {printed[-1] if printed else 'it printed nothing'} (see {folder / LOG})"
