"""Reads a run's folder: its overrides and its checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from lightning_gradnorm._messages import nearest
from lightning_gradnorm.experiments.report.collect import CONFIG as CONFIG
from lightning_gradnorm.experiments.report.collect import FAILURE as FAILURE
from lightning_gradnorm.experiments.report.collect import OVERRIDES as OVERRIDES
from lightning_gradnorm.experiments.report.collect import TIME as TIME
from lightning_gradnorm.experiments.report.collect import WEIGHTS as WEIGHTS
from lightning_gradnorm.experiments.report.results import FILE
from lightning_gradnorm.experiments.report.results import write_whole as write_whole

if TYPE_CHECKING:
    from torch import Tensor

METRICS = FILE
LAST_METRICS = "metrics.json"
"""The last logged metrics of training and validation, and of the test once that is done."""


def in_one_line(error: BaseException) -> str:
    r"""Return the error's type and message in one line.

    Example:
        >>> in_one_line(ValueError("alpha should be\n  a number"))
        'ValueError: alpha should be a number'
    """
    said = " ".join(str(error).split())[:500]
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def read_whole(file: Path) -> dict[str, Any]:
    """Return what `write_whole` wrote, or an empty dict if the file does not exist."""
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def quoted(value: str) -> str:
    """Return the value, quoted for Hydra's command line if necessary."""
    return value if re.fullmatch(r"[\w./-]+", value) else "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"


def find_checkpoint(path: str | Path) -> Path:
    """Return the checkpoint's path.

    Raises:
        FileNotFoundError: the file does not exist; lists the checkpoints found nearby.
    """
    path = Path(path)
    if path.is_file():
        return path
    # If you name the run or misspell the file, the error lists the checkpoints there.
    folder = path if path.is_dir() else path.parent
    found = sorted(str(file) for file in folder.rglob("*.ckpt"))[:20] if folder.is_dir() else []
    near = nearest(str(path), found) or next(iter(found), None)
    there = f"did you mean {near}?\n  Found: {', '.join(found)}" if near else f"{folder} has no checkpoints"
    raise FileNotFoundError(f"ckpt_path should be a checkpoint file; no such checkpoint: {path}; {there}")


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return the model's weights in a checkpoint.

    Raises:
        ValueError: the file is not a Lightning checkpoint.
    """
    import torch

    try:
        content: Any = torch.load(checkpoint, map_location="cpu", weights_only=True)
        weights: dict[str, Tensor] = content["state_dict"]
    except Exception as reason:  # the unpickler can raise anything for a foreign file
        raise ValueError(
            f"ckpt_path should be a checkpoint written by gradnorm-train; {checkpoint} cannot be read as one "
            f"({type(reason).__name__})."
        ) from reason
    return weights


def reached_limit(checkpoint: Path, flags: Mapping[str, Any]) -> tuple[str, int] | None:
    """Return the limit of the training that a checkpoint has reached and how far it is, or ``None`` if it has reached none.

    Args:
        checkpoint: a checkpoint of Lightning's.
        flags: the trainer's options.

    Returns:
        ``("max_epochs", 12)`` or ``("max_steps", 400)``.
    """
    import torch

    content: Any = torch.load(checkpoint, map_location="cpu", weights_only=True)
    reached = {
        "max_epochs": content["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"],
        "max_steps": content["global_step"],
    }
    for name, so_far in reached.items():
        limit = flags.get(name)
        if isinstance(limit, int) and 0 <= limit <= so_far:
            return name, so_far
    return None


@contextmanager
def loading(checkpoint: Path | None) -> Iterator[None]:
    """Add the fix to torch's error about weights that do not match the network.

    Args:
        checkpoint: the checkpoint loaded inside the context, or ``None``.

    Raises:
        ValueError: the weights belong to another network.
    """
    try:
        yield
    except RuntimeError as mismatch:
        title, *differences = str(mismatch).splitlines()
        if checkpoint is None or "in loading state_dict" not in title:
            raise
        raise ValueError(
            f"ckpt_path: the weights in {checkpoint} belong to another network than the options describe "
            f"({' '.join(differences[0].split()) if differences else title}). Set the options of its run, or none: they are "
            f"read from its folder."
        ) from mismatch


def run_folder(checkpoint: Path) -> Path | None:
    """Return the checkpoint's run folder: the nearest parent with a ``config.yaml``."""
    near = list(checkpoint.resolve().parents)[:2]
    return next((folder for folder in near if (folder / CONFIG).is_file()), None)


def options_of_run(folder: Path, given: Sequence[str]) -> list[str]:
    r"""Return the overrides that a run was started with, except for keys that are ``given`` again.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "overrides.yaml").write_text("- seed=3\n- data=toy\n")
        ...     options_of_run(Path(folder), given=["seed=4"])
        ['data=toy']
    """
    before = recorded_overrides(folder)
    if before is None:
        return []
    parser = OverridesParser.create()
    new = {override.key_or_group for override in parser.parse_overrides(list(given))}
    parsed = zip(before, parser.parse_overrides(before), strict=True)
    return [text for text, override in parsed if override.key_or_group not in new]


def recorded_overrides(folder: Path) -> list[str] | None:
    """Return the overrides that the run in the folder was started with, or ``None`` if unknown."""
    record = folder / OVERRIDES
    return [str(override) for override in OmegaConf.load(record)] if record.is_file() else None


def overrides_of(folder: Path) -> list[str] | None:
    """Return the overrides without a ``ckpt_path`` in the run's own folder: a resumed run is the same run."""
    before = recorded_overrides(folder)
    if before is None:
        return None
    own = folder.resolve()
    return [
        text
        for text, override in zip(before, OverridesParser.create().parse_overrides(before), strict=True)
        if not (override.key_or_group == "ckpt_path" and Path(str(override.value())).resolve().is_relative_to(own))
    ]
