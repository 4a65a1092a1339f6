"""Errors about missing or invalid files."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lightning_gradnorm.experiments.loading.errors import refuse

wrong = partial(refuse, "CMAPSS")


def existing(file: Path, what: str) -> Path:
    """Return the file, or raise an error with its purpose and where it may be instead.

    Raises:
        FileNotFoundError: The file does not exist.
    """
    if file.is_file():
        return file
    root = file.parent
    if not root.is_dir():
        raise FileNotFoundError(f"CMAPSS: root should be the folder with {file.name}; {root} is not a folder.")
    elsewhere = sorted(root.glob(f"*/{file.name}"))
    others = sorted(other.name for other in root.glob(f"{file.name.partition('_')[0]}_FD00?.txt"))
    if elsewhere:
        hint = f" Found one in {elsewhere[0].parent}: root={elsewhere[0].parent}"
    elif others:
        hint = f" Found {', '.join(others)}."
    else:
        hint = " data=turbofan simulates such files."
    raise FileNotFoundError(f"CMAPSS: {what} should be in {file}; no such file.{hint}")
