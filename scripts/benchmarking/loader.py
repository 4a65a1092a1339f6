"""Measures the share of a training step that waits for the loader, with the data sets of the command line."""

from __future__ import annotations

import statistics
import tempfile
import warnings
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from lightning.pytorch.profilers import SimpleProfiler

from benchmarking.plan import Plan
from benchmarking.running import Clock
from benchmarking.summaries import median_and_quartiles, table, table_line
from lightning_gradnorm.experiments.cli.build import build, build_model
from lightning_gradnorm.experiments.cli.config import conf_dir, register

NEXT_BATCH = "[_TrainingEpochLoop].train_dataloader_next"
WARM_UP = 3
STEPS = {"rooms": 7, "rooms_few": 7, "nyuv2": 7, "turbofan": 15, "cmapss": 15}
"""Number of steps if a step takes seconds, otherwise 60."""
DESCRIBED = (
    "The share of a training step that Lightning waits for the next batch, according to its profiler: `gradnorm-train data=…`, "
    "with its network, GradNorm and its number of workers. Median over the rounds, and quartiles."
)


def known_data() -> list[str]:
    return sorted(file.stem for file in (conf_dir() / "data").glob("*.yaml"))


def waiting(name: str, plan: Plan, folder: Path) -> tuple[Any, float, float]:
    """Train a few steps like the command line.

    Returns:
        The data module, the seconds that a step waits for its batch, and the total seconds of a step.
    """
    register()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose("config", overrides=[f"data={name}", f"paths.run_dir={folder}", f"paths.root={folder}"])
    data, model, balancing = build(config, "data"), build_model(config), build(config, "balancing")
    steps = plan.setting.steps or STEPS.get(name, 60)
    clock = Clock(steps, WARM_UP, plan.setting)
    profiler = SimpleProfiler()
    callbacks = [clock, *([balancing] if balancing is not None else [])]
    plan.setting.trainer(steps, callbacks, profiler=profiler, default_root_dir=folder).fit(model, datamodule=data)
    # The fetches of the measured steps, except the first, whose batch was fetched before the clock started.
    waits = profiler.recorded_durations[NEXT_BATCH][WARM_UP + 1 : steps]
    measured = steps - 1 - WARM_UP
    return data, sum(waits) / measured, clock.seconds() / measured


def measure(plan: Plan) -> None:
    """Write the table."""
    rows = []
    for name in plan.data:
        shares, steps, data = [], [], None
        for _ in range(plan.rounds):
            with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data, wait, step = waiting(name, plan, Path(folder))
            shares.append(100 * wait / step)
            steps.append(1000 * step)
        described = [str(getattr(data, option)) for option in ("batch_size", "num_workers")]
        rows.append([name, *described, f"{statistics.median(steps):.1f}", median_and_quartiles(shares)])
        print(table_line(rows[-1]), flush=True)
    columns = ["data", "batch size", "workers", "ms a step", "of these waiting for the loader, %"]
    plan.write("Waiting for the loader", DESCRIBED, [table(columns, rows)])
