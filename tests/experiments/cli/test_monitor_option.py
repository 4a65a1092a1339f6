"""`callbacks=monitor`: the default callbacks, and the monitor of gradient norms."""

from __future__ import annotations

from pathlib import Path

from configurations import QUICK, SMALL, compose_run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_gradnorm.experiments.cli.train import train


def test_the_monitor_beside_the_default_callbacks_shows_each_task_and_suggests_weights(
    tmp_path: Path, capfd, caplog
) -> None:
    options = ["callbacks=monitor", "callbacks.monitor.every_n_steps=2", "callbacks.monitor.parameters=encoder"]
    config = compose_run(tmp_path, *SMALL, *QUICK, *options)
    default = compose_run(tmp_path, *SMALL, *QUICK, "callbacks=default")
    assert config.callbacks.keys() - {"monitor"} == default.callbacks.keys()
    train(config)
    said = capfd.readouterr().err + caplog.text  # where it goes depends on whether pytorch_lightning is imported
    assert "of the update on `encoder`" in said
    assert "Suggested static weights, which make the mean norms equal: FixedWeights({'task_0':" in said
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {"monitor/norm/task_0", "monitor/share/task_1", "monitor/imbalance"} <= set(events.Tags()["scalars"])
    assert "monitor/cosine" in events.Tags()["images"]
