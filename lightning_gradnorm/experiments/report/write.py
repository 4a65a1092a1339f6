"""Writes a report from folders of runs."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from lightning_gradnorm.experiments.report.collect import collect
from lightning_gradnorm.experiments.report.comparison import Comparison, compare
from lightning_gradnorm.experiments.report.markdown import markdown
from lightning_gradnorm.experiments.report.page import page

PAGE, MARKDOWN = "report.html", "report.md"
"""File names."""


def write_report(
    folders: Sequence[str | Path], output: str | Path, *, baseline: str | None = None, command: str = "write_report"
) -> Comparison:
    """Write ``report.html`` and ``report.md`` of all runs in and below the folders.

    Args:
        folders: runs, sweeps, or any folders with runs below them.
        output: the folder to write to; created if it does not exist.
        baseline: the method or strategy to test the others against; by default equal weights, if there are such runs.
        command: the command that the report names as its origin.

    Returns:
        The comparison with all numbers.

    Raises:
        FileNotFoundError: a folder does not exist or has no run.
        ValueError: the runs have different tasks or data, there is nothing to compare, or no run has the baseline.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_report([folder], folder)
        Traceback (most recent call last):
        FileNotFoundError: ... is empty; a run's folder has config.yaml, overrides.yaml and, once it is finished, ...
    """
    from lightning_gradnorm import __version__  # imported here because it imports this package

    comparison = compare(collect(folders), baseline)
    origin = f"Written by {command} (lightning-gradnorm {__version__}) on {datetime.date.today()}."
    texts = {PAGE: page(comparison, origin), MARKDOWN: markdown(comparison, origin)}
    Path(output).mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        (Path(output) / name).write_text(content, encoding="utf-8")
    return comparison
