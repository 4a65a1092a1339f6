"""`gradnorm-train -m`: each job runs once, whatever stops the sweep, sees all its data, and fails without affecting others."""

from __future__ import annotations

import contextlib
import json
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import MissingConfigException
from machines import MODULE
from torch import distributed

from lightning_gradnorm.experiments.callbacks.save_last import SaveLast
from lightning_gradnorm.experiments.callbacks.save_on_interrupt import SaveOnInterrupt
from lightning_gradnorm.experiments.cli import errors, job_runner, report, sweep, train, training
from lightning_gradnorm.experiments.cli.console import executable
from lightning_gradnorm.experiments.report import delta_m, read_run

TINY = [
    "data.train_size=40", "data.val_size=20", "data.test_size=20", "data.batch_size=10", "trainer.max_epochs=2",
    "trainer.enable_progress_bar=false", "trainer.enable_model_summary=false", "logger=none",
]  # fmt: skip
QUICK = [*TINY, "callbacks=none"]

Call = Callable[..., str]


def results(folder: Path) -> dict[str, dict[str, float]]:
    return {file.parent.name: read_run(file.parent).metrics for file in sorted(folder.glob("*/test_metrics.json"))}


def written(folder: Path) -> dict[str, int]:
    """Job → when its result was written, to the nanosecond."""
    return {file.parent.name: file.stat().st_mtime_ns for file in folder.glob("*/test_metrics.json")}


# ---- finished, failed, interrupted -----------------------------------------------------------------------------------


def test_a_job_that_fails_ends_no_other_and_is_named_at_the_end(call: Call, tmp_path: Path) -> None:
    asked = ["-m", *QUICK[:3], *QUICK[4:], "data.batch_size=0,10", "seed=0,1", "hydra.sweep.dir=sweep"]
    said = call(train.main, *asked, status=1)
    assert "4 jobs, 2 done, 2 failed" in said
    reason = "ToyDataModule: batch_size should be at least 1; got 0."
    for job in ("0_0_0", "1_0_1"):
        assert f"\n  {job}: {reason}\n" in said
        assert json.loads((tmp_path / "sweep" / job / "failure.json").read_text()) == {"error": reason}
    assert f"gradnorm-train {' '.join(asked)}" in said
    before = written(tmp_path / "sweep")
    assert set(before) == {"2_10_0", "3_10_1"}

    assert f"0_0_0: failed, did not begin to train; {reason}" in call(report.main, "sweep")
    assert "4 jobs, 2 finished before, 2 failed" in call(train.main, *asked, status=1)
    assert written(tmp_path / "sweep") == before
    assert not list((tmp_path / "sweep").glob(".jobs"))


def test_a_defect_in_one_job_is_shown_with_its_traceback_and_ends_no_other(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = training.build_model
    monkeypatch.setattr(training, "build_model", lambda config: {}["gone"] if config.seed == 0 else inner(config))
    monkeypatch.setattr("traceback.print_exc", lambda: print("the traceback"))
    said = call(train.main, "-m", *QUICK, "seed=0,1", "hydra.sweep.dir=sweep", status=1)
    assert "the traceback" in said
    assert "0_0: KeyError: 'gone'" in said
    assert list(results(tmp_path / "sweep")) == ["1_1"]


@pytest.fixture
def finished_sweep(run_once: Callable[..., Path], tmp_path: Path) -> None:
    """A copy of a finished sweep over two seeds, in the folder of the test."""
    made = run_once(train.main, "-m", *QUICK, "seed=0,1", "hydra.sweep.dir=sweep")
    shutil.copytree(made / "sweep", tmp_path / "sweep")


@pytest.mark.usefixtures("finished_sweep")
def test_the_folder_of_another_sweep_does_not_change(call: Call, tmp_path: Path) -> None:
    before = written(tmp_path / "sweep")
    said = call(train.main, "-m", *QUICK, "alpha=2", "seed=0,1", "hydra.sweep.dir=sweep", status=1)
    assert "sweep/0_0 should be a run with" in said
    assert "Choose another folder, or remove the run" in said
    assert written(tmp_path / "sweep") == before
    assert not list((tmp_path / "sweep").rglob("failure.json"))
    # The order of the options is no difference, and a job that was carried on alone is the sweep's own.
    record = tmp_path / "sweep/0_0/overrides.yaml"
    record.write_text(record.read_text() + f"- ckpt_path={tmp_path / 'sweep/0_0/checkpoints/last.ckpt'}\n")
    said = call(train.main, "-m", "seed=0,1", *reversed(QUICK), "hydra.sweep.dir=sweep")
    assert "2 jobs, 2 finished before" in said


def test_a_sweep_without_test_is_finished_by_its_training(call: Call, tmp_path: Path) -> None:
    for expected in ("1 job, 1 done", "1 job, 1 finished before"):
        assert expected in call(train.main, "-m", *QUICK, "test=false", "hydra.sweep.dir=sweep")
    assert not (tmp_path / "sweep/0/test_metrics.json").exists()


def test_the_same_command_continues_an_interrupted_sweep(
    call: Call, tmp_path: Path, interrupting: Callable[[int], None]
) -> None:
    asked = ["-m", *TINY, "seed=0,1,2"]
    call(train.main, *asked, "hydra.sweep.dir=whole")
    interrupting(8 + 6)  # in the second job's second epoch
    said = call(train.main, *asked, "hydra.sweep.dir=parts", status=130)
    assert "1 job so far, 1 done" in said
    assert (
        f"Interrupted. Resume with:\n  {executable('gradnorm-train')} {' '.join(asked)} hydra.sweep.dir=parts\n" in said
    )
    assert "ckpt_path" not in said
    assert list(results(tmp_path / "parts")) == ["0_0"]
    assert (tmp_path / "parts/1_1/checkpoints/interrupted.ckpt").is_file()
    assert not (tmp_path / "parts/2_2").exists()
    before = written(tmp_path / "parts")
    said = call(train.main, *asked, "hydra.sweep.dir=parts")
    assert "1_1 resumes from interrupted.ckpt" in said
    assert "3 jobs, 2 done, 1 finished before" in said
    assert before.items() <= written(tmp_path / "parts").items()
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


def swallowed_ctrl_c() -> None:
    """Ctrl-C in code that catches everything, as destructors and callbacks from C do."""
    with contextlib.suppress(BaseException):
        signal.raise_signal(signal.SIGINT)


def swallow_before(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Press Ctrl-C, without effect, at the start of the second job's call of a function."""
    inner = getattr(owner, name)

    def pressed(*arguments: Any, **more: Any) -> Any:
        if HydraConfig.get().job.num == 1:
            swallowed_ctrl_c()
        return inner(*arguments, **more)

    patch.setattr(owner, name, pressed)


@pytest.mark.parametrize(
    ("owner", "name", "done"),
    [
        pytest.param(sweep.Callback, "on_job_start", 1, id="before the second job"),
        pytest.param(training, "build_model", 2, id="in the second job"),
        pytest.param(SaveOnInterrupt, "on_train_end", 2, id="after the last batch"),
    ],
)
def test_a_ctrl_c_that_a_library_swallows_stops_the_sweep_before_the_next_job(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, done: int
) -> None:
    asked = ["-m", *TINY, "seed=0,1,2", "hydra.sweep.dir=sweep"]
    usual = signal.getsignal(signal.SIGINT)
    swallow_before(monkeypatch, owner, name)
    said = call(train.main, *asked, status=130)
    assert f"{done} job{'s' * (done > 1)} so far, {done} done" in said
    assert f"Interrupted. Resume with:\n  {executable('gradnorm-train')} {' '.join(asked)}\n" in said
    jobs = ["0_0", "1_1", "2_2"]
    assert sorted(job.name for job in (tmp_path / "sweep").glob("[0-9]*")) == jobs[:done]
    assert list(results(tmp_path / "sweep")) == jobs[:done]
    assert signal.getsignal(signal.SIGINT) is usual


def test_ctrl_c_during_the_test_stops_the_sweep_with_the_same_status(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SaveLast, "on_test_start", lambda *_: signal.raise_signal(signal.SIGINT), raising=False)
    said = call(train.main, "-m", *TINY, "seed=0,1", "hydra.sweep.dir=sweep", status=130)
    assert "Interrupted. Resume with:" in said
    assert not (tmp_path / "sweep/1_1").exists()


def test_a_second_ctrl_c_stops_the_job_at_once(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    survived = []

    def press_twice(*_: Any) -> None:
        for press in ("first", "second"):
            signal.raise_signal(signal.SIGINT)
            survived.append(press)

    monkeypatch.setattr(SaveLast, "on_train_batch_start", press_twice)
    said = call(train.main, "-m", *TINY, "seed=0,1", "hydra.sweep.dir=sweep", status=130)
    assert "Interrupted. Resume with:" in said
    assert survived == ["first"]
    assert not (tmp_path / "sweep/0_0/checkpoints/interrupted.ckpt").exists()
    assert not (tmp_path / "sweep/1_1").exists()


def test_ctrl_c_that_is_ignored_or_another_threads_stays_so() -> None:
    usual = signal.getsignal(signal.SIGINT)
    try:
        for handler in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGINT, handler)
            with sweep.told_at_the_end("command"):
                assert signal.getsignal(signal.SIGINT) is handler
    finally:
        signal.signal(signal.SIGINT, usual)
    seen: list[Any] = []

    def elsewhere() -> None:
        with sweep.told_at_the_end("command"):
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join(30)
    assert seen == [usual]


@pytest.mark.slow
def test_a_job_killed_between_training_and_test_ends_as_the_others(call: Call, tmp_path: Path) -> None:
    asked = ["-m", *TINY, "seed=0,1", "hydra.sweep.dir=sweep"]
    call(train.main, *asked)
    job = tmp_path / "sweep/1_1"
    names = ("test_metrics.json", "metrics.json")
    expected = {name: json.loads((job / name).read_text()) for name in names}
    for lost in (names[:1], names):
        trained = (job / "training.json").stat().st_mtime_ns
        for name in lost:
            (job / name).unlink()
        assert "2 jobs, 1 done, 1 finished before" in call(train.main, *asked)
        assert {name: json.loads((job / name).read_text()) for name in names} == expected
        is_trained_again = (job / "training.json").stat().st_mtime_ns != trained
        assert is_trained_again == ("metrics.json" in lost)


def test_two_processes_do_not_run_one_job_at_once(tmp_path: Path) -> None:
    inside: list[str] = []
    go = threading.Event()

    def second() -> None:
        with sweep._alone_in(tmp_path):
            inside.append("second")
            go.set()

    with sweep._alone_in(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        assert not go.wait(0.3)
        inside.append("first")
    thread.join(30)
    assert inside == ["first", "second"]


def stop(process: subprocess.Popen[str], folder: Path, how: signal.Signals, draw: random.Random) -> dict[str, int]:
    """Send the signal at a random moment, once some more jobs are done; return when the results were written."""
    wanted = len(written(folder)) + draw.randint(1, 3)
    deadline = time.monotonic() + 300
    while len(written(folder)) < wanted:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(draw.uniform(0, 0.8))
    process.send_signal(how)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == (130 if how == signal.SIGINT else -how), said
    return written(folder)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_twelve_jobs_interrupted_and_killed_at_random_times_are_each_done_once(
    start: Any, call: Call, tmp_path: Path, seed: int
) -> None:
    draw = random.Random(seed)
    asked = ["-m", *TINY, "trainer.max_epochs=15", "alpha=0,0.5,1.5", "seed=0,1,2,3"]
    ends = [signal.SIGINT, signal.SIGKILL]
    draw.shuffle(ends)
    done: list[dict[str, int]] = []
    for how in ends:
        done.append(stop(start(*MODULE, *asked, "hydra.sweep.dir=parts"), tmp_path / "parts", how, draw))
    assert 0 < len(done[0]) < len(done[1]) < 12
    said = call(train.main, *asked, "hydra.sweep.dir=parts")
    assert f"12 jobs, {12 - len(done[1])} done, {len(done[1])} finished before" in said
    at_the_end = written(tmp_path / "parts")
    assert len(at_the_end) == 12
    for earlier in done:  # a result is written once
        assert earlier.items() <= at_the_end.items()
    call(train.main, *asked, "hydra.sweep.dir=whole")
    assert results(tmp_path / "parts") == results(tmp_path / "whole")


# ---- several processes for each job ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("how", ["trainer=ddp_cpu", "trainer.strategy=ddp"])
def test_a_sweep_over_the_number_of_processes_gives_each_job_all_its_data(
    call: Call, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning's usual way starts the whole command again in each process, at whose end one of two trains on one half."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    call(train.main, "-m", *QUICK, how, "trainer.devices=1,2,1", "hydra.sweep.dir=sweep")
    steps = [
        json.loads((tmp_path / f"sweep/{job}/training.json").read_text())["steps"] for job in ("0_1", "1_2", "2_1")
    ]
    assert steps == [8, 4, 8]  # 2 epochs of 40 examples, 10 on each process
    found = results(tmp_path / "sweep")
    for devices in (1, 2):
        command = job_runner.command([*QUICK, how, f"trainer.devices={devices}"], tmp_path / f"alone_{devices}")
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
        assert found[f"{devices - 1}_{devices}"] == read_run(tmp_path / f"alone_{devices}").metrics
    assert found["2_1"] == found["0_1"] != found["1_2"]


def test_a_job_whose_processes_would_replay_the_sweep_runs_as_a_separate_command(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = "import sys; folder = sys.argv[-1].partition('=')[2]; open(folder + '/{}', 'w').write('{}'); sys.exit({})"
    asked: list[list[str]] = []

    def command(overrides: list[str], folder: Path) -> list[str]:
        asked.append(overrides)
        files = ("test_metrics.json", '{"test/loss": 3.5}', 0) if len(asked) == 1 else ("noise", "", 7)
        return [sys.executable, "-c", script.format(*files), f"hydra.run.dir={folder}"]

    monkeypatch.setattr(job_runner, "command", command)
    own = ["trainer.strategy=ddp", "trainer.devices=2", "hydra.job.name=mine", "hydra.sweep.dir=sweep"]
    said = call(train.main, "-m", *QUICK, *own, "seed=0,1", status=1)
    assert "2 jobs, 1 done, 1 failed" in said
    assert "1_1: gradnorm-train for this job ended with status 7" in said
    assert results(tmp_path / "sweep") == {"0_0": {"test/loss": 3.5}}
    assert [words[0] for words in asked] == ["hydra.job.name=mine"] * 2
    assert [words[-1] for words in asked] == ["seed=0", "seed=1"]
    assert "hydra.mode=RUN" in asked[0]  # also of a search, whose configuration says otherwise
    assert not any("sweep" in word or "MULTIRUN" in word for word in asked[0])


def test_a_process_that_takes_itself_for_one_of_two_does_not_train_on_its_half(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")  # as an earlier job of two processes leaves it
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        said = call(train.main, *QUICK, "trainer.strategy=ddp", "trainer.devices=2", "hydra.run.dir=run", status=1)
    finally:
        distributed.destroy_process_group()
    assert "ask for 2 processes, which share the data; 1 of them trains." in said
    assert "without the variable LOCAL_RANK" in said
    assert not (tmp_path / "run/training.json").exists()


@pytest.mark.slow
def test_fsdp_and_ddp_in_one_sweep_agree(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    on_cpu = ["trainer.accelerator=cpu", "trainer.devices=2", "hydra.sweep.dir=sweep"]
    call(train.main, "-m", *TINY, *on_cpu, "trainer=ddp,fsdp")
    found = results(tmp_path / "sweep")
    assert found["1_fsdp"] == pytest.approx(found["0_ddp"], rel=1e-5)
    ddp, fsdp = (
        torch.load(tmp_path / f"sweep/{job}/checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for job in ("0_ddp", "1_fsdp")
    )
    assert ddp.keys() == fsdp.keys()
    for name in ddp:
        torch.testing.assert_close(fsdp[name], ddp[name])


# ---- launchers and a search, with the extra `sweeps` -----------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_the_jobs_of_a_launcher_have_our_resolvers_and_schemas(
    start: Any, call: Call, tmp_path: Path, launcher: str
) -> None:
    """In their processes nothing has registered resolvers and schemas, and the command line is another."""
    pytest.importorskip(f"hydra_plugins.hydra_{launcher.partition('_')[0]}_launcher")
    asked = ["-m", *QUICK, "data.sigmas=[1, 5, 9]", "balancing=gradnorm,dwa", "alpha=1,-1"]
    process = start(*MODULE, *asked, f"hydra/launcher={launcher}", "hydra.sweep.dir=there")
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "4 jobs, 3 done, 1 failed" in said
    assert "1_gradnorm_1: GradNorm: alpha should be a finite number, at least 0; got -1" in said
    call(train.main, *asked, "hydra.sweep.dir=here", status=1)
    assert results(tmp_path / "there") == results(tmp_path / "here")
    assert list(results(tmp_path / "there")) == ["0_gradnorm_1", "2_dwa_1", "3_dwa_1"]


SEARCH = [*QUICK, "search=gradnorm", "hydra.sweep.dir=sweep"]


OPTUNAS_OWN = pytest.mark.filterwarnings("ignore:.*declarative_base", "ignore:.*experimental")


@pytest.fixture
def optuna() -> None:
    """Skips the test without Optuna; its log would keep writing to the output of the first test that imported it."""
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    pytest.importorskip("optuna").logging.disable_default_handler()


@pytest.mark.slow
@pytest.mark.usefixtures("optuna")
@OPTUNAS_OWN
def test_a_search_begun_again_repeats_no_trial(call: Call, tmp_path: Path) -> None:
    after_two = [
        *SEARCH,
        "hydra.sweeper.sampler.n_startup_trials=2",
    ]  # random ones; then it depends on the results before
    call(train.main, *after_two, "hydra.sweeper.n_trials=5", "hydra.sweep.dir=whole")
    call(train.main, *after_two, "hydra.sweeper.n_trials=3")
    before = written(tmp_path / "sweep")
    assert len(before) == 3
    assert "5 jobs, 2 done, 3 finished before" in call(train.main, *after_two, "hydra.sweeper.n_trials=5")
    assert before.items() <= written(tmp_path / "sweep").items()
    assert results(tmp_path / "sweep") == results(tmp_path / "whole")  # the names are those of the trials' options
    best = (tmp_path / "sweep/optimization_results.yaml").read_text()
    assert best == (tmp_path / "whole/optimization_results.yaml").read_text()
    last = [json.loads(file.read_text())["val/loss"] for file in (tmp_path / "sweep").glob("*/metrics.json")]
    assert f"best_value: {min(last)}" in best


@pytest.mark.slow
@pytest.mark.usefixtures("optuna")
@OPTUNAS_OWN
def test_a_search_for_the_mean_gain_takes_the_single_tasks_runs(call: Call, tmp_path: Path) -> None:
    wanted = ["optimized_metric=test/delta_m", "hydra.sweeper.n_trials=2", "hydra.sweeper.direction=maximize"]
    said = call(train.main, *SEARCH, *wanted, status=1)
    assert "optimized_metric=test/delta_m needs single_task=FOLDERS" in said
    call(train.main, "-m", *QUICK, "tasks=[task_0],[task_1]", "hydra.sweep.dir=alone")
    call(train.main, *SEARCH, *wanted, "single_task=alone", "hydra.sweep.dir=gains")
    alone = {name: value for run in results(tmp_path / "alone").values() for name, value in run.items()}
    gains = [delta_m(metrics, alone) for metrics in results(tmp_path / "gains").values()]
    assert f"best_value: {max(gains)}" in (tmp_path / "gains/optimization_results.yaml").read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("optuna")
@OPTUNAS_OWN
def test_a_trial_can_be_carried_on_alone(call: Call, tmp_path: Path) -> None:
    call(train.main, *TINY, "search=gradnorm", "hydra.sweeper.n_trials=1", "hydra.sweep.dir=sweep")
    (trial,) = results(tmp_path / "sweep")
    said = call(train.main, f"ckpt_path=sweep/{trial}/checkpoints/last.ckpt", "trainer.max_epochs=3")
    assert " job" not in said
    assert json.loads((tmp_path / "sweep" / trial / "training.json").read_text())["epochs"] == 3


@pytest.mark.usefixtures("optuna")
@OPTUNAS_OWN
def test_the_error_for_a_search_on_an_unknown_metric_lists_the_logged_ones(call: Call) -> None:
    said = call(train.main, *SEARCH, "optimized_metric=val/los", "hydra.sweeper.n_trials=1", status=1)
    assert "optimized_metric 'val/los' is not logged; did you mean 'val/loss'?" in said
    said = call(train.main, *SEARCH, "optimized_metric=test/loss", "test=false", "hydra.sweeper.n_trials=1", status=1)
    assert "optimized_metric=test/loss is a test metric, but test=false skips the test. Use test=true." in said


def test_a_sweep_that_looks_for_nothing_needs_no_metric(call: Call) -> None:
    asked = ["-m", *QUICK, "hydra.sweep.dir=sweep"]
    assert "1 job, 1 done" in call(train.main, *asked, "optimized_metric=nope")
    # Nor does it make another run of it: you can fix a typo without training again.
    assert "1 job, 1 finished before" in call(train.main, *asked, "optimized_metric=val/loss")


@pytest.mark.parametrize(
    ("option", "package"),
    [
        ("hydra/launcher/joblib", "hydra-joblib-launcher"),
        ("hydra/launcher/submitit_slurm", "hydra-submitit-launcher"),
        ("hydra/sweeper/optuna", "hydra-optuna-sweeper"),
        ("hydra/sweeper/sampler/tpe", "hydra-optuna-sweeper"),
    ],
)
def test_without_the_extra_a_launcher_or_a_search_explains_what_to_install(option: str, package: str) -> None:
    said = errors.explain(MissingConfigException("…", missing_cfg_file=option, options=["basic"]))
    group, _, name = option.rpartition("/")
    assert said.startswith(f"{group}={name} needs {package}, which is not installed.")
    assert "pip install 'lightning-gradnorm[sweeps]'" in said
