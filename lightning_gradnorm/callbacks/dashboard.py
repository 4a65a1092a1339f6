"""One ready-made view of a balanced training in TensorBoard's Custom Scalars tab."""

from __future__ import annotations

import re
from collections.abc import Collection

import lightning as L
from typing_extensions import override

from lightning_gradnorm.callbacks.packages import is_one_of, works_in_both_packages

Layout = dict[str, dict[str, list[object]]]

CHARTS = {
    "Balancing": {
        "task weights w": r"(gradnorm|balancing)/weight/",
        "gradient norms G of the tasks": r"(gradnorm|balancing)/grad_norm/",
        "relative inverse training rates r": r"gradnorm/rate/",
        "loss ratios L / L(0)": r"gradnorm/loss_ratio/",
        "training losses, by task": r"train/loss/",
    },
    "Validation": {
        "sum of the losses": r"val/loss$",
        "losses, by task": r"val/loss/",
    },
    "Gradient-norm monitor": {
        "share of the update": r"monitor/share/",
        "gradient norms": r"monitor/norm/",
        "imbalance, largest norm / smallest": r"monitor/imbalance$",
    },
}
"""Categories → charts → what they show: regular expressions from the beginning of a name, so that no task need be known."""

_METRIC = re.compile(r"val/(?!loss$|loss/)([^/]+)/.")


def layout_of(names: Collection[str]) -> Layout:
    """Return the layout for a run that logs these names: the charts that would not be empty, one for each metric.

    TensorBoard merges the layouts of all runs, category by category, and loses the charts of a category that one run lacks;
    the losses see to it that every run has each.

    Example:
        >>> layout = layout_of(["balancing/weight/a", "train/loss/a", "val/loss", "val/accuracy/a", "val/accuracy/b"])
        >>> {category: list(charts) for category, charts in layout.items()}
        {'Balancing': ['task weights w', 'training losses, by task'], 'Validation': ['sum of the losses', 'accuracy, by task']}
    """
    found = [match[1] for name in names if (match := _METRIC.match(name))]
    metrics = {f"{metric}, by task": f"val/{re.escape(metric)}/" for metric in dict.fromkeys(found)}
    layout: Layout = {}
    for category, charts in CHARTS.items():
        for title, tags in (charts | metrics if category == "Validation" else charts).items():
            if any(re.match(tags, name) for name in names):
                layout.setdefault(category, {})[title] = ["Multiline", [tags]]
    return layout


@works_in_both_packages
class TensorBoardDashboard(L.Callback):
    """Write the layout of the Custom Scalars tab: what the strategy does, the losses and the metrics by task, the monitor.

    A chart is there as soon as something is logged that it shows; see `CHARTS`. TensorBoard reads one layout for each run: do
    not write another one to the same run. Without a `TensorBoardLogger` it does nothing.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(callbacks=[TensorBoardDashboard()], logger=False)
    """

    def __init__(self) -> None:
        self._names: set[str] = set()
        self._written: Layout = {}
        self._first_step = 0

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    @override
    def on_fit_start(self, trainer: L.Trainer, *_: object) -> None:
        self._names, self._written, self._first_step = set(), {}, trainer.global_step

    @override
    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.global_step <= self._first_step + 1:  # what comes later is found at the validations
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
        if layout != self._written and not trainer.sanity_checking:  # that only tells what will be logged
            self._written = layout
            for logger in trainer.loggers:
                if is_one_of(logger, "TensorBoardLogger"):
                    logger.experiment.add_custom_scalars(layout)  # type: ignore[attr-defined]
