"""Where a number comes from: what has to stand beside it."""

from __future__ import annotations

import datetime
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence

import lightning as L
import torch


def provenance() -> str:
    """Return the command that runs now, and below it the date and the versions, as Markdown.

    Example:
        >>> command, _, versions = provenance().splitlines()
        >>> command.startswith("`python "), f"torch {torch.__version__}" in versions
        (True, True)
    """
    command = shlex.join(["python", *sys.argv])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, lightning {L.__version__}"
    return f"`{command}`\n\n{datetime.date.today()}, {versions}, {device}"


def mean_and_spread(values: Sequence[float], digits: int = 4) -> str:
    """Return mean ± standard deviation (of the sample), for a table.

    Example:
        >>> mean_and_spread([1.0, 2.0, 3.0], digits=1), mean_and_spread([0.5], digits=2)
        ('2.0 ± 1.0', '0.50')
    """
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean
