"""What the scripts that fill docs/results share: a quiet Lightning, and a page that says how it was made."""

from __future__ import annotations

import datetime
import logging
import platform
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch


def be_quiet(threads: int = 1) -> None:
    """Leave the terminal to the script, and torch so many threads."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=UserWarning, module="lightning")
    torch.set_num_threads(threads)


def write_page(path: Path, title: str, described: str, parts: Sequence[str], *, where: str = "CPU") -> Path:
    """Write a page of results: the title, the command, the date and the versions, what was measured, and the parts.

    Args:
        path: of the page, whose folder is made.
        title: without #.
        described: follows after the versions.
        parts: paragraphs, tables and pictures.
        where: on what it was measured.
    """
    script = Path(sys.argv[0]).name
    made = (
        f"{datetime.date.today()}, Python {platform.python_version()}, torch {torch.__version__}, "
        f"lightning {L.__version__}, {where}"
    )
    command = " ".join(["python", f"scripts/{script}", *sys.argv[1:]])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join([f"# {title}", f"`{command}`", f"{made}{described}", *parts]) + "\n")
    return path
