"""What is said about a file that is missing, or not what it should be."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lightning_gradnorm.experiments.loading.errors import refuse

wrong = partial(refuse, "CMAPSS")


def existing(file: Path, what: str) -> Path:
    """Return the file, or raise an error that says what it is needed for, and where it might be instead.

    Raises:
        FileNotFoundError: There is no such file.
    """
    if file.is_file():
        return file
    root = file.parent
    if not root.is_dir():
        raise FileNotFoundError(f"CMAPSS: root should be the folder with {file.name}; {root} is no folder.")
    elsewhere = sorted(root.glob(f"*/{file.name}"))
    others = sorted(other.name for other in root.glob(f"{file.name.partition('_')[0]}_FD00?.txt"))
    if elsewhere:
        hint = f" There is one in {elsewhere[0].parent}: root={elsewhere[0].parent}"
    elif others:
        hint = f" There is {', '.join(others)}."
    else:
        hint = " data=turbofan simulates such files."
    raise FileNotFoundError(f"CMAPSS: {what} should be in {file}; there is no such file.{hint}")
