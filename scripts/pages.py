"""Shared by the scripts that fill docs/results: a quiet Lightning, and pages that record how they were made."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
import platform
import re
import shlex
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch

from lightning_gradnorm.experiments.cli.job_runner import carry_out
from lightning_gradnorm.experiments.report import PAPER, Run, by_task, higher_is_better
from lightning_gradnorm.experiments.report.results import ALL_TASKS
from lightning_gradnorm.experiments.report.significance import PairedTest, holm, paired_test

QUIET = ("trainer.enable_progress_bar=false", "trainer.enable_model_summary=false")
"""Options of `gradnorm-train` for unattended runs."""
BARE = (*(f"callbacks.{one}=null" for one in ("last", "interrupt", "learning_rate", "dashboard")), "logger=csv", *QUIET)
"""The same for runs that only write the best checkpoint and a CSV log."""


def be_quiet(threads: int = 1) -> None:
    """Silence other output, and set the number of torch's threads."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    torch.set_num_threads(threads)


def kept(folder: Path, name: str, settings: Mapping[str, object], make: Callable[[], Any]) -> Any:
    """Return the result of ``make``, cached in a file for these settings.

    Args:
        folder: folder of the files.
        name: readable name of this file.
        settings: everything the result depends on, besides the code.
        make: returns a JSON-serializable result.
    """
    settled = json.dumps({key: str(value) for key, value in settings.items()}, sort_keys=True)
    file = folder / f"{name}_{hashlib.sha256(settled.encode()).hexdigest()[:12]}.json"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        result = make()
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(result))
        unfinished.replace(file)
    return json.loads(file.read_text())


def finished_runs(
    jobs: Mapping[str, Sequence[str]], folder: Path, *, at_once: int = 1, threads: int | None = None
) -> list[Run]:
    """Run a study that needs all of its runs. If any failed, list them and exit."""
    finished, failed = carry_out(jobs, folder, at_once=at_once, threads=threads)
    for failure in failed:
        print(f"{failure.name} failed: {failure.reason}", file=sys.stderr)
    if failed:
        sys.exit(f"{len(failed)} of {len(jobs)} runs failed; repeat the command to run them again.")
    return finished


def errors(run: Run) -> dict[str, float]:
    """Return one error per task, lower is better: the paper's on NYUv2, otherwise the loss."""
    tasks = {task: row for task, row in by_task(run.metrics).items() if task != ALL_TASKS}
    found = {task: PAPER[task][0] if task in PAPER and PAPER[task][0] in row else "loss" for task, row in tasks.items()}
    assert not any(higher_is_better(metric) for metric in found.values())
    return {task: tasks[task][metric] for task, metric in found.items()}


def error_ratio(run: Run, reference: Run) -> float:
    """Return the run's errors divided by the reference's, averaged over the tasks."""
    ours, theirs = errors(run), errors(reference)
    return statistics.mean(ours[task] / theirs[task] for task in theirs)


def corrected_tests(differences: Mapping[str, Sequence[float]]) -> dict[str, tuple[PairedTest, float]]:
    """Return the paired t-test of each rival's differences, and its p value with Holm's correction."""
    tests = {rival: paired_test(values) for rival, values in differences.items()}
    corrected = holm([1.0 if test.p is None else test.p for test in tests.values()])
    return {rival: (test, p) for (rival, test), p in zip(tests.items(), corrected, strict=True)}


def write_page(path: Path, title: str, described: str, parts: Sequence[str], *, where: str = "CPU") -> Path:
    """Write a page of results: title, command, date and versions, description, and the parts.

    A hand-written section ``## What it shows`` stays on the page, above the parts.

    Args:
        path: path of the page. Its folder is created.
        title: title without #.
        described: text after the versions.
        parts: paragraphs, tables and pictures.
        where: the hardware.
    """
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {L.__version__}"
    made = f"{datetime.date.today()}, {versions}, {where}"
    arguments = ["FOLDER" if Path(one).is_absolute() else one for one in sys.argv[1:]]  # hides personal paths
    command = shlex.join(["python", f"scripts/{Path(sys.argv[0]).name}", *arguments])
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r"^## What it shows\n.*?(?=\n## |\Z)", before, re.DOTALL | re.MULTILINE)
    by_hand = [found[0].strip(), "## The numbers"] if found else []
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = [f"# {title}", f"`{command}`", *by_hand, f"{made}{described}", *parts]
    path.write_text("\n\n".join(whole) + "\n", encoding="utf-8")
    return path


def mean_and_spread(values: Sequence[float], digits: int = 4) -> str:
    """Return mean ± standard deviation (of the sample), for a table."""
    mean = f"{statistics.mean(values):,.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else mean
