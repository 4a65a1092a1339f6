"""The whole way from folders of runs to a report of them."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from lightning_gradnorm.experiments.report.collect import collect
from lightning_gradnorm.experiments.report.comparison import Comparison, compare
from lightning_gradnorm.experiments.report.markdown import markdown
from lightning_gradnorm.experiments.report.page import page

PAGE, MARKDOWN = "report.html", "report.md"
"""The files' names."""


def write_report(
    folders: Sequence[str | Path], output: str | Path, *, baseline: str | None = None, command: str = "write_report"
) -> Comparison:
    """Write ``report.html`` and ``report.md`` of all runs in and below the folders.

    Args:
        folders: of runs, of sweeps, or of anything that has some below it.
        output: the folder to write to; it is made if it is not there.
        baseline: the method or strategy that the others are tested against; by default equal weights, if there are any.
        command: what the report says that it was written by.

    Returns:
        What was compared, with all numbers.

    Raises:
        FileNotFoundError: a folder is not there, or has no run.
        ValueError: the runs have different tasks or data, there is nothing to compare, or there is no such baseline.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     write_report([folder], folder)
        Traceback (most recent call last):
        FileNotFoundError: ... is empty; a run's folder has config.yaml, overrides.yaml and, once it is finished, ...
    """
    from lightning_gradnorm import __version__  # here, for it imports this package

    comparison = compare(collect(folders), baseline)
    origin = f"Written by {command} (lightning-gradnorm {__version__}) on {datetime.date.today()}."
    texts = {PAGE: page(comparison, origin), MARKDOWN: markdown(comparison, origin)}
    Path(output).mkdir(parents=True, exist_ok=True)
    for name, content in texts.items():
        (Path(output) / name).write_text(content, encoding="utf-8")
    return comparison
