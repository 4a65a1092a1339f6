"""Two machines, each with its own torchrun: they train as one process does, write one folder, and can be killed.

The machines are sessions on this one, with clocks in different time zones; they connect through the loopback interface.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from checkpoints import assert_same, content, farthest
from machines import MODULE, environment, free_port, started, train_on_two, two_machines, wait_until

from lightning_gradnorm.experiments.cli import evaluate, launch, train
from lightning_gradnorm.experiments.report import read_run

TOY = ["data.sigmas=[1, 5, 9]", "data.train_size=480", "data.val_size=100", "data.test_size=100"]
DIGITS = ["data=multimnist", "data.train_size=256", "data.val_size=64", "data.test_size=64"]
QUIET = ["trainer.enable_progress_bar=false", "trainer.enable_model_summary=false", "logger=csv"]
LAST = "checkpoints/last.ckpt"


def of_size(one_process: int) -> tuple[str, str]:
    """The batch size of one process, and that of each of two for the same batch."""
    return f"data.batch_size={one_process}", f"data.batch_size={one_process // 2}"


# ---- as one process --------------------------------------------------------------------------------------------------


@pytest.mark.slow  # what holds it every day is in test_two_processes
@pytest.mark.parametrize(
    ("options", "precision", "tolerance"),
    [
        (TOY, "64-true", 1e-9),
        (DIGITS, "64-true", 1e-9),
        (TOY, "32-true", 1e-5),
    ],
    ids=["toy float64", "digits float64", "toy float32"],
)
def test_two_machines_train_and_test_as_one_process_does(
    call: Callable[..., str], tmp_path: Path, options: list[str], precision: str, tolerance: float
) -> None:
    """Weights, network and test metrics; both write into a folder that is named after one machine's clock."""
    options = [*options, *QUIET, f"trainer.precision={precision}", "trainer.max_epochs=2"]
    whole, half = of_size(32)
    first, second = train_on_two(tmp_path, *options, half, "trainer=torchrun")
    (run,) = tmp_path.glob("outputs/*/gradnorm/*")
    assert first.count("Test metrics by task") == 1
    assert "run folder" not in second
    call(train.main, *options, whole, "hydra.run.dir=one")
    weights, network = farthest(run / LAST, tmp_path / "one" / LAST)
    print(f"{precision}: weights {weights:.1e}, network {network:.1e}")  # shown by pytest -s
    assert weights <= tolerance
    assert network <= tolerance
    assert {path.name for path in run.iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    assert read_run(run).metrics == pytest.approx(read_run(tmp_path / "one").metrics, rel=1e-4)


# ---- one folder ------------------------------------------------------------------------------------------------------

WATCHED = """
import os, sys
from lightning_gradnorm.experiments.cli import train

written = open(f"written_{os.environ['RANK']}.txt", "w")

def watch(event, arguments):
    is_written = event in ("os.rename", "os.remove") or event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    if is_written and "outputs" in str(arguments[0]):
        print(event, arguments[0], file=written, flush=True)

sys.addaudithook(watch)
train.main()
"""


@pytest.mark.slow
def test_only_the_first_machine_writes_and_one_machine_evaluates(call: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "watched.py").write_text(WATCHED)
    options = [*TOY, *QUIET[:-1], "trainer=torchrun", "trainer.max_epochs=1"]
    train_on_two(tmp_path, *options, program=["watched.py"])
    first, second = ((tmp_path / f"written_{rank}.txt").read_text() for rank in (0, 1))
    assert "last.ckpt" in first
    assert "test_metrics.json" in first
    assert ".hydra" in first
    assert second == ""
    (run,) = tmp_path.glob("outputs/toy/gradnorm/*")
    found: list[dict[str, float]] = []
    with pytest.MonkeyPatch.context() as patch:
        test = evaluate.evaluate
        patch.setattr(evaluate, "evaluate", lambda config: found.append(test(config)))
        call(evaluate.main, f"ckpt_path={run}/checkpoints/best.ckpt")  # would wait for the other machine forever
    assert found[0] == pytest.approx(read_run(run).metrics, rel=1e-5)


@pytest.mark.slow
def test_machines_that_would_write_into_two_folders_say_so(tmp_path: Path) -> None:
    options = [*TOY, *QUIET, "trainer=torchrun", "trainer.max_epochs=1"]
    with two_machines(tmp_path, *options, "hydra.run.dir=here", of_second=["hydra.run.dir=there"]) as machines:
        for machine in machines:
            assert machine.wait(timeout=120) == 1
            assert "hydra.run.dir should be the same in all processes" in machine.said()
            assert f"{tmp_path}/here in the first process, {tmp_path}/there in process 1" in machine.said()


def test_processes_with_different_clocks_agree_when_they_began(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchruns = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in {**torchruns, "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    found = {}
    for attempt in ("0", "1"):  # after a restart there is another time
        for rank, now in (("0", f"8:0{attempt}"), ("1", "9:30")):
            monkeypatch.setenv("RANK", rank)
            monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", attempt)
            monkeypatch.setattr(launch.time, "strftime", lambda form, now=now: now)
            found[attempt, rank] = launch.began()
            assert launch.rank() == int(rank)
    assert found == {("0", "0"): "8:00", ("0", "1"): "8:00", ("1", "0"): "8:01", ("1", "1"): "8:01"}


@pytest.mark.parametrize(
    ("given", "name", "rank"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "2", "SLURM_PROCID": "3"}, "job_77_2", 3),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "bash", "SLURM_PROCID": "0"}, "8:00", 0),
        ({"SLURM_NTASKS": "1", "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_PROCID": "0"}, "8:00", 0),
        ({}, "8:00", 0),
    ],
    ids=["a job", "a shell in a job", "a job of one process", "none"],
)
def test_a_job_of_several_processes_is_called_by_its_number(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], name: str, rank: int
) -> None:
    for key in os.environ:
        if key.startswith("SLURM_"):
            monkeypatch.delenv(key)
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(launch.time, "strftime", lambda form: "8:00")
    assert launch.began() == name
    assert launch.rank() == rank
    assert launch.overrides() == (["hydra.output_subdir=null"] if rank else [])


@pytest.mark.parametrize(("trainer", "launcher"), [("torchrun", "torchrun --nproc-per-node 2"), ("slurm", "srun")])
def test_a_command_that_its_launcher_has_not_started_is_refused(
    call: Callable[..., str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trainer: str, launcher: str
) -> None:
    for key in os.environ:
        if key.startswith(("SLURM_", "TORCHELASTIC_")):
            monkeypatch.delenv(key)
    said = call(train.main, *TOY, *QUIET, f"trainer={trainer}", status=1)
    assert f"trainer={trainer} is for processes started by {launcher.split()[0]}" in said
    assert f"`{launcher}" in said
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_processes_with_the_variables_of_srun_train_in_one_folder_and_resume_there(tmp_path: Path) -> None:
    """SLURM itself is not there: these are the variables that it sets."""
    options = [*TOY, *QUIET, "trainer=slurm", "data.batch_size=16"]
    run_as_job(tmp_path, *options, "trainer.max_epochs=1")
    (run,) = (tmp_path / "outputs/toy/gradnorm").iterdir()
    assert run.name == "job_77_0"
    assert (run / "test_metrics.json").is_file()
    assert content(run / LAST)["global_step"] == 15
    # as a job that was put back into the queue does
    run_as_job(tmp_path, *options, "trainer.max_epochs=2", f"hydra.run.dir={run}", f"ckpt_path={run / LAST}")
    assert content(run / LAST)["global_step"] == 30


def run_as_job(folder: Path, *options: str) -> None:
    """Train in two processes that have what srun gives them."""
    job = {
        "SLURM_JOB_ID": "77",
        "SLURM_JOB_NAME": "toy",
        "SLURM_STEP_ID": "0",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "2",
    }
    job |= {"SLURM_NTASKS_PER_NODE": "1", "SLURM_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0"}
    job |= {"MASTER_PORT": str(free_port())}
    commands = {node: [sys.executable, *MODULE, *options] for node in ("0", "1")}
    own = {node: environment(**job, SLURM_PROCID=node, SLURM_NODEID=node) for node in commands}
    with started(folder, commands, own) as machines:
        for machine in machines:
            assert machine.wait(timeout=200) == 0, machine.said()
        assert "MEMBER: 2/2" in machines[1].said()


# ---- a machine is killed ---------------------------------------------------------------------------------------------

ENDLESS = "trainer.max_epochs=100000"
OFTEN = ["callbacks.last.every_n_train_steps=3", "test=false"]


@pytest.mark.slow
@pytest.mark.parametrize(("data", "killed"), [(TOY, 0), (DIGITS, 1)], ids=["the first", "the second"])
def test_the_other_machine_ends_and_the_run_resumes_as_if_uninterrupted(
    tmp_path: Path, data: list[str], killed: int
) -> None:
    """The checkpoints of the resumed and of an uninterrupted run are the same: every tensor is bit-identical."""
    options = [*data, *QUIET, *OFTEN, "data.batch_size=16", "trainer=torchrun"]
    last = tmp_path / "parts" / LAST
    with two_machines(tmp_path, *options, ENDLESS, "hydra.run.dir=parts") as machines:
        wait_until(lambda: last.exists() and content(last)["global_step"] > 20, machines)
        machines[killed].kill()
        began = time.monotonic()
        left = machines[1 - killed]
        assert left.wait(timeout=60) not in (0, None), left.said()
        print(f"the other ended after {time.monotonic() - began:.1f} s")
    saved = content(last)
    assert saved["global_step"] > 20
    epochs = f"trainer.max_epochs={saved['epoch'] + 2}"
    train_on_two(tmp_path, f"ckpt_path=parts/{LAST}", epochs)
    train_on_two(tmp_path, *options, epochs, "hydra.run.dir=whole")
    for checkpoint in ("last.ckpt", "best.ckpt"):
        assert_same(tmp_path / "parts/checkpoints" / checkpoint, tmp_path / "whole/checkpoints" / checkpoint)
