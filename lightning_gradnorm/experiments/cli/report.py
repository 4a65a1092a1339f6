"""`gradnorm-report`: finished runs side by side, as one HTML page and as Markdown."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from lightning_gradnorm.experiments.cli import errors
from lightning_gradnorm.experiments.report import write_report
from lightning_gradnorm.experiments.report.collect import FINISHED
from lightning_gradnorm.experiments.report.write import MARKDOWN, PAGE

COMMAND = "gradnorm-report"

_EXAMPLES = """\
examples:
  gradnorm-train -m experiment=multimnist balancing=equal,gradnorm,upgrad seed=0,1,2 hydra.sweep.dir=RUNS
  gradnorm-report RUNS                          RUNS/report.html and RUNS/report.md
  gradnorm-report RUNS ALONE --output docs      with runs of one task each (tasks=[one]) there is Δm, too
  gradnorm-report RUNS --baseline gradnorm      differences from GradNorm instead of equal weights

What differs between the runs, but for the seed, makes a method: `gradnorm α=0.5`. Unfinished and failed runs are listed.
"""


def main() -> None:
    """Compare the runs in the folders that the command line names; ``gradnorm-report --help`` explains it."""
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
    for run in comparison.unfinished:
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
        "--output", metavar="FOLDER", help="where report.html and report.md go; the first DIR by default"
    )
    parser.add_argument(
        "--baseline",
        metavar="METHOD",
        help="a strategy or a method that the others are tested against; equal weights by default, if there are any",
    )
    return parser


def _leave(sentence: str) -> NoReturn:
    sys.stdout.flush()
    sys.stderr.write(f"{COMMAND}: {sentence}{os.linesep}")
    sys.exit(2)


if __name__ == "__main__":
    main()
