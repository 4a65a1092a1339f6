"""Finds runs of `gradnorm-train` below folders, including unfinished, failed and damaged ones."""

from __future__ import annotations

import csv
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from lightning_gradnorm.experiments.report.results import FILE, tasks_of

CONFIG = "config.yaml"
"""The resolved configuration, in the run's folder."""
OVERRIDES = "overrides.yaml"
"""The overrides on the command line."""
TIME = "training.json"
"""The duration of the training."""
WEIGHTS = "weights.json"
"""The final task weights, and their mean over training."""
FAILURE = "failure.json"
"""The error that ended the run."""
LOG = "output.txt"
"""The output of a run in a study."""
PICTURE = "solution.png"
"""The learned solution, if the run draws it."""
HYDRA = ".hydra"
"""Hydra's own record, which exists before training begins."""

FINISHED, TRAINED, UNFINISHED, FAILED, UNREADABLE = (
    "finished",
    "trained, not tested",
    "unfinished",
    "failed",
    "unreadable",
)
"""States of a run."""

Curve = list[tuple[float, float]]
"""Step and value, in the order of the steps."""


@dataclass
class CollectedRun:
    """The readable contents of one run's folder."""

    folder: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    strategy: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    training: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """Problems with the files."""
    failure: str = ""
    """The error that ended the run."""
    below: Path | None = None
    """The folder that was searched for runs."""

    @property
    def began(self) -> bool:
        """True if training began. Only then is the configuration known."""
        return bool(self.config)

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """The curves from the CSV logger, by name."""
        return read_curves(self.folder)

    def group(self, name: str) -> dict[str, Any]:
        """Return a group of the configuration, or an empty dict if it does not exist or is not a group."""
        found = self.config.get(name)
        return found if isinstance(found, dict) else {}

    @property
    def seed(self) -> Any:
        """The seed of the run."""
        return self.config.get("seed", 0)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        """The trained tasks; empty if unknown."""
        chosen = self.config.get("tasks")
        found = (
            (chosen if isinstance(chosen, list) else None)
            or self._configured_tasks()
            or tasks_of(self.metrics)
            or self._logged_tasks()
        )
        return tuple(dict.fromkeys(map(str, found)))

    def _configured_tasks(self) -> Sequence[str]:
        tasks = self.group("model").get("tasks")
        if isinstance(tasks, dict) and "_target_" in tasks:  # a function that makes them
            names = tasks.get("names")
            return names if isinstance(names, list) else []
        return list(tasks) if isinstance(tasks, dict) else []

    def _logged_tasks(self) -> Sequence[str]:
        return [name.removeprefix("train/loss/") for name in self.curves if name.startswith("train/loss/")]

    @property
    def state(self) -> str:
        """One of `FINISHED`, `TRAINED`, `UNFINISHED`, `FAILED`, `UNREADABLE`."""
        if self.failure:
            return FAILED
        if self.metrics and self.began:
            return FINISHED
        if self.problems and (self.folder / FILE).is_file():
            return UNREADABLE
        return TRAINED if self.training and self.began else UNFINISHED

    @property
    def remarks(self) -> list[str]:
        """The error and other problems."""
        return [self.failure, *self.problems] if self.failure else self.problems

    @cached_property
    def progress(self) -> str:
        """The progress of the run as text."""
        if not self.began:
            return "did not begin to train"
        epochs, steps = self.training.get("epochs"), self.training.get("steps")
        if steps is None:
            steps = max((curve[-1][0] + 1 for curve in self.curves.values() if curve), default=0)
            epochs = max((curve[-1][1] for curve in [self.curves.get("epoch", [])] if curve), default=-1) + 1
        if not steps:
            return "began to train, nothing logged"
        return f"step {steps:.0f}{self._wanted('max_steps')}, epoch {epochs or 0:.0f}{self._wanted('max_epochs')}"

    def _wanted(self, limit: str) -> str:
        number = self.group("trainer").get(limit)
        return f" of {number}" if isinstance(number, int) and number > 0 else ""


def collect(folders: Sequence[str | Path]) -> list[CollectedRun]:
    """Return the runs in and below the folders, each once.

    Args:
        folders: runs, sweeps, or any folders with runs below them.

    Raises:
        FileNotFoundError: a folder does not exist or has no run.
    """
    found: dict[Path, CollectedRun] = {}
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"no such folder: {folder}. Use the folder of a run or of a sweep.")
        below = list(_run_folders(folder))
        if not below:
            is_empty = next(folder.iterdir(), None) is None
            raise FileNotFoundError(
                f"{folder} {'is empty' if is_empty else 'has no run of gradnorm-train in it or below it'}; a run's folder has "
                f"{CONFIG}, {OVERRIDES} and, once it is finished, {FILE}. Use the folder of a run or of a sweep."
            )
        for one in below:
            relative = str(one.relative_to(folder)) if one != folder else folder.resolve().name
            name = relative if len(folders) == 1 else str(one)
            if one.resolve() not in found:
                found[one.resolve()] = run = read(one, name)
                run.below = folder
    return list(found.values())


def _run_folders(folder: Path) -> Iterator[Path]:
    for place, below, files in os.walk(folder):
        here = Path(place)
        if _is_run(here, below, files):
            below.clear()
            yield here
        below[:] = sorted((name for name in below if not name.startswith(".")), key=_by_number)


def _is_run(folder: Path, below: Iterable[str], files: Iterable[str]) -> bool:
    present = set(files)
    if FILE in present or TIME in present or {CONFIG, OVERRIDES} <= present:
        return True
    if HYDRA not in below:
        return False
    return "balancing" in _mapping(folder / HYDRA / CONFIG, [])  # other programs use Hydra, too


def _by_number(name: str) -> tuple[bool, int, str]:
    """Order the runs of a sweep, ``0_equal_0`` to ``11_upgrad_2``, by their numbers."""
    number = re.match(r"\d+", name)
    return number is None, int(number.group()) if number else 0, name


def read(folder: Path, name: str) -> CollectedRun:
    r"""Return the run in that folder. Its ``problems`` list what cannot be read.

    Args:
        folder: folder of one run.
        name: the run's name in the report.

    Example:
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     _ = (Path(folder) / "config.yaml").write_text("seed: 1\nbalancing: {}\ntrainer: {max_epochs: 3}\n")
        ...     run = read(Path(folder), "mine")
        ...     run.strategy, run.state, run.progress
        ('equal', 'unfinished', 'began to train, nothing logged')
    """
    problems: list[str] = []
    config = _mapping(folder / CONFIG, problems)
    run = CollectedRun(
        folder,
        name,
        config=config,
        strategy=_strategy(folder, config),
        metrics=_numbers(folder / FILE, problems),
        weights={
            kind: values
            for kind, row in _mapping(folder / WEIGHTS, problems).items()
            if isinstance(row, dict) and (values := _only_numbers(row))
        },
        training=_numbers(folder / TIME, problems),
        problems=problems,
    )
    if not config and (folder / FILE).is_file():
        problems.append(f"the options of the run are unknown, because {CONFIG} is missing or damaged")
    bad = [name for name, value in run.metrics.items() if not math.isfinite(value)]
    if bad:
        problems.append(f"not finite: {', '.join(bad)}")
    failure = _mapping(folder / FAILURE, problems)
    if failure:
        run.failure = str(failure.get("error", "no reason recorded"))
    elif not run.metrics and (printed := _last_line(folder / LOG)):
        problems.append(f"its output ends with: {printed}")
    return run


def read_curves(folder: Path) -> dict[str, Curve]:
    """Return the curves that the CSV logger wrote, by name. Steps of a resumed run replace earlier ones.

    Skips damaged lines, such as a killed run leaves behind, and test metrics.
    """
    curves: dict[str, Curve] = {}
    versions = sorted(folder.glob("csv/version_*/metrics.csv"), key=_version)
    for file in versions:
        new: dict[str, Curve] = {}
        for row in _rows(file):
            step = _number(row.get("step"))
            if step is None:
                continue
            for name, text in row.items():
                value = _number(text)
                if value is not None and name != "step" and not name.startswith("test/"):
                    new.setdefault(name, []).append((step, value))
        first = min((curve[0][0] for curve in new.values()), default=math.inf)
        for name, curve in curves.items():
            curves[name] = [point for point in curve if point[0] < first]
        for name, curve in new.items():
            curves.setdefault(name, []).extend(curve)
    return {name: sorted(curve, key=lambda point: point[0]) for name, curve in curves.items() if curve}


def _version(file: Path) -> int:
    number = file.parent.name.removeprefix("version_")
    return int(number) if number.isdecimal() else -1


def _rows(file: Path) -> Iterator[dict[Any, Any]]:
    try:
        with file.open(encoding="utf-8", errors="replace", newline="") as lines:
            yield from csv.DictReader(line.replace("\0", "") for line in lines)
    except (OSError, csv.Error):
        return


def _number(text: Any) -> float | None:
    if not isinstance(text, str) or not text:
        return None
    try:
        return float(text)
    except ValueError:
        return None


def _strategy(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the option chosen with ``balancing=``, or the name of the class if the choice is not recorded."""
    chosen = _at(_mapping(folder / HYDRA / "hydra.yaml", []), "hydra", "runtime", "choices", "balancing")
    if isinstance(chosen, str):
        return chosen
    return strategy_of(config.get("balancing")) if config else "unknown"


def strategy_of(balancing: Any) -> str:
    """Return the lowercase class name of a configured strategy; equal weights have no class.

    Example:
        >>> strategy_of({"_target_": "lightning_gradnorm.Scalarization", "scalarizer": {"_target_": "somewhere.DWA"}})
        'dwa'
    """
    places = (("scalarizer", "_target_"), ("aggregator", "_target_"), ("_target_",))
    target = next((found for place in places if isinstance(found := _at(balancing, *place), str)), None)
    return target.rpartition(".")[2].lower() if target else "equal"


def _at(tree: Any, *keys: str) -> Any:
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def _mapping(file: Path, problems: list[str]) -> dict[str, Any]:
    """Return the contents of a YAML or JSON file. If it is damaged, return an empty dict and record the problem."""
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text) if file.suffix == ".json" else yaml.load(text, Loader=_LOADER)
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        problems.append(f"{file.name} cannot be read: {str(error).splitlines()[0]}")
        return {}
    if not isinstance(content, dict):
        problems.append(f"{file.name} should be a mapping; got {'nothing' if content is None else repr(content)[:40]}")
        return {}
    return content


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _numbers(file: Path, problems: list[str]) -> dict[str, float]:
    content = _mapping(file, problems)
    numbers = _only_numbers(content)
    if len(numbers) < len(content):
        strange = next(name for name in content if name not in numbers)
        problems.append(f"{file.name}: {strange} should be a number; got {content[strange]!r:.40}")
    return numbers


def _only_numbers(content: Mapping[str, Any]) -> dict[str, float]:
    return {
        str(name): float(value)
        for name, value in content.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }


def _last_line(file: Path) -> str:
    if not file.is_file():
        return ""
    with file.open("rb") as content:
        content.seek(max(0, file.stat().st_size - 4000))
        lines = content.read().decode("utf-8", errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip() and not line.startswith("(")), "")
