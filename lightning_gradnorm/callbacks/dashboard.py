"""One ready-made view of a balanced training in TensorBoard's Custom Scalars tab."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import lightning as L
from typing_extensions import override

from lightning_gradnorm.callbacks.packages import is_one_of, works_in_both_packages

Layout = dict[str, dict[str, list[object]]]

CHARTS = {
    "Balancing": {
        "task weights w": r"(gradnorm|balancing)/weight$",
        "gradient norms G of the tasks": r"(gradnorm|balancing)/grad_norm$",
        "relative inverse training rates r": r"gradnorm/rate$",
        "loss ratios L / L(0)": r"gradnorm/loss_ratio$",
        "training losses, by task": r"train/loss$",
    },
    "Validation": {
        "losses, by task": r"val/loss$",
    },
    "Gradient-norm monitor": {
        "share of the update": r"monitor/share$",
        "gradient norms": r"monitor/norm$",
        "imbalance, largest norm / smallest": r"monitor/imbalance$",
    },
}
"""Categories → charts → regular expressions of the tags they show. A task's values are in its own run, see `TaskRuns`."""

_METRIC = re.compile(r"val/(?!loss$|loss_ratio$)([^/]+)$")
_OF_TASK = re.compile(
    r"((?:gradnorm|balancing)/(?:weight|grad_norm|rate|loss_ratio)|\w+/(?:share|norm)|(?:train|val|test)/[^/]+)/(.+)"
)


def split_name(name: str) -> tuple[str, str] | None:
    """Return a tag and a task if the name is one of a task's, else ``None``.

    Example:
        >>> split_name("gradnorm/weight/seg"), split_name("val/loss"), split_name("monitor/cosine/a/b")
        (('gradnorm/weight', 'seg'), None, None)
    """
    match = _OF_TASK.fullmatch(name)
    return None if match is None else (match[1], match[2])


def layout_of(names: Collection[str]) -> Layout:
    """Return the layout for a run that logs these names: all charts that would not be empty, and one for each metric.

    TensorBoard merges the layouts of all runs, category by category, and loses the charts of a category that one run lacks.
    The losses make sure that every run has every category.

    Example:
        >>> layout = layout_of(["balancing/weight/a", "train/loss/a", "val/loss", "val/accuracy/a", "val/accuracy/b"])
        >>> [title for charts in layout.values() for title in charts]
        ['task weights w', 'training losses, by task', 'losses, by task', 'accuracy, by task']
    """
    tags = list(dict.fromkeys((split_name(name) or (name,))[0] for name in names))
    found = [match[1] for tag in tags if (match := _METRIC.match(tag))]
    metrics = {f"{metric}, by task": f"val/{re.escape(metric)}$" for metric in dict.fromkeys(found)}
    layout: Layout = {}
    for category, charts in CHARTS.items():
        for title, shown in (charts | metrics if category == "Validation" else charts).items():
            if any(re.match(shown, tag) for tag in tags):
                layout.setdefault(category, {})[title] = ["Multiline", [shown]]
    return layout


class TaskRuns:
    """Writes what a `TensorBoardLogger` logs about each task a second time, to the task's own run below the logger's.

    TensorBoard colors and names lines by run. So ``gradnorm/weight`` becomes one chart with a line for each task, with the
    same name and color as in every other chart. The names in the logger's own run, ``gradnorm/weight/<task>``, stay.

    Args:
        logger: its ``log_metrics`` is followed until `close`.
    """

    def __init__(self, logger: Any) -> None:
        self.logger = logger
        self._log_metrics = logger.log_metrics
        self._writers: dict[str, Any] = {}
        logger.log_metrics = self.log_metrics

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Log the metrics as the logger does, then those of tasks to their runs."""
        self._log_metrics(metrics, step)
        for name, value in metrics.items():
            of_task = split_name(name)
            if of_task is not None and not isinstance(value, Mapping):
                tag, task = of_task
                self._writer(task).add_scalar(tag, value, step)

    def _writer(self, task: str) -> Any:
        if task not in self._writers:
            kind = type(self.logger.experiment)  # tensorboard's, or tensorboardX's
            self._writers[task] = kind(str(Path(self.logger.log_dir) / re.sub(r"[^\w.+-]+", "-", task)))
        return self._writers[task]

    def close(self) -> None:
        """Restore the logger."""
        if vars(self.logger).get("log_metrics") == self.log_metrics:
            del self.logger.log_metrics
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()


@works_in_both_packages
class TensorBoardDashboard(L.Callback):
    """Writes the layout of the Custom Scalars tab: what the strategy does, the losses and the metrics by task, the monitor.

    A chart appears as soon as one of its values is logged; see `CHARTS`. Each task gets its own run below the logger's, so it
    has its name and its color in every chart; see `TaskRuns`. TensorBoard reads one layout per run: do not write another one
    to the same run. Without a `TensorBoardLogger` the callback does nothing.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[TensorBoardDashboard()], logger=False)
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._written: Layout = {}
        self._first_step = 0
        self._runs: list[TaskRuns] = []

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @override
    def setup(self, trainer: L.Trainer, *_: object, **__: object) -> None:
        self._close()
        if trainer.is_global_zero:
            self._runs = [TaskRuns(one) for one in trainer.loggers if is_one_of(one, "TensorBoardLogger")]

    @override
    def teardown(self, *_: object, **__: object) -> None:
        self._close()

    @override
    def on_exception(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        for runs in self._runs:
            runs.close()
        self._runs = []

    @override
    def on_fit_start(self, trainer: L.Trainer, *_: object) -> None:
        self._names, self._written, self._first_step = set(), {}, trainer.global_step

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step <= self._first_step + 1:  # later names are found at the validations
            self._update(trainer)

    @override
    def on_validation_end(self, trainer: L.Trainer, *_: object) -> None:
        self._update(trainer)

    @override
    def on_train_end(self, trainer: L.Trainer, *_: object) -> None:
        self._update(trainer)

    def _update(self, trainer: L.Trainer) -> None:
        self._names |= trainer.callback_metrics.keys()
        layout = layout_of(sorted(self._names))
        if layout != self._written and not trainer.sanity_checking:  # which only shows what will be logged
            self._written = layout
            for logger in trainer.loggers:
                if is_one_of(logger, "TensorBoardLogger"):
                    logger.experiment.add_custom_scalars(layout)  # type: ignore[attr-defined]
