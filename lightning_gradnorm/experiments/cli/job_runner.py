"""A study: several runs of `gradnorm-train`, each in its own folder. Finished runs are skipped.

Scripts and sweeps on the command line share this code. It decides when a run counts as finished, and runs one as a
separate command.
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
"""The file in a run's folder with its output."""


@dataclass(frozen=True)
class Failure:
    """A run that ended without test metrics."""

    name: str
    reason: str


def carry_out(
    jobs: Mapping[str, Sequence[str]], folder: str | Path, *, at_once: int = 1, threads: int | None = None
) -> tuple[list[Run], list[Failure]]:
    """Run the unfinished jobs, each as a separate `gradnorm-train` command.

    An interrupted job starts over. A failed job does not stop the others.

    Args:
        jobs: name → command-line overrides. The name is also the run's folder below ``folder``.
        folder: folder with the runs.
        at_once: number of runs in parallel.
        threads: CPU threads per run; ``None`` for torch's default.

    Returns:
        The finished runs and the failed ones, both in the order of the jobs.

    Raises:
        ValueError: a finished run has the name of a job but different overrides.
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
    """Return True if the run with these overrides is finished in this folder.

    Args:
        folder: folder of the run.
        overrides: command-line overrides, in any order.
        tested: True if the run ends with the test, False if it ends with training.

    Raises:
        ValueError: the folder has a finished run with other overrides.
    """
    if not (folder / (run_folder.METRICS if tested else run_folder.LAST_METRICS)).is_file():
        return False
    refuse_another(folder, overrides)
    return True


def refuse_another(folder: Path, overrides: Sequence[str]) -> None:
    """Refuse a folder with a run of other overrides.

    Raises:
        ValueError: the overrides differ.
    """
    before = run_folder.overrides_of(folder)
    if before is None or _of_the_run(before) != _of_the_run(overrides):
        known = "unknown options" if before is None else " ".join(before)
        raise ValueError(
            f"{folder} should be a run with {' '.join(overrides)}; got a run with {known}. Choose another folder, or "
            f"remove the run."
        )


def _of_the_run(overrides: Sequence[str]) -> list[str]:
    """Return the sorted overrides without ``optimized_metric``, which does not change the run."""
    return sorted(override for override in overrides if not override.startswith("optimized_metric="))


def command(overrides: Sequence[str], folder: Path) -> list[str]:
    """Return the command that trains with these overrides in this folder, independent of how this Python was started."""
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
