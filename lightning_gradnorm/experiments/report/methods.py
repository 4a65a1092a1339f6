"""Groups runs into methods. Runs of a method share the strategy and all options, and differ only in the seed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from lightning_gradnorm.experiments.report.collect import CollectedRun

Key = tuple[Any, ...]
_SEED = "the seed"
_FEW = 3
"""The most commands, and folders in a command, that an error lists."""

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
    "data.folder",  # folder of simulated files
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
"""Options, and all options below them, that set where a run is and what it shows, not how it trains."""

_NOT_OF_A_METHOD = (
    *HOUSEKEEPING,
    "seed",
    "data.seed",  # together with seed, it distinguishes the repetitions of a method
    "alpha",  # an experiment's suggestion for balancing.alpha
    "model.encoder.in_features",  # follows from the data. So do the scales, which differ between seeds
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
"""Options that may differ between methods on the same data. Any other option changes the data."""

_FROM_RUN = "balancing.from_run"


@dataclass(frozen=True)
class Method:
    """Runs that differ only in their seeds."""

    name: str
    strategy: str
    options: Mapping[str, Any]
    """Strategy options that vary among runs of the strategy, by dotted name."""
    context: Mapping[str, Any]
    """Other options that vary in the report."""
    words: Mapping[str, str]
    """The parts of its name from both, by dotted name."""
    runs: tuple[CollectedRun, ...]

    @property
    def finished(self) -> list[CollectedRun]:
        """The runs that have test metrics."""
        return [run for run in self.runs if run.metrics]


def is_below(key: str, options: Iterable[str]) -> bool:
    """Return True if a dotted name is one of the options or below one.

    Example:
        >>> is_below("logger.csv.name", HOUSEKEEPING), is_below("logger_name", HOUSEKEEPING)
        (True, False)
    """
    return any(key == one or key.startswith(f"{one}.") for one in options)


def is_random(run: CollectedRun) -> bool:
    """Return True if the run's weights are random and fixed."""
    return str(run.group("balancing").get("_target_", "")).endswith("RandomWeights")


def is_single_task(run: CollectedRun) -> bool:
    """Return True if the run has only one task."""
    return len(run.tasks) == 1


def repetition(run: CollectedRun) -> Key:
    """Return the key of a run within its method. Its first parts are shared with runs of other methods."""
    data_seed = run.group("data").get("seed", run.seed)
    draw = (_hashable(run.group("balancing").get("seed")),) if is_random(run) else ()
    return (_hashable(run.seed), _hashable(data_seed), *draw)


def group(runs: Sequence[CollectedRun]) -> tuple[list[Method], list[Method]]:
    """Return the methods, and the methods of the single-task runs (one method holds all of its tasks).

    Skips runs that never began to train.

    Args:
        runs: the runs to compare.

    Raises:
        ValueError: the runs have different tasks or data, or there is nothing to compare.
    """
    begun = [run for run in runs if run.began]
    single = [run for run in begun if is_single_task(run)]
    several = [run for run in begun if not is_single_task(run)]
    _refuse_different_data(begun)
    _refuse_different_tasks(several, single)
    if not several and len({run.tasks for run in single}) == 1:
        several, single = single, []  # nothing to balance, for example a comparison of learning rates
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
            f"{_list(second.tasks)}. Use the folders of one of them; single-task runs may be among them."
        )
    known = next(iter(tasks), None)
    for run in single:
        if known is not None and not known.issuperset(run.tasks):
            raise ValueError(
                f"runs of different tasks cannot be compared: {run.name} has only {_list(run.tasks)}, which is not a task of "
                f"the others, {_list(tasks[known].tasks)}. Leave it out."
            )
    if not several and len({run.tasks for run in single}) > 1:
        names = _list(dict.fromkeys(run.tasks[0] for run in single))
        raise ValueError(
            f"found only single-task runs ({names}) and no multi-task runs to compare them with. Add the folders of "
            "runs with all tasks."
        )


def _refuse_different_data(runs: Sequence[CollectedRun]) -> None:
    seen: dict[str, tuple[Any, CollectedRun]] = {}
    for run in runs:
        for key, value in _data_of(run).items():
            before, other = seen.setdefault(key, (value, run))
            if before != value:
                raise ValueError(
                    _report_on_one(runs)
                    or f"runs on different data cannot be compared: {key} is {_shown(before)} in {other.name} and "
                    f"{_shown(value)} in {run.name}. Use the folders of one of them."
                )


def _data_of(run: CollectedRun) -> dict[str, Any]:
    """Return the options that determine the data, by dotted name."""
    options = _flat(run.group("data"), "data")
    return {key: value for key, value in options if not (is_below(key, _NOT_OF_A_METHOD) or key in _OPTIONS_OF_DATA)}


def _report_on_one(runs: Sequence[CollectedRun]) -> str | None:
    """Return a message with one command per data set, or ``None`` if the data sets do not have folders of their own."""
    sets: list[tuple[dict[str, Any], list[CollectedRun]]] = []
    for run in runs:
        data = _data_of(run)
        for known, members in sets:
            if all(known.get(key, value) == value for key, value in data.items()):
                known.update(data)
                members.append(run)
                break
        else:
            sets.append((data, [run]))
    commands = []
    for _, members in sets:
        others = [run for _, more in sets if more is not members for run in more]
        folders = dict.fromkeys(_widest_folder(run, others) for run in members)
        if len(folders) > _FEW or None in folders:
            return None
        commands.append(shlex.join(["gradnorm-report", *map(str, folders)]))
    searched = ", ".join(dict.fromkeys(str(run.below) for run in runs))
    shown = [*commands[:_FEW], *[f"{len(commands) - _FEW} more"] * (len(commands) > _FEW)]
    return (
        f"{searched} {'holds' if ',' not in searched else 'hold'} runs on {len(sets)} data sets, which cannot be compared. "
        f"Report on one: {', or '.join(shown)}"
    )


def _widest_folder(run: CollectedRun, others: Sequence[CollectedRun]) -> Path | None:
    """Return the outermost folder above a run that is inside the searched one and has no other data set's run."""
    inside = [folder for folder in run.folder.parents if run.below is not None and folder.is_relative_to(run.below)]
    pure = [folder for folder in inside if not any(other.folder.is_relative_to(folder) for other in others)]
    return pure[-1] if pure else None


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


def _options(run: CollectedRun) -> dict[str, Any]:
    """Return all options that affect training, except the seed, by dotted name."""
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
    """Return the names with more than one value. Runs from before an option existed do not count for it."""
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
    """Return the common value of all finished runs, if only unfinished ones differ. Method names can omit it."""
    values = {options[id(run)].get(key) for run in runs if run.metrics}
    return values.pop() if len(values) == 1 else None


def _named(groups: Mapping[Key, Sequence[CollectedRun]], usual: Mapping[str, Any]) -> list[Method]:
    """Return the groups as named methods. The names omit options with their ``usual`` value."""
    methods = []
    for (strategy, own, context), runs in groups.items():
        shown = [*own, *((key, value) for key, value in context if usual.get(key) != value)]
        short = _short_names([key for key, _ in shown])
        words = {key: f"{short[key]}={_shown(value)}" for key, value in shown if value is not None}
        name = " ".join([strategy, *words.values()])
        methods.append(Method(name, strategy, dict(own), dict(context), words, tuple(runs)))
    return methods


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the shortest unambiguous ending of each dotted name.

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
    """Return an option's value for a method's name."""
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "null"
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return PurePath(text).name if text.count("/") > 1 else text
