"""What TensorBoard shows of the command line's runs: the address that is printed, and the HPARAMS tab of a sweep."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from configurations import QUICK, SMALL
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata

from lightning_gradnorm.experiments.cli import train
from lightning_gradnorm.experiments.report import delta_m, read_run

Call = Callable[..., str]

OPTIONS = [*SMALL, *QUICK]


def events_of(run: Path) -> EventAccumulator:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return events


def line_of(run: Path) -> tuple[dict[str, Any], list[str], dict[str, float]]:
    """Return a run's options, the columns for options, and the results, as TensorBoard's table takes them together."""
    events = events_of(run)
    content = {
        tag: events.SummaryMetadata(tag).plugin_data.content
        for tag in (metadata.SESSION_START_INFO_TAG, metadata.EXPERIMENT_TAG)
    }
    session = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG])
    options = {name: getattr(value, value.WhichOneof("kind")) for name, value in session.hparams.items()}
    experiment = metadata.parse_experiment_plugin_data(content[metadata.EXPERIMENT_TAG])
    written = events.Tags()["scalars"]
    wanted = [info.name.tag for info in experiment.metric_infos]
    results = {tag: events.Scalars(tag)[-1].value if tag in written else math.nan for tag in wanted}
    return options, [info.name for info in experiment.hparam_infos], results


def test_the_runs_of_a_sweep_can_be_compared_by_strategy_alpha_and_seed(call: Call, tmp_path: Path) -> None:
    said = call(train.main, "-m", *OPTIONS, "balancing=equal,gradnorm", "seed=0,1", "alpha=0.5", "hydra.sweep.dir=runs")
    runs = sorted((tmp_path / "runs").glob("*_*"))
    assert [run.name for run in runs] == ["0_equal_0", "1_equal_1", "2_gradnorm_0", "3_gradnorm_1"]
    lines = [line_of(run) for run in runs]
    equal, gradnorm = {"strategy": "equal"}, {"strategy": "gradnorm", "alpha": 0.5}
    expected = [base | {"seed": seed} for base in (equal, gradnorm) for seed in ("0", "1")]
    assert [options for options, _, _ in lines] == expected
    for run, (_, columns, results) in zip(runs, lines, strict=True):
        assert columns == ["strategy", "alpha", "seed"]
        assert list(results)[:4] == ["best/val/loss", "test/r2/task_0", "test/r2/task_1", "test/loss"]
        validated = events_of(run).Scalars("val/loss")[-1].value  # of the only epoch
        assert results == pytest.approx({"best/val/loss": validated, **read_run(run).metrics})
        assert "hp_metric" not in events_of(run).Tags()["scalars"]
    assert "tensorboard --logdir runs\n" in said
    assert "http://localhost:6006/#hparams compares the runs" in said


def test_the_validation_loss_and_the_test_are_of_the_same_checkpoint(call: Call, tmp_path: Path) -> None:
    """The best epoch is not the last one: it is to be the one with the largest ratio."""
    few = [one for one in OPTIONS if not one.startswith("trainer.max_epochs")]
    call(train.main, *few, "trainer.max_epochs=3", "callbacks.checkpoint.mode=max", "hydra.run.dir=run")
    events = events_of(tmp_path / "run")
    losses = [[event.value for event in events.Scalars(f"val/loss/task_{number}")] for number in range(2)]
    ratios = [sum(loss[epoch] / loss[0] for loss in losses) / 2 for epoch in range(3)]
    assert [event.value for event in events.Scalars("val/loss_ratio")] == pytest.approx(ratios, rel=1e-6)
    best = ratios.index(max(ratios))
    assert best < 2, "or the test shows nothing"
    assert torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)["epoch"] == best
    _, _, results = line_of(tmp_path / "run")
    assert results["best/val/loss"] == pytest.approx(events.Scalars("val/loss")[best].value, rel=1e-6)
    assert results["test/loss"] == pytest.approx(read_run(tmp_path / "run").metrics["test/loss"], rel=1e-6)


def test_without_a_best_checkpoint_the_validation_loss_is_the_last(call: Call, tmp_path: Path) -> None:
    call(train.main, *OPTIONS, "callbacks.checkpoint=null", "hydra.run.dir=run")
    _, _, results = line_of(tmp_path / "run")
    assert results["val/loss"] == pytest.approx(events_of(tmp_path / "run").Scalars("val/loss")[-1].value)


@pytest.mark.slow
def test_only_options_that_a_sweep_varies_are_columns(call: Call, tmp_path: Path) -> None:
    call(train.main, "-m", *OPTIONS, "model.optimizer.lr=0.1,0.01", "data.batch_size=50", "hydra.sweep.dir=runs")
    options, columns, _ = line_of(tmp_path / "runs" / "1_0.01")
    assert columns == ["strategy", "alpha", "seed", "model.optimizer.lr"]
    assert options == {"strategy": "gradnorm", "alpha": 1.5, "seed": "0", "model.optimizer.lr": 0.01}


def test_delta_m_is_a_result_where_single_task_runs_are_given(call: Call, tmp_path: Path) -> None:
    call(train.main, "-m", *OPTIONS, "tasks=[task_0],[task_1]", "hydra.sweep.dir=alone")
    alone = [tmp_path / "alone" / name for name in ("0_task_0", "1_task_1")]
    options, _, results = line_of(alone[0])
    assert options == {"strategy": "task_0 alone", "seed": "0"}
    assert "test/r2/task_1" in results, "or a table whose first run this is would leave it out"

    said = call(train.main, *OPTIONS, "single_task=alone", "hydra.run.dir=run")
    together = {name: value for run in alone for name, value in read_run(run).metrics.items()}
    expected = delta_m(read_run(tmp_path / "run").metrics, together)
    _, _, results = line_of(tmp_path / "run")
    assert list(results)[:2] == ["best/val/loss", "test/delta_m"]
    assert results["test/delta_m"] == pytest.approx(expected, rel=1e-6)
    assert f"{expected:.4g}" in said

    said = call(train.main, *OPTIONS, "single_task=alone/0_task_0", "hydra.run.dir=other", status=1)
    assert "there are none of task_1 alone" in said
    assert not (tmp_path / "other" / "tensorboard").exists(), "it is reported before any training"


@pytest.mark.slow
def test_a_resumed_run_has_the_line_of_its_new_options(call: Call, tmp_path: Path) -> None:
    call(train.main, *OPTIONS, "balancing.alpha=0.5", "hydra.run.dir=run")
    _, _, before = line_of(tmp_path / "run")
    call(train.main, "ckpt_path=run/checkpoints/last.ckpt", "trainer.max_epochs=3", "balancing.alpha=1.0")
    options, _, after = line_of(tmp_path / "run")
    assert options["alpha"] == 1.0
    assert options["trainer.max_epochs"] == 3
    assert after["test/loss"] == pytest.approx(read_run(tmp_path / "run").metrics["test/loss"])
    assert after["test/loss"] != before["test/loss"]
    assert len([e.step for e in events_of(tmp_path / "run").Scalars("val/loss")]) == 3


def test_an_interrupted_run_has_a_line_already(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = []

    def interrupt(*_: Any) -> None:
        ended.append(1)
        if len(ended) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("lightning_gradnorm.MultiTaskModule.on_train_epoch_end", interrupt, raising=False)
    call(train.main, *OPTIONS, "trainer.max_epochs=3", "hydra.run.dir=run", status=130)
    options, _, results = line_of(tmp_path / "run")
    assert options["strategy"] == "gradnorm"
    assert math.isfinite(results["best/val/loss"])
    assert math.isnan(results["test/loss"])


def test_the_address_of_the_dashboard_is_printed_if_there_is_one(call: Call, tmp_path: Path) -> None:
    said = call(train.main, *OPTIONS, "hydra.run.dir=run")
    assert "tensorboard --logdir run\n             http://localhost:6006/#custom_scalars\n" in said
    assert "#hparams" not in said
    for logger in ("csv", "none"):
        said = call(train.main, *OPTIONS, f"logger={logger}", f"hydra.run.dir={logger}")
        assert "tensorboard" not in said
        assert not list((tmp_path / logger).rglob("*tfevents*"))
