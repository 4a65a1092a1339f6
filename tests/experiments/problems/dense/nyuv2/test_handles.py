"""Processes do not share open file handles."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

from lightning_gradnorm.experiments.problems.dense.nyuv2.per_process import PerProcess


class File:
    """Knows which process opened it, and whether it has been closed."""

    def __init__(self) -> None:
        self.pid, self.closed = os.getpid(), False

    def close(self) -> None:
        self.closed = True


def _tell(opened: PerProcess[File], first: File, answers: Any) -> None:
    answers.put((os.getpid(), opened().pid, opened().closed, first.closed))


def test_a_file_is_closed_before_a_fork_and_opened_again_on_both_sides() -> None:
    opened = PerProcess(File)
    first = opened()
    assert opened() is first
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    process = context.Process(target=_tell, args=(opened, first, answers))
    process.start()
    child, opened_by, closed, first_closed = answers.get()
    process.join()
    assert opened_by == child != os.getpid()
    assert (closed, first_closed, first.closed) == (False, True, True)
    assert opened() is not first
    assert (opened().pid, opened().closed) == (os.getpid(), False)
