"""A run that is killed at any moment and resumed ends like an uninterrupted run: every tensor is bit-identical."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import assert_same, content
from machines import MODULE

from lightning_gradnorm.experiments.callbacks.save_last import SaveLast
from lightning_gradnorm.experiments.cli import train

OPTIONS = [
    "data.train_size=440",
    "data.batch_size=40",
    "data.val_size=40",
    "trainer.enable_progress_bar=false",
    "trainer.enable_model_summary=false",
    "trainer.log_every_n_steps=1",
    "logger=csv",
    "test=false",
    "callbacks.last.every_n_train_steps=3",
]
LAST = "checkpoints/last.ckpt"
ENDLESS = "trainer.max_epochs=100000"  # leaves enough time to kill it; the length is set afterwards


def kill_after(process: subprocess.Popen[str], run: Path, steps: int) -> int:
    """Kill the run once its checkpoint has at least that many steps; return its number of steps."""
    deadline = time.monotonic() + 300
    seen = -1
    while seen < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        if not (run / LAST).exists():
            time.sleep(0.02)
            continue
        # Read again and again while it is being replaced: a checkpoint that is not whole would show here, too.
        seen = content(run / LAST)["global_step"]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    return int(content(run / LAST)["global_step"])


def assert_ends_as_if_left_alone(call: Any, folder: Path, options: list[str]) -> None:
    """Resume ``parts`` a last time, for an epoch and a bit, and run as long without a stop."""
    epochs = f"trainer.max_epochs={content(folder / 'parts' / LAST)['epoch'] + 2}"
    call(train.main, f"ckpt_path=parts/{LAST}", epochs)
    call(train.main, *options, epochs, "hydra.run.dir=whole")
    for checkpoint in ("last.ckpt", "best.ckpt"):
        assert_same(folder / "parts/checkpoints" / checkpoint, folder / "whole/checkpoints" / checkpoint)
    left = {file.name for file in (folder / "parts/checkpoints").iterdir()}
    assert left == {"last.ckpt", "best.ckpt"}, "a kill leaves nothing that stays"


@pytest.mark.parametrize(
    ("kills", "more"),
    [
        (1, []),
        pytest.param(5, [], marks=pytest.mark.slow),
        # The gradients of a window that is not complete are in no checkpoint: there must be none within it.
        pytest.param(
            3, ["model.accumulate_grad_batches=4", "callbacks.last.every_n_train_steps=1"], marks=pytest.mark.slow
        ),
    ],
    ids=["once", "five times", "accumulation"],
)
def test_a_run_killed_at_random_steps_ends_bit_identical(
    start: Any, call: Any, tmp_path: Path, kills: int, more: list[str]
) -> None:
    draw, options = random.Random(kills), [*OPTIONS, *more]
    arguments, reached = [*options, "hydra.run.dir=parts"], 0
    for _ in range(kills):
        process = start(*MODULE, *arguments, ENDLESS)
        now = kill_after(process, tmp_path / "parts", reached + draw.randint(1, 25))
        arguments, reached = [f"ckpt_path=parts/{LAST}"], now
    assert_ends_as_if_left_alone(call, tmp_path, options)


# ---- killed while a checkpoint is being written ----------------------------------------------------------------------

DIES_WHILE_SAVING = """
import os, resource, signal, sys
import lightning as L
from lightning_gradnorm.experiments.cli import train

moment, left, armed = sys.argv.pop(1), int(sys.argv.pop(1)), False
save = L.Trainer.save_checkpoint

def the_kernel_kills_whoever_writes_more():
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

def counted(trainer, path, *arguments, **options):
    global left, armed
    if str(path).endswith("last.ckpt"):
        left -= 1
        armed = left == 0
        if armed and moment == "half-written":
            the_kernel_kills_whoever_writes_more()
    save(trainer, path, *arguments, **options)

def is_one_file_system(source, target):
    return os.stat(source).st_dev == os.stat(os.path.dirname(target)).st_dev

def watch(event, arguments):
    if not armed or moment != "given its name":
        return
    if event == "open" and str(arguments[0]).endswith("last.ckpt") and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        the_kernel_kills_whoever_writes_more()
    if event == "os.rename" and str(arguments[1]).endswith("last.ckpt") and is_one_file_system(*arguments[:2]):
        os.kill(os.getpid(), signal.SIGKILL)

L.Trainer.save_checkpoint = counted
sys.addaudithook(watch)
train.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits and audited names are Linux's here")
@pytest.mark.parametrize("moment", ["half-written", "given its name"])
@pytest.mark.parametrize("temporary", [None, "/dev/shm"])
@pytest.mark.slow
def test_a_run_killed_while_it_saves_resumes_from_the_previous_checkpoint(
    start: Any, call: Any, tmp_path: Path, moment: str, temporary: str | None
) -> None:
    """Temporary files may be on another file system, from which renaming is impossible."""
    if temporary is not None and not os.access(temporary, os.W_OK):
        pytest.skip(f"there is no {temporary}")
    elsewhere = {} if temporary is None else {"TMPDIR": temporary}
    process = start("-c", DIES_WHILE_SAVING, moment, "6", *OPTIONS, ENDLESS, "hydra.run.dir=parts", **elsewhere)
    process.communicate(timeout=300)
    assert process.returncode in (-signal.SIGXFSZ, -signal.SIGKILL)
    # 3, 6, 9 and the end of the epoch, 11; 12, and 15 was not to be
    assert content(tmp_path / "parts" / LAST)["global_step"] == 12
    assert_ends_as_if_left_alone(call, tmp_path, OPTIONS)


def test_how_often_should_be_a_number() -> None:
    with pytest.raises(ValueError, match="every_n_train_steps should be at least 1 or null; got 0"):
        SaveLast("checkpoints", every_n_train_steps=0)
