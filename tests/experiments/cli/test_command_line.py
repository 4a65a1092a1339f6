"""`gradnorm-train` and `gradnorm-eval` as users call them."""

from __future__ import annotations

import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from machines import MODULE

from lightning_gradnorm.experiments.cli import evaluate, train
from lightning_gradnorm.experiments.cli.config import conf_dir
from lightning_gradnorm.experiments.report import read_run

SMALL = [
    "data.train_size=400",
    "data.val_size=100",
    "data.test_size=100",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "trainer.log_every_n_steps=1",
    "logger=csv",
]

Call = Callable[..., str]


def weights_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    content = torch.load(checkpoint, weights_only=True)
    state = content["callbacks"].get("GradNorm", {})
    return {**content["state_dict"], **{f"gradnorm.{k}": v for k, v in state.items() if isinstance(v, torch.Tensor)}}


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# ---- a run -----------------------------------------------------------------------------------------------------------


def test_a_run_leaves_one_folder_with_everything_in_it(call: Call, tmp_path: Path) -> None:
    said = call(train.main, *SMALL[:-1], "trainer.max_epochs=2")
    (run,) = (tmp_path / "outputs" / "toy" / "gradnorm").iterdir()
    for file in ("config.yaml", "weights.json", "test_metrics.json", "csv/version_0/metrics.csv"):
        assert (run / file).is_file()
    assert {file.name for file in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert list((run / "tensorboard").glob("events*"))
    assert "task_0" in said
    assert f"tensorboard --logdir outputs/toy/gradnorm/{run.name}" in said
    assert "gradnorm/weight/task_0" in (run / "csv/version_0/metrics.csv").read_text()
    assert list(tmp_path.iterdir()) == [tmp_path / "outputs"]


def test_evaluation_agrees_with_the_test_of_the_training(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call(train.main, *SMALL, "trainer.max_epochs=1", "hydra.run.dir=run", "data.sigmas=[1, 5, 9]")
    found: list[dict[str, float]] = []
    test = evaluate.evaluate
    monkeypatch.setattr(evaluate, "evaluate", lambda config: found.append(test(config)))
    said = call(evaluate.main, "ckpt_path=run/checkpoints/best.ckpt")
    assert found[0] == read_run(tmp_path / "run").metrics
    assert "task_2" in said
    call(evaluate.main, "ckpt_path=run/checkpoints/best.ckpt", "data.batch_size=10")
    assert found[1] == pytest.approx(found[0], rel=1e-4)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run"]


def test_a_resumed_run_is_bit_identical_and_keeps_its_options(call: Call, tmp_path: Path) -> None:
    options = [*SMALL, "data.sigmas=[1, 30]", "balancing.alpha=0.7", "test=false"]
    call(train.main, *options, "trainer.max_epochs=4", "hydra.run.dir=whole")
    call(train.main, *options, "trainer.max_epochs=2", "hydra.run.dir='a part=1'")
    call(train.main, "ckpt_path='a part=1/checkpoints/last.ckpt'", "trainer.max_epochs=4")
    assert same(
        weights_of(tmp_path / "whole/checkpoints/last.ckpt"), weights_of(tmp_path / "a part=1/checkpoints/last.ckpt")
    )
    assert same(
        weights_of(tmp_path / "whole/checkpoints/best.ckpt"), weights_of(tmp_path / "a part=1/checkpoints/best.ckpt")
    )
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a part=1", "whole"]


def test_the_last_checkpoint_is_of_the_last_epoch_also_when_nothing_gets_better(call: Call, tmp_path: Path) -> None:
    upside_down = ["callbacks.checkpoint.mode=max", "test=false"]  # the best epoch is the first
    call(train.main, *SMALL, *upside_down, "trainer.max_epochs=3", "hydra.run.dir=run")
    epochs = {
        name: torch.load(tmp_path / f"run/checkpoints/{name}.ckpt", weights_only=True)["epoch"]
        for name in ("best", "last")
    }
    assert epochs == {"best": 0, "last": 2}


def test_a_resume_that_fails_leaves_the_run_as_it_was(call: Call, tmp_path: Path) -> None:
    call(train.main, *SMALL, "trainer.max_epochs=1", "hydra.run.dir=run")
    run = tmp_path / "run"
    before = {name: (run / name).read_text() for name in ("config.yaml", "overrides.yaml")}
    said = call(
        train.main, "ckpt_path=run/checkpoints/last.ckpt", "experiment=toy_ten", "trainer.max_epochs=2", status=1
    )
    assert "belong to another network than the options describe" in said
    assert {name: (run / name).read_text() for name in before} == before
    call(train.main, "ckpt_path=run/checkpoints/last.ckpt", "trainer.max_epochs=2")
    assert "max_epochs: 2" in (run / "config.yaml").read_text()


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
@pytest.mark.parametrize(
    "options", [["balancing=equal"], ["balancing=uncertainty"], pytest.param(["balancing=dwa"], marks=pytest.mark.slow)]
)
def test_a_run_is_not_resumed_in_place_with_another_strategy(
    call: Call, tmp_path: Path, run: Path, options: list[str]
) -> None:
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    asked = ["ckpt_path=run/checkpoints/last.ckpt", *options, "trainer.max_epochs=2"]
    said = call(train.main, *asked, status=1)
    assert "run was trained with balancing=gradnorm, so it cannot be resumed with balancing=" in said
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    (folder,) = re.findall(r"add (hydra.run.dir=\S+) and", said)
    call(train.main, *asked, folder)
    assert {file: file.read_bytes() for file in run.rglob("*") if file.is_file()} == before
    assert "epochs: 2" in (tmp_path / folder.partition("=")[2] / "config.yaml").read_text()


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_a_run_with_nothing_left_to_train_reports_it(call: Call, run: Path) -> None:
    one = "This run has finished its epoch; add trainer.max_epochs=… to train longer.\n"
    assert one in call(train.main, "ckpt_path=run/checkpoints/last.ckpt")
    assert one not in call(train.main, "ckpt_path=run/checkpoints/last.ckpt", "trainer.max_epochs=2")
    assert "finished its 2 epochs;" in call(train.main, "ckpt_path=run/checkpoints/last.ckpt")
    longer = ["trainer.max_epochs=9", "trainer.max_steps=5"]
    said = call(train.main, "ckpt_path=run/checkpoints/last.ckpt", *longer)
    assert "finished its 8 steps; add trainer.max_steps=… to train longer." in said


def test_a_run_that_fails_before_training_leaves_no_folder_that_it_made(call: Call, tmp_path: Path) -> None:
    wrong = ["experiment=tabular", "data.path=nope.csv", "data.targets=[a,b]"]
    call(train.main, *wrong, status=1)
    call(train.main, "balancing.alpha=-1", "data.sigmas=[1]", status=1)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "outputs").mkdir()
    (tmp_path / "mine").mkdir()
    call(train.main, *wrong, status=1)
    call(train.main, *wrong, "hydra.run.dir=mine", status=1)
    assert (tmp_path / "mine/.hydra").is_dir()
    assert sorted(tmp_path.iterdir()) == [tmp_path / "mine", tmp_path / "outputs"]
    assert list((tmp_path / "outputs").iterdir()) == []


def test_a_sweep_makes_a_folder_for_each_run(call: Call, tmp_path: Path) -> None:
    call(train.main, "-m", *SMALL, "trainer.max_epochs=1", "callbacks=none", "seed=0,1")
    (sweep,) = (tmp_path / "outputs" / "toy" / "sweep").iterdir()
    first, second = read_run(sweep / "0_0").metrics, read_run(sweep / "1_1").metrics
    assert first.keys() == second.keys()
    assert first != second


def test_a_users_own_folder_of_options_needs_no_schema(call: Call, tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "balancing"
    mine.mkdir(parents=True)
    (mine / "gentle.yaml").write_text("_target_: lightning_gradnorm.GradNorm\nalpha: 0.1\n")
    (mine / "typo.yaml").write_text("_target_: lightning_gradnorm.GradNorm\nalhpa: 0.1\n")
    (mine / "strict.yaml").write_text("defaults:\n  - /schema/GradNorm@_here_\n  - _self_\nalhpa: 0.1\n")
    own = ["--config-dir", "mine", *SMALL, "callbacks=none", "trainer.max_epochs=1"]
    call(train.main, *own, "balancing=gentle", "hydra.run.dir=run")
    assert "alpha: 0.1" in (tmp_path / "run" / "config.yaml").read_text()
    assert "GradNorm has no parameter 'alhpa'; did you mean 'alpha'?" in call(
        train.main, *own, "balancing=typo", status=1
    )
    said = call(train.main, *own, "balancing=strict", status=1)
    assert "balancing/strict.yaml: there is no 'balancing.alhpa'; did you mean 'balancing.alpha'?" in said


def test_the_help_explains_every_group_and_names_every_option(call: Call) -> None:
    said = call(train.main, "--help").replace("\n      ", " ").splitlines()
    for group in ("experiment", "data", "model", "balancing", "trainer", "callbacks", "logger", "paths", "search"):
        (line,) = [line for line in said if line.startswith(f"{group} ")]
        for option in (conf_dir() / group).glob("*.yaml"):
            assert re.search(rf"\b{option.stem}\b", line), option.stem


def test_the_help_of_evaluation_explains_it_and_the_comparison_with_single_tasks(call: Call) -> None:
    said = call(evaluate.main, "--help")
    assert "gradnorm-eval ckpt_path=" in said
    assert "single_task=ALONE" in said
    assert "Δm in percent" in said


# ---- what is asked wrongly -------------------------------------------------------------------------------------------


WRONG_OPTIONS = [
    (
        ["balancing.alhpa=1"],
        ["there is no 'balancing.alhpa'; did you mean 'balancing.alpha'?", "balancing has: tasks, shared_layer"],
    ),
    (
        ["balancing=gradnrom"],
        ["there is no balancing 'gradnrom'; did you mean 'gradnorm'?", "balancing has: aligned_mtl, amnl, "],
    ),
    (
        ["balancing=mgda", "balancing.aggregator.epsilon=big"],
        ["balancing.aggregator.epsilon: value 'big'", "Float"],
    ),
    (
        ["balancing=pbi", "balancing.scalarizer.scalarizer.thet=1"],
        ["did you mean 'balancing.scalarizer.scalarizer.theta'?"],
    ),
    (["balancing=mgda", "+balancing.aggregator.fish=1"], ["torchjd.aggregation.MGDA has no parameter 'fish'"]),
    (["balancing=excess_mtl", "balancing.at=representation", *SMALL], ["Use at='parameters'"]),
    (["balancing=krum", *SMALL], ["Krum, asked to aggregate the gradients of 2 tasks, failed", "at least 4 rows"]),
    (
        ["balancing=uncertainty", "balancing.scalarizer.classification=[task_2]", *SMALL],
        ["names 'task_2', which is no"],
    ),
    (["balancing=gradnorm_static"], ["(or from_run) should be one finished run"]),
    (
        ["balancing=gradnorm_static", "balancing.from_run=nope"],
        ["run should be the folder", "there is no nope"],
    ),
    (["balancing=random_static", "balancing.seed=-1"], ["RandomWeights: seed should be an integer, at least 0"]),
    (["tasks=[task_2]"], ["there is no task 'task_2' to train; did you mean 'task_1'?"]),
    (["tasks=task_0"], ["tasks should be null or a list of names, such as [depth]; got 'task_0'"]),
    (["tasks=[]"], ["only should be None or a list of tasks"]),
    (
        ["trainer=ddp_cpu", "balancing.shared_layer=encodr.0", *SMALL],
        ["gradnorm-train: GradNorm: shared_layer 'encodr"],
    ),
    (
        ["data=mine"],
        [
            "there is no data 'mine'",
            "data has: cmapss, multimnist, nyuv2, pde, rooms, rooms_few, sinusoids, tabular, toy, turbofan",
        ],
    ),
    (
        ["data.path=x.csv"],
        ["there is no 'data.path' here; it belongs to data=tabular: add experiment=tabular or data=tabular\n"],
    ),
    (["data.root=there"], ["there is no 'data.root' here; it belongs to data=cmapss, data=nyuv2\n"]),
    (["--experiment", "tabular"], ["options have no dashes: write experiment=tabular"]),
    (["seed=1", "--trainer.max_epochs=3"], ["options have no dashes: write trainer.max_epochs=3"]),
    (["epochs=1"], ["'trainer.max_epochs'", "did you mean 'trainer.min_epochs' or "]),
    (
        ["balancing.lr=1"],
        ["did you mean 'balancing.optimizer.lr' or 'model.optimizer.lr'?", "balancing has: tasks"],
    ),
    (
        ["model.optimizer.epps=1"],
        ["did you mean '+model.optimizer.eps'?", "also accepts, each with a + before it: betas, eps, "],
    ),
    (["+trainer.max_epochs=1"], ["'trainer.max_epochs' already exists: set its new value without the +"]),
    (
        ["+data.fish=1"],
        ["data: lightning_gradnorm.experiments.problems.small.ToyDataModule has no parameter 'fish'"],
    ),
    (["alpha=big"], ["balancing.alpha: ", "'big' of type 'str' could not be converted to Float"]),
    (["data.sigmas=[1"], ["cannot parse 'data.sigmas=[1'"]),
    (["balancing=fixed"], ["balancing.weights should be set"]),
    (["balancing.alpha=-1"], ["GradNorm: alpha should be a finite number, at least 0; got -1"]),
    (["balancing.shared_layer=encodr.0", *SMALL], ["shared_layer 'encodr.0' is not in MultiTaskModule"]),
    (["trainer.accumulate_grad_batches=2"], ["got 2. Use model.accumulate_grad_batches=2 instead"]),
    (["callbacks.checkpoint=nope"], ["callbacks.checkpoint should be null or name a _target_; got 'nope'"]),
    (["--config-dir", "nowhere"], ["nowhere' not found"]),
]
"""What is given, and what the answer contains: one of each kind of mistake."""

MORE_WRONG_OPTIONS = [
    (
        ["balancing=mgda", "balancing.aggregator.epsilom=1"],
        ["'balancing.aggregator.epsilom'; did you mean 'balancing.aggregator.epsilon'?"],
    ),
    (
        ["balancing=famo", "balancing.scalarizer.weight_dcay=1"],
        ["did you mean 'balancing.scalarizer.weight_decay'?"],
    ),
    (["balancing=mgda", "balancing.att=parameters"], ["there is no 'balancing.att'; did you mean 'balancing.at'?"]),
    (["experiment=nope"], ["there is no experiment 'nope'", "experiment has: cmapss_fd001, "]),
    (["sed=1"], ["there is no 'sed'; did you mean 'seed'?", "the configuration has:"]),
    (["trainer.max_epoch=1"], ["did you mean 'trainer.max_epochs'?"]),
    (
        ["balancing.weights=[1]"],
        ["there is no 'balancing.weights' here; it belongs to balancing=fixed: add balanc"],
    ),
    (["max_epochs=1"], ["there is no 'max_epochs'; did you mean 'trainer.max_epochs'?"]),
    (
        ["model.optimizer.weight_decay=0.01"],
        ["but torch.optim.Adam accepts it. To add it, put a + before it: +model.optimizer.weight_decay=0.01\n"],
    ),
    (["balancing.alpha=big"], ["balancing.alpha: value 'big' of type 'str' could not be converted to Float"]),
    (["trainer.max_epochs=ten"], ["trainer.max_epochs: value 'ten'", "Integer"]),
    (["data.sigmas=[1]"], ["ToyDataModule: sigmas"]),
    (["trainer.gradient_clip_val=0.5"], ["got 0.5. Use model.gradient_clip_val=0.5 instead"]),
    (["seed=a"], ["seed should be an integer, at least 0; got 'a'"]),
    (["ckpt_path=nope.ckpt"], ["ckpt_path should be a checkpoint file; no such checkpoint: nope.ckpt"]),
    (["-m", "balancing=equal,nope"], ["there is no balancing 'nope'"]),
]
"""The same kinds once more, at other places; `test_responsive.py` has some of them in a fresh interpreter."""


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [*WRONG_OPTIONS, *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE_WRONG_OPTIONS)],
    ids=lambda value: " ".join(value[:1]) if isinstance(value, list) else None,
)
def test_the_error_for_a_wrong_option_lists_what_exists(call: Call, arguments: list[str], expected: list[str]) -> None:
    said = call(train.main, *arguments, status=1)
    for part in ["gradnorm-train: ", *expected, "HYDRA_FULL_ERROR=1"]:
        assert part in said


def test_an_unknown_metric_to_monitor_is_answered_with_the_likely_one(call: Call, tmp_path: Path) -> None:
    options = [
        *SMALL,
        "trainer.max_epochs=1",
        "callbacks.checkpoint.monitor=val/los",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]
    said = call(train.main, *options, status=1)
    assert "there is no metric 'val/los' to monitor; did you mean 'val/loss'?" in said
    assert "val/loss_ratio" in said


def test_a_gpu_trainer_without_a_gpu_is_a_clear_error(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for trainer in ("gpu", "mixed", "ddp"):
        said = call(train.main, f"trainer={trainer}", status=1)
        assert "trainer.accelerator=gpu needs a GPU, but torch" in said
        assert "Use trainer=cpu" in said


def test_whoever_asks_for_the_traceback_gets_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setattr(sys, "argv", ["gradnorm-train", "balancing.alpha=-1", "callbacks=none"])
    with pytest.raises(Exception, match="alpha should be a finite number") as caught:
        train.main()
    assert caught.value.__cause__ is not None


@pytest.fixture
def run(run_once: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of a finished run, in the folder of the test."""
    made = run_once(train.main, *SMALL, "trainer.max_epochs=1", "hydra.run.dir=run", "test=false")
    return shutil.copytree(made / "run", tmp_path / "run")


def test_evaluation_reports_missing_options(call: Call, tmp_path: Path) -> None:
    assert "ckpt_path should be set" in call(evaluate.main, status=1)
    assert "no such checkpoint: nope.ckpt; . has no checkpoints" in call(evaluate.main, "ckpt_path=nope.ckpt", status=1)
    (tmp_path / "lonely.ckpt").write_text("weights")
    assert "should be in the folder of its run" in call(evaluate.main, "ckpt_path=lonely.ckpt", status=1)


def test_a_file_that_is_not_a_checkpoint_of_the_run_is_an_error(call: Call, run: Path) -> None:
    (run / "notes.ckpt").write_text("weights")
    assert "cannot be read as one" in call(evaluate.main, "ckpt_path=run/notes.ckpt", status=1)
    assert "cannot be read as one" in call(train.main, "ckpt_path=run/notes.ckpt", status=1)
    assert "did you mean run/checkpoints/last.ckpt" in call(
        evaluate.main, "ckpt_path=run/checkpoints/lst.ckpt", status=1
    )
    good = "ckpt_path=run/checkpoints/last.ckpt"
    assert "did you mean 'data.batch_size'?" in call(evaluate.main, good, "data.batchsize=3", status=1)


@pytest.mark.usefixtures("run")
@pytest.mark.parametrize("main", [train.main, evaluate.main], ids=["gradnorm-train", "gradnorm-eval"])
def test_the_error_for_weights_of_another_network_names_the_first_difference(
    call: Call, main: Callable[[], None]
) -> None:
    said = call(main, "ckpt_path=run/checkpoints/last.ckpt", "model.encoder.hidden=[100, 100, 100, 7]", status=1)
    assert "last.ckpt belong to another network than the options describe (size mismatch for encoder." in said
    assert "Set the options of its run, or none" in said


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def assert_resumes_exactly(call: Call, folder: Path, options: list[str]) -> None:
    """Resume the interrupted run ``parts`` for more than an epoch, and train as long without a stop."""
    interrupted = torch.load(folder / "parts/checkpoints/interrupted.ckpt", weights_only=True)
    epochs = f"trainer.max_epochs={interrupted['epoch'] + 2}"
    call(train.main, "ckpt_path=parts/checkpoints/interrupted.ckpt", epochs)
    call(train.main, *options, epochs, "hydra.run.dir=whole")
    assert same(weights_of(folder / "whole/checkpoints/last.ckpt"), weights_of(folder / "parts/checkpoints/last.ckpt"))


def test_ctrl_c_leaves_a_checkpoint_that_resumes_exactly(
    call: Call, tmp_path: Path, interrupting: Callable[[int], None]
) -> None:
    options = [*SMALL, "test=false"]
    interrupting(6)  # an epoch is four steps
    said = call(train.main, *options, "trainer.max_epochs=100", "hydra.run.dir=parts", status=130)
    assert "gradnorm-train ckpt_path=parts/checkpoints/interrupted.ckpt" in said
    assert_resumes_exactly(call, tmp_path, options)


@pytest.mark.slow
def test_ctrl_c_at_any_moment_leaves_a_checkpoint_that_resumes_exactly(start: Any, call: Call, tmp_path: Path) -> None:
    options = [*SMALL, "test=false", "data.train_size=2000", "trainer.max_epochs=150"]
    process = start(*MODULE, *options, "hydra.run.dir=parts")
    metrics = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not metrics.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert "gradnorm-train ckpt_path=parts/checkpoints/interrupted.ckpt" in said
    assert "Traceback" not in said
    assert_resumes_exactly(call, tmp_path, options)
