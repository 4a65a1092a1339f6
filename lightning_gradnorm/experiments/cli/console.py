"""Console output of our commands, and filters for the messages of other packages."""

from __future__ import annotations

import importlib
import logging
import shutil
import sys
import warnings
from pathlib import Path

_NOISE = ("💡 Tip", "TPU available")
_LOGGERS = ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero")


def import_lightning() -> None:
    """Import Lightning so that its messages appear once and without advertisements, and our warnings without a file name.

    Hydra adds a handler to the root logger. If Lightning is imported after that, it sends its messages there. Lightning also
    sets its own format of warnings, which ours extends.
    """
    root = logging.getLogger()
    handlers, root.handlers = root.handlers, []
    try:
        importlib.import_module("lightning.pytorch")
    finally:
        root.handlers = handlers
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if _is_worth_saying not in logger.filters:
            logger.addFilter(_is_worth_saying)
    warnings.formatwarning = _formatted


def _formatted(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    where = "Warning" if "lightning_gradnorm" in Path(filename).parts else f"{filename}:{lineno}"
    return f"{where}: {message}\n"


def _is_worth_saying(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith(_NOISE)


def executable(name: str) -> str:
    """Return how to call one of our commands here: its name, or its path if the shell would not find it."""
    ours = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    if not ours.is_file() or (found is not None and Path(found).resolve() == ours.resolve()):
        return name
    here = Path.cwd()
    return str(ours.relative_to(here)) if ours.is_relative_to(here) else str(ours)
