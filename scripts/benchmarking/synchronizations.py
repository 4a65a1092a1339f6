"""Counts how often the host waits for the GPU in a training step, from events of torch's profiler."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import lightning as L
from torch.profiler import ProfilerActivity, profile
from typing_extensions import override

from benchmarking.networks import NETWORKS
from benchmarking.plan import Case, Failures, Plan
from benchmarking.running import Setting, train
from benchmarking.summaries import table, table_line

KINDS = {
    "cudaStreamSynchronize": "stream",
    "cudaEventSynchronize": "event",
    "cudaDeviceSynchronize": "device",
    "Memcpy DtoH": "copies to the host",
}
DESCRIBED = (
    "What makes the host wait for the device, counted by torch's profiler from the begin of one batch to that of another and "
    "divided by the steps between: `cudaStreamSynchronize`, `cudaEventSynchronize`, `cudaDeviceSynchronize` (the profiler's "
    "own, when it stops, may be among them) and copies from the device to the host."
)


class Tracer(L.Callback):
    """Profiles the steps after the warm-up."""

    def __init__(self, first: int, last: int, setting: Setting) -> None:
        self.first, self.last, self.setting = first, last, setting
        cuda = [ProfilerActivity.CUDA] if setting.device == "cuda" else []
        self.profiler = profile(activities=[ProfilerActivity.CPU, *cuda])
        self.begun = 0

    @override
    def on_train_batch_start(self, *_: Any) -> None:
        if self.begun == self.first:
            self.setting.synchronize()
            self.profiler.start()
        elif self.begun == self.last:
            self.profiler.stop()
        self.begun += 1

    def names(self) -> list[str]:
        """Return the name of each event."""
        return [event.name for event in self.profiler.events() or ()]


def counted(names: Iterable[str]) -> dict[str, int]:
    """Return the number of events of each kind that makes the host wait."""
    counts = Counter(kind for name in names for start, kind in KINDS.items() if name.startswith(start))
    return {kind: counts[kind] for kind in KINDS.values()}


def measure(plan: Plan) -> None:
    """Write the table."""
    failures = Failures()
    rows = []
    for kind, tasks in plan.cases:
        first, last = NETWORKS[kind].warm_up, plan.setting.steps_of(kind) - 1
        for name in plan.all_names:

            def trace(name: str = name, case: Case = (kind, tasks), first: int = first, last: int = last) -> list[str]:
                tracer = Tracer(first, last, plan.setting)
                train(plan.way(name).start(*case, plan.setting.compiled), case[0], plan.setting, [tracer])
                return tracer.names()

            names = failures.attempt(plan, name, (kind, tasks), trace)
            counts = counted(names or ())
            cells = ["fails" if names is None else f"{counts[each] / (last - first):.2f}" for each in KINDS.values()]
            rows.append([kind, str(tasks), name, *cells])
            print(table_line(rows[-1]), flush=True)
    parts = [table(["model", "T", "way", *KINDS.values()], rows, texts=3), *failures.sentences()]
    plan.write("Synchronizations of a training step", DESCRIBED, parts)
