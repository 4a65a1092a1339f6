"""`gradnorm-report`: compares finished runs, as one HTML page and as Markdown."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from lightning_gradnorm.experiments.cli import errors
from lightning_gradnorm.experiments.report import write_report
from lightning_gradnorm.experiments.report.collect import FINISHED
from lightning_gradnorm.experiments.report.summary import names_of, never_began
from lightning_gradnorm.experiments.report.table import results_table
from lightning_gradnorm.experiments.report.write import MARKDOWN, PAGE

COMMAND = "gradnorm-report"

_EXAMPLES = """\
examples:
  gradnorm-train -m experiment=multimnist balancing=equal,gradnorm,upgrad seed=0,1,2 hydra.sweep.dir=RUNS
  gradnorm-report RUNS                          writes RUNS/report.html and RUNS/report.md
  gradnorm-report RUNS ALONE --output docs      adds Δm, because ALONE has single-task runs (tasks=[one])
  gradnorm-report RUNS --baseline gradnorm      compares with GradNorm instead of equal weights

Runs that differ only in the seed are one method: `gradnorm α=0.5`. The report also lists unfinished and failed runs.
"""


def main() -> None:
    """Compare the runs in the folders on the command line. See ``gradnorm-report --help``."""
    given = _parser().parse_args()
    output = Path(given.output or given.folders[0])
    command = shlex.join([COMMAND, *sys.argv[1:]])
    try:
        comparison = write_report(given.folders, output, baseline=given.baseline, command=command)
    except (ValueError, OSError) as error:
        if errors.wants_traceback():
            raise
        _leave(str(error))
    runs, methods = comparison.runs, comparison.methods
    finished = sum(run.state == FINISHED for run in runs)
    print(f"{finished} of {len(runs)} runs are finished, {len(methods)} method{'s' * (len(methods) != 1)}")
    if (table := results_table(comparison)) is not None:
        Console().print(table)
    never, others = never_began(comparison.unfinished)
    if never:
        print(f"{len(never)} runs did not begin to train: {names_of(never)}")
    for run in others:
        print("; ".join([f"{run.name}: {run.state}, {run.progress}", *run.remarks]))
    for name in (PAGE, MARKDOWN):
        print(output / name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=COMMAND,
        description="Compare runs of gradnorm-train: one self-contained HTML page, and the same as Markdown.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a run, a sweep, or any folder with runs below it")
    parser.add_argument(
        "--output", metavar="FOLDER", help="folder for report.html and report.md (default: the first DIR)"
    )
    parser.add_argument(
        "--baseline",
        metavar="METHOD",
        help="the strategy or method to test the others against (default: equal weights, if there are such runs)",
    )
    return parser


def _leave(sentence: str) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.write(f"{COMMAND}: {sentence}{os.linesep}")
    sys.exit(2)


if __name__ == "__main__":
    main()
