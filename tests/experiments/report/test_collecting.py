"""Runs are found in any subfolder, and read as far as possible."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from reporting import measured, write_log, write_run

from lightning_gradnorm.experiments.report.collect import collect, read, read_curves


def states(folder: Path) -> dict[str, str]:
    return {run.name: run.state for run in collect([folder])}


def test_runs_of_a_sweep_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (10, 2, 0):
        write_run(tmp_path / f"sweep/{number}", metrics=measured(1, 0.5))
    assert list(states(tmp_path)) == ["sweep/0", "sweep/2", "sweep/10"]
    assert list(states(tmp_path / "sweep/2")) == ["2"]


def test_a_run_in_two_of_the_folders_is_there_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a/0", metrics=measured(1, 0.5))
    assert len(collect([tmp_path, tmp_path / "a", tmp_path / "a/0"])) == 1


def test_folders_without_runs_are_refused_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        collect([tmp_path / "nowhere"])
    with pytest.raises(FileNotFoundError, match="is empty"):
        collect([tmp_path])
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf/config.yaml").write_text("defaults: [data: toy]\n")  # a program's configuration, not a run's
    (tmp_path / "other/.hydra").mkdir(parents=True)
    (tmp_path / "other/.hydra/config.yaml").write_text("db: mysql\n")  # another program's run
    with pytest.raises(FileNotFoundError, match="has no run of gradnorm-train"):
        collect([tmp_path])


def test_every_state_is_reported_with_the_progress_of_the_run(tmp_path: Path) -> None:
    rows = [{"epoch": 0, "step": 9, "train/loss": 1.0}, {"epoch": 1, "step": 19, "train/loss": 1.0}]
    write_run(tmp_path / "finished", metrics=measured(1, 0.5), training={"seconds": 2.0, "steps": 40, "epochs": 4})
    write_run(tmp_path / "trained", training={"seconds": 2.0, "steps": 40, "epochs": 4})
    write_run(tmp_path / "unfinished", logged=rows)
    write_run(tmp_path / "silent")
    failed = write_run(tmp_path / "failed", logged=rows[:1], trainer__max_steps=50)
    (failed / "failure.json").write_text(json.dumps({"error": "RuntimeError: out of memory", "step": 12}))
    never = tmp_path / "never/.hydra"
    never.mkdir(parents=True)
    (never / "config.yaml").write_text("balancing: {}\n")
    found = {run.name: (run.state, run.progress, run.remarks) for run in collect([tmp_path])}
    assert found == {
        "finished": ("finished", "step 40, epoch 4 of 4", []),
        "trained": ("trained, not tested", "step 40, epoch 4 of 4", []),
        "unfinished": ("unfinished", "step 20, epoch 2 of 4", []),
        "silent": ("unfinished", "began to train, nothing logged", []),
        "failed": ("failed", "step 10 of 50, epoch 1 of 4", ["RuntimeError: out of memory"]),
        "never": ("unfinished", "did not begin to train", []),
    }


def test_the_end_of_a_studys_output_is_shown_of_a_run_without_results(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "output.txt").write_text("Epoch 1\ngradnorm-train: there is no data 'toys'\n(HYDRA_FULL_ERROR=1 …)\n")
    assert read(run, "run").remarks == ["its output ends with: gradnorm-train: there is no data 'toys'"]


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("test_metrics.json", '{"test/loss": 1.0, "te', "test_metrics.json cannot be read"),
        ("test_metrics.json", "[1, 2]", "test_metrics.json should be a mapping"),
        ("test_metrics.json", '{"test/loss": "low"}', "test_metrics.json: test/loss should be a number; got 'low'"),
        ("test_metrics.json", '{"test/loss": NaN, "test/miou/seg": 1}', "not finite: test/loss"),
        ("test_metrics.json", "\x00\x01", "test_metrics.json cannot be read"),
        ("training.json", "", "training.json cannot be read"),
        ("weights.json", "{", "weights.json cannot be read"),
        ("config.yaml", "a: [1,", "config.yaml cannot be read"),
        ("config.yaml", "", "config.yaml should be a mapping; got nothing"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_read(tmp_path: Path, file: str, content: str, said: str) -> None:
    write_run(
        tmp_path / "run", metrics=measured(1, 0.5), training={"seconds": 2.0, "steps": 4}, weights={"weights": {"a": 1}}
    )
    (tmp_path / "run" / file).write_text(content)
    run = read(tmp_path / "run", "run")
    assert any(remark.startswith(said) for remark in run.remarks), run.remarks
    assert [bool(part) for part in (run.metrics, run.training, run.weights, run.config)].count(False) <= 1


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_log(run, [{"step": step, "train/loss": float(step)} for step in (0, 10, 20, 30)], version=9)
    write_log(run, [{"step": step, "train/loss": -float(step)} for step in (20, 30, 40)], version=10)
    assert read_curves(run)["train/loss"] == [(0, 0.0), (10, 10.0), (20, -20.0), (30, -30.0), (40, -40.0)]


def test_a_log_that_breaks_off_is_read_up_to_there(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    file = write_log(run, [{"step": 0, "train/loss": 1.0}, {"step": 10, "train/loss": 0.5}])
    with file.open("ab") as log:
        log.write(b"20\n30,0.2\x00\xff,,9\nxyz,1\n4")
    assert read_curves(run)["train/loss"] == [(0, 1.0), (10, 0.5)]
    file.write_bytes(b"")
    assert read_curves(run) == {}


def test_a_strategy_without_hydras_record_is_named_by_its_class(tmp_path: Path) -> None:
    inner = {"_target_": "lightning_gradnorm.Scalarization", "scalarizer": {"_target_": "torchjd.scalarization.UW"}}
    for name, balancing, expected in (
        ("a", {}, "equal"),
        ("b", {"_target_": "x.GradNorm"}, "gradnorm"),
        ("c", inner, "uw"),
    ):
        run = write_run(tmp_path / name)
        (run / ".hydra/hydra.yaml").unlink()
        config = (run / "config.yaml").read_text().replace("balancing: {}", f"balancing: {json.dumps(balancing)}")
        (run / "config.yaml").write_text(config)
        assert read(run, name).strategy == expected
