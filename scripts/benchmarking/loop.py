"""Measures the time of Lightning's loop in a step, compared with a bare loop and with our callback."""

from __future__ import annotations

import csv
import statistics
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader
from typing_extensions import override

from benchmarking.models import Model
from benchmarking.networks import NETWORKS
from benchmarking.plan import Plan
from benchmarking.running import Clock, Setting, step_time
from benchmarking.summaries import median_and_quartiles, ratio_and_quartiles, table, table_line
from benchmarking.ways import EQUAL

BARE = "bare loop"
WRITE_EVERY = 50
DESCRIBED = (
    f"Time of a step of a bare PyTorch loop and of Lightning's, on the same network and batches; all of them write losses "
    f"to a CSV file every {WRITE_EVERY} steps. Median over the rounds, quartiles in brackets, of the times and of the ratios "
    "round by round."
)


class LogsLosses(L.Callback):
    """Logs the task losses only in steps that Lightning writes. Other logging is never seen, and slow."""

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Our own module returns nothing and logs its losses itself.
        if outputs is not None and (batch_idx + 1) % WRITE_EVERY == 0:
            self.log_dict({f"train/loss/{task}": loss for task, loss in outputs.items() if task != "loss"})


def bare_step_time(kind: str, tasks: int, setting: Setting, folder: Path) -> float:
    """Train without Lightning, with equal weights, and return the time of a step."""
    model = Model(kind, tasks, setting.compiled).to(setting.device)
    optimizer = model.configure_optimizers()
    steps, batch = setting.steps_of(kind), setting.batch_of(kind)
    clock = Clock(steps, NETWORKS[kind].warm_up, setting, block=WRITE_EVERY)
    with (folder / "losses.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        for step, x in enumerate(DataLoader([batch] * steps, batch_size=None)):  # type: ignore[arg-type]
            clock.on_train_batch_start()
            losses = model.training_step(x, step)
            optimizer.zero_grad()
            losses["loss"].backward()
            optimizer.step()
            if (step + 1) % WRITE_EVERY == 0:
                writer.writerow([step, *(loss.item() for loss in losses.values())])
    return clock.step_time()


def lightning_step_time(plan: Plan, name: str, kind: str, tasks: int, folder: Path) -> float:
    run = plan.way(name).start(kind, tasks, plan.setting.compiled)
    logger = CSVLogger(folder, name="lightning", flush_logs_every_n_steps=WRITE_EVERY)
    options = {"logger": logger, "log_every_n_steps": WRITE_EVERY}
    time, _ = step_time(run, kind, plan.setting, [LogsLosses()], block=WRITE_EVERY, **options)
    return time


def measure(plan: Plan) -> None:
    """Write the table."""
    rows = []
    for kind, tasks in plan.cases:
        names = [BARE, *plan.all_names]
        times: dict[str, list[float]] = {name: [] for name in names}
        for name in plan.interleaved(names):
            with tempfile.TemporaryDirectory() as folder:
                if name == BARE:
                    times[name].append(bare_step_time(kind, tasks, plan.setting, Path(folder)))
                else:
                    times[name].append(lightning_step_time(plan, name, kind, tasks, Path(folder)))
        for name in names:
            more = 1000 * (statistics.median(times[name]) - statistics.median(times[BARE]))
            milliseconds = median_and_quartiles([1000 * time for time in times[name]], 3)
            to_equal = ratio_and_quartiles(times[name], times[EQUAL])
            rows.append([kind, str(tasks), name, milliseconds, f"{more:.3f}", to_equal])
            print(table_line(rows[-1]), flush=True)
    columns = ["model", "T", "loop", "ms a step", "ms more than bare", f"ratio to Lightning's, {EQUAL}"]
    plan.write("Lightning's loop", DESCRIBED, [table(columns, rows, texts=3)])
