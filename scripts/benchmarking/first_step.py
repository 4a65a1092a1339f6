"""Measures the first step, in which the graph is checked and what you have not named is found."""

from __future__ import annotations

import gc
import statistics
from dataclasses import replace
from typing import Any

import lightning as L
from typing_extensions import override

from benchmarking.plan import Plan
from benchmarking.running import Setting, train
from benchmarking.summaries import median_and_quartiles, table, table_line

STEPS = 6
DESCRIBED = (
    f"The time of the first training step in Lightning's loop, and the median of the {STEPS - 2} steps after the second one, "
    "on the same batch. Median and quartiles over the rounds, all ways interleaved."
)


class Stopwatch(L.Callback):
    """Measures each step."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.seconds: list[float] = []

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        self.setting.synchronize()
        self.began = self.setting.now()

    @override
    def on_train_batch_end(self, *_: Any) -> None:
        self.setting.synchronize()
        self.seconds.append(self.setting.now() - self.began)


def measure(plan: Plan) -> None:
    """Write the table."""
    rows = []
    setting = replace(plan.setting, steps=STEPS)
    for kind, tasks in plan.cases:
        first: dict[str, list[float]] = {name: [] for name in plan.all_names}
        later: dict[str, list[float]] = {name: [] for name in plan.all_names}
        for name in plan.interleaved(plan.all_names):
            run = plan.way(name).start(kind, tasks, setting.compiled)
            gc.collect()
            train(run, kind, setting, [watch := Stopwatch(setting)])
            first[name].append(1000 * watch.seconds[0])
            later[name].append(1000 * statistics.median(watch.seconds[2:]))
        for name in plan.all_names:
            of_both = [median_and_quartiles(times[name], 1) for times in (first, later)]
            rows.append([kind, str(tasks), name, *of_both])
            print(table_line(rows[-1]), flush=True)
    plan.write(
        "The first step", DESCRIBED, [table(["model", "T", "way", "first step, ms", "a later step, ms"], rows, texts=3)]
    )
