"""Measures peak memory, with each run in a fresh process."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from pages import be_quiet

from benchmarking.plan import Case, Failures, Plan
from benchmarking.running import Setting, step_time
from benchmarking.summaries import table, table_line
from benchmarking.ways import EQUAL, WAYS

DESCRIBED = (
    "Peak resident memory (on a GPU: allocated memory) beyond that of the process after a few steps of the same network, "
    "trained the same way with batches of one. Each run has a fresh process whose allocator returns freed memory immediately "
    "(MALLOC_MMAP_THRESHOLD_), so this counts live memory, not reserves or the code of operators. Median, "
    "and ratio to equal weights."
)
_GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""For glibc, whose reserve depends on the order of allocations."""


def peak_memory(group: str, name: str, case: Case, setting: Setting) -> float:
    """Return how much a run increases the memory of its process, in MiB. Call it in a fresh process."""
    be_quiet(setting.threads)
    warnings.simplefilter("ignore")
    way = WAYS[group][name]
    # Do not measure packages and the code of operators, which is loaded on their first call.
    way.what_is_missing()
    kind, tasks = case
    step_time(way.start(kind, tasks, setting.compiled), kind, replace(setting, steps=None, batch_size=1))
    gc.collect()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()  # Linux
    step_time(way.start(kind, tasks, setting.compiled), kind, setting)
    if setting.device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return (1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20


def peak_in_a_fresh_process(group: str, name: str, case: Case, setting: Setting) -> float:
    os.environ |= _GIVES_BACK  # the new process reads it when it starts
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(peak_memory, group, name, case, setting).result()


def measure(plan: Plan) -> None:
    """Write the table."""
    failures = Failures()
    rows = []
    for case in plan.cases:
        peaks: dict[str, list[float]] = {name: [] for name in plan.all_names}
        for name in plan.interleaved(plan.all_names):

            def train(name: str = name, case: Case = case) -> float:
                return peak_in_a_fresh_process(plan.group, name, case, plan.setting)

            found = failures.attempt(plan, name, case, train)
            if found is not None:
                peaks[name].append(found)
        medians = {name: statistics.median(values) for name, values in peaks.items() if values}
        ratios = [f"{medians[name] / medians[EQUAL]:.3f}" if name in medians else "fails" for name in plan.names]
        rows.append([case[0], str(case[1]), f"{medians[EQUAL]:.0f}", *ratios])
        print(table_line(rows[-1]), flush=True)
    parts = [table(["model", "T", f"{EQUAL}, MiB", *plan.names], rows), *failures.sentences()]
    plan.write("Peak memory", DESCRIBED, parts)
