"""Errors about missing or invalid files."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NoReturn

from lightning_gradnorm.experiments.loading.errors import refuse

COPY_AGAIN = "The copy seems damaged: fetch the file again."


def expect(holds: bool, file: Path | str, field: str, expected: str, found: object, fix: str = "") -> None:
    """Raise an error with the file, the field, the expectation and what was found, unless ``holds``.

    Raises:
        ValueError: The condition does not hold.

    Example:
        >>> expect(False, "train/label/3.npy", "label", "-1 to 12", 40, "Map it to the 13 classes.")
        Traceback (most recent call last):
        ValueError: NYUv2: label in train/label/3.npy should be -1 to 12; got 40. Map it to the 13 classes.
    """
    if not holds:
        wrong(file, field, expected, found, fix)


def wrong(file: Path | str, field: str, expected: str, found: object, fix: str = "") -> NoReturn:
    """Raise the error of `expect`.

    Raises:
        ValueError: Always.
    """
    refuse("NYUv2", f"{field} in {file}", f"be {expected}", found, fix)


def existing(file: Path, what: str) -> Path:
    """Return the file, or raise an error with its purpose.

    Raises:
        FileNotFoundError: The file does not exist.
    """
    if not file.is_file():
        raise FileNotFoundError(f"NYUv2: {what} should be in {file}; no such file.")
    return file


def needed(module: str) -> Any:
    """Import a module from the extra ``nyuv2``.

    Raises:
        ModuleNotFoundError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        package = module.split(".")[0]
        raise ModuleNotFoundError(
            f"NYUv2: reading this format needs {package}, which is not installed. Install it: pip install "
            "'lightning-gradnorm[nyuv2]'"
        ) from None
