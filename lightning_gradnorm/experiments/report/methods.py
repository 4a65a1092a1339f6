"""Groups runs into methods: a balancing strategy and the options in which the runs differ; seeds are within a method."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from lightning_gradnorm.experiments.report.collect import CollectedRun

Key = tuple[Any, ...]
_SEED = "the seed"

HOUSEKEEPING = (
    "paths",
    "logger",
    "callbacks",
    "name",
    "ckpt_path",
    "test",
    "single_task",
    "optimized_metric",
    "hydra",
    "data.num_workers",
    "data.pin_memory",
    "data.persistent_workers",
    "data.folder",  # where simulated files are kept
    "data.in_memory",
    "trainer.default_root_dir",
    "trainer.enable_autolog_hparams",
    "trainer.enable_checkpointing",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.num_sanity_val_steps",
    "trainer.profiler",
)
"""Options that say where a run is and what it shows, not how it trains; with all that is below them."""

_NOT_OF_A_METHOD = (
    *HOUSEKEEPING,
    "seed",
    "data.seed",  # with seed, it tells the repetitions of a method apart
    "alpha",  # of an experiment, for balancing.alpha
    "model.encoder.in_features",  # follows from the data, and so do the scales, which differ between seeds
    "model.tasks.scales",
    "tasks",
)

_OPTIONS_OF_DATA = (
    "data.batch_size",
    "data.drop_last",
    "data.root",
    "data.augment",
    "data.standardize_targets",
    "data.resample",
    "data.steps_per_epoch",
)
"""Differ between methods on the same data; every other option of the data makes other data."""

_FROM_RUN = "balancing.from_run"


@dataclass(frozen=True)
class Method:
    """Runs that differ in their seeds alone."""

    name: str
    strategy: str
    options: Mapping[str, Any]
    """Options of the strategy in which its runs differ, by dotted name."""
    context: Mapping[str, Any]
    """Other options in which the runs of the report differ."""
    words: Mapping[str, str]
    """What of both is in its name, by dotted name."""
    runs: tuple[CollectedRun, ...]

    @property
    def finished(self) -> list[CollectedRun]:
        """The runs that have test metrics."""
        return [run for run in self.runs if run.metrics]


def is_below(key: str, options: Iterable[str]) -> bool:
    """Say whether a dotted name is one of the options or lies in one.

    Example:
        >>> is_below("logger.csv.name", HOUSEKEEPING), is_below("logger_name", HOUSEKEEPING)
        (True, False)
    """
    return any(key == one or key.startswith(f"{one}.") for one in options)


def is_random(run: CollectedRun) -> bool:
    """Say whether the run's weights are drawn at random and held fixed."""
    return str(run.group("balancing").get("_target_", "")).endswith("RandomWeights")


def is_single_task(run: CollectedRun) -> bool:
    """Say whether the run has one task alone."""
    return len(run.tasks) == 1


def repetition(run: CollectedRun) -> Key:
    """Return what tells the run from the others of its method; first what it has in common with runs of other methods."""
    data_seed = run.group("data").get("seed", run.seed)
    draw = (_hashable(run.group("balancing").get("seed")),) if is_random(run) else ()
    return (_hashable(run.seed), _hashable(data_seed), *draw)


def group(runs: Sequence[CollectedRun]) -> tuple[list[Method], list[Method]]:
    """Return the methods, and those of the runs that have one task alone (all tasks of a method in one).

    Runs that never began to train are left out.

    Args:
        runs: those to compare.

    Raises:
        ValueError: the runs have different tasks or data, or there is nothing to compare.
    """
    begun = [run for run in runs if run.began]
    single = [run for run in begun if is_single_task(run)]
    several = [run for run in begun if not is_single_task(run)]
    _refuse_different_data(begun)
    _refuse_different_tasks(several, single)
    if not several and len({run.tasks for run in single}) == 1:
        several, single = single, []  # a comparison in which there is nothing to balance, of learning rates, say
    options = {id(run): _options(run) for run in begun}
    context_keys = [key for key in _varying(options.values()) if not key.startswith("balancing.")]
    methods: dict[Key, list[CollectedRun]] = {}
    for strategy in dict.fromkeys(run.strategy for run in several):
        of_strategy = [run for run in several if run.strategy == strategy]
        keys = [key for key in _varying(options[id(run)] for run in of_strategy) if key.startswith("balancing.")]
        without = [key for key in keys if key != _FROM_RUN]
        if _FROM_RUN in keys and not _has_repeats(of_strategy, options, [*without, *context_keys]):
            keys = without  # each seed has the GradNorm run of that seed
        for run in of_strategy:
            own = tuple((key, options[id(run)].get(key)) for key in keys)
            methods.setdefault((strategy, own, _chosen(options[id(run)], context_keys)), []).append(run)
    alone: dict[Key, list[CollectedRun]] = {}
    for run in single:
        alone.setdefault(("single-task", (), _chosen(options[id(run)], context_keys)), []).append(run)
    usual = {key: value for key in context_keys if (value := _value_of_all_finished(begun, options, key)) is not None}
    return _named(methods, usual), _named(alone, usual)


def _refuse_different_tasks(several: Sequence[CollectedRun], single: Sequence[CollectedRun]) -> None:
    tasks = {frozenset(run.tasks): run for run in several if run.tasks}
    if len(tasks) > 1:
        first, second = list(tasks.values())[:2]
        raise ValueError(
            f"runs of different tasks cannot be compared: {first.name} has {_list(first.tasks)}, {second.name} has "
            f"{_list(second.tasks)}. Give the folders of one of them; runs of one task alone may be among them."
        )
    known = next(iter(tasks), None)
    for run in single:
        if known is not None and not known.issuperset(run.tasks):
            raise ValueError(
                f"runs of different tasks cannot be compared: {run.name} has {_list(run.tasks)} alone, which is no task of the "
                f"others, {_list(tasks[known].tasks)}. Leave it out."
            )
    if not several and len({run.tasks for run in single}) > 1:
        names = _list(dict.fromkeys(run.tasks[0] for run in single))
        raise ValueError(
            f"runs of one task each ({names}) are there and none of several: there is nothing to compare them with. Give "
            "the folders of runs with all tasks, too."
        )


def _refuse_different_data(runs: Sequence[CollectedRun]) -> None:
    seen: dict[str, tuple[Any, CollectedRun]] = {}
    for run in runs:
        for key, value in _flat(run.group("data"), "data"):
            if is_below(key, _NOT_OF_A_METHOD) or key in _OPTIONS_OF_DATA:
                continue
            before, other = seen.setdefault(key, (value, run))
            if before != value:
                raise ValueError(
                    f"runs on different data cannot be compared: {key} is {_shown(before)} in {other.name} and "
                    f"{_shown(value)} in {run.name}. Give the folders of one of them."
                )


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


def _options(run: CollectedRun) -> dict[str, Any]:
    """Return all that decides how the run trains, but its seed, by dotted name."""
    own_folder = str(run.group("paths").get("run_dir", "")) or None
    found = {}
    for key, value in _flat(run.config):
        if is_below(key, _NOT_OF_A_METHOD):
            continue
        if key.rpartition(".")[2] == "seed":
            if is_random(run) and key == "balancing.seed":
                continue
            value = _SEED if value == run.seed else value
        if own_folder and isinstance(value, str):
            value = value.replace(own_folder, ".")
        found[key] = value
    return found


def _flat(tree: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield dotted names and values; a list is one value."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _flat(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, _hashable(tree)


def _hashable(value: Any) -> Any:
    plain = value is None or isinstance(value, (bool, int, float, str))
    return value if plain else json.dumps(value, sort_keys=True, default=str)


def _varying(options: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return the names that have more than one value; those that some runs lack may be new in the library."""
    values: dict[str, set[Any]] = {}
    for one in options:
        for key, value in one.items():
            values.setdefault(key, set()).add(value)
    return [key for key, found in values.items() if len(found) > 1]


def _chosen(options: Mapping[str, Any], keys: Iterable[str]) -> Key:
    return tuple((key, options.get(key)) for key in keys if key in options)


def _has_repeats(runs: Sequence[CollectedRun], options: Mapping[int, Mapping[str, Any]], keys: Sequence[str]) -> bool:
    seen = [(repetition(run), _chosen(options[id(run)], keys)) for run in runs]
    return len(set(seen)) < len(seen)


def _value_of_all_finished(runs: Sequence[CollectedRun], options: Mapping[int, Mapping[str, Any]], key: str) -> Any:
    """Return the value that all finished runs have, from which unfinished ones alone differ: no name need say it."""
    values = {options[id(run)].get(key) for run in runs if run.metrics}
    return values.pop() if len(values) == 1 else None


def _named(groups: Mapping[Key, Sequence[CollectedRun]], usual: Mapping[str, Any]) -> list[Method]:
    """Return the groups with names, in which the options that are as ``usual`` are left out."""
    methods = []
    for (strategy, own, context), runs in groups.items():
        shown = [*own, *((key, value) for key, value in context if usual.get(key) != value)]
        short = _short_names([key for key, _ in shown])
        words = {key: f"{short[key]}={_shown(value)}" for key, value in shown if value is not None}
        name = " ".join([strategy, *words.values()])
        methods.append(Method(name, strategy, dict(own), dict(context), words, tuple(runs)))
    return methods


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each dotted name, or as many as tell it from the others.

    Example:
        >>> _short_names(["balancing.alpha", "balancing.optimizer.lr", "model.optimizer.lr"])
        {'balancing.alpha': 'α', 'balancing.optimizer.lr': 'balancing.optimizer.lr', 'model.optimizer.lr': 'model.optimizer.lr'}
    """
    short = {}
    for key in keys:
        parts = key.split(".")
        for count in range(1, len(parts) + 1):
            end = ".".join(parts[-count:])
            if not any(other != key and f".{other}".endswith(f".{end}") for other in keys):
                break
        short[key] = "α" if end == "alpha" else end.removesuffix("._target_")
    return short


def _shown(value: Any) -> str:
    """Return an option's value as it stands in a method's name."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "null"
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return PurePath(text).name if text.count("/") > 1 else text
