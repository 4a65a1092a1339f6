"""Shows you the results of a callback when only a copy of it was trained: by a library, or by Lightning in a child process.

A library may deep-copy the callbacks that you pass. Lightning's ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook`` train in
child processes, and call no hook of a callback in the process that called ``fit``. The results of rank 0 come back through the
queue in which Lightning's launcher sends the metrics and the path of the network's weights.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import tempfile
import uuid
import warnings
import weakref
from collections.abc import Iterable
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import lightning as L
import torch
from torch import Tensor


class MayBeCopied(Protocol):
    """A callback with `Copies`, which are copied with it. Its hooks on a model are not: see its `__getstate__`."""

    _copies: Copies

    def _results(self) -> dict[str, Any]:
        """Return the results of a training, loadable with ``torch.load(weights_only=True)``."""

    def _take_over(self, results: dict[str, Any]) -> None:
        """Show the results of a copy in another process."""


_alive: weakref.WeakValueDictionary[str, Copies] = weakref.WeakValueDictionary()
"""The `Copies` of all callbacks in this process, by name."""


class Copies:
    """Knows which copy of a callback, made by ``copy.deepcopy``, ``pickle`` or a fork, was trained in its place.

    A callback that was trained itself keeps its own state.
    """

    def __init__(self, callback: MayBeCopied) -> None:
        self.trained: Any = None
        """The copy, if one was trained in place of the callback."""
        self.is_in_use = False
        self._name_after((), callback)

    def _name_after(self, lineage: tuple[str, ...], callback: MayBeCopied) -> None:
        self._callback = weakref.ref(callback)
        self.lineage = (uuid.uuid4().hex, *lineage)  # draws no number from a seeded generator
        """The names of this one and of its originals, the nearest first. A fork keeps the names."""
        _alive[self.lineage[0]] = self

    def __getstate__(self) -> dict[str, Any]:
        return {"callback": self._callback(), "lineage": self.lineage, "is_in_use": self.is_in_use}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.trained, self.is_in_use = None, state["is_in_use"]
        self._name_after(state["lineage"], state["callback"])

    def announce_training(self, trainer: L.Trainer) -> None:
        """Make the originals show this callback's state: here from now on, in a parent process when the training ends."""
        self._tell_originals()
        launcher: Any = trainer.strategy.launcher
        if multiprocessing.parent_process() is not None and hasattr(launcher, "get_extra_results"):
            if getattr(launcher, "_start_method", None) != "fork":
                _unshare(vars(self._callback()).values())
            launcher.get_extra_results = partial(_collect, launcher)

    def _tell_originals(self) -> None:
        self.is_in_use, self.trained = True, None
        for name in self.lineage[1:]:
            original = _alive.get(name)
            if original is not None and not original.is_in_use:
                original.trained = self._callback()

    def write_letter(self) -> _Letter:
        """Return the callback's results to send to the parent process, or why there are none. The training is kept."""
        callback, parent = self._callback(), multiprocessing.parent_process()
        assert callback is not None
        assert parent is not None
        handle, file = tempfile.mkstemp(prefix="lightning_gradnorm_", suffix=".pt")
        os.close(handle)
        problem = ""
        try:
            torch.save(callback._results(), file)
        except Exception as reason:
            problem = f"{type(reason).__name__}: {reason}"
        return _Letter(parent.pid, type(callback).__name__, self.lineage, file, problem)

    def read_letter(self, file: str) -> None:
        """Show the results from a child process."""
        callback = self._callback()
        if callback is not None:
            callback._take_over(torch.load(file, map_location="cpu", weights_only=True))
            self._tell_originals()


class _Letter:
    """The results of a callback on their way to the process of its original, where unpickling takes them over.

    They wait in a file, like Lightning's network weights. The parent reads the queue after the children have ended, but if the
    queue were full the children would wait for the parent.
    """

    def __init__(self, to: int | None, sender: str, lineage: tuple[str, ...], file: str, problem: str) -> None:
        self.content = to, sender, lineage, file, problem

    def __reduce__(self) -> tuple[Any, ...]:
        return _deliver, self.content


def _deliver(to: int, sender: str, lineage: tuple[str, ...], file: str, problem: str) -> _Letter | None:
    """Take over the content of a letter if it is addressed to this process; else return the letter."""
    if os.getpid() != to:  # a process in between, such as a queue's manager
        return _Letter(to, sender, lineage, file, problem)
    original = next((one for name in lineage if (one := _alive.get(name)) is not None), None)
    try:
        if not problem and original is not None:
            original.read_letter(file)
    except Exception as reason:
        problem = f"{type(reason).__name__}: {reason}"
    finally:
        with suppress(FileNotFoundError):
            os.remove(file)
    if problem:
        warnings.warn(
            f"{sender}: the network is trained, but the state of {sender} could not be read back from the child process "
            f"({problem}). Read it from a checkpoint: this object is as it was before the training.",
            stacklevel=2,
        )
    return None


def _collect(launcher: Any, trainer: L.Trainer) -> dict[str, Any]:
    """Return what the launcher sends to the parent process, with our callbacks' results. Called once, on rank 0."""
    del launcher.get_extra_results  # uncovers the class's method
    extra = launcher.get_extra_results(trainer)
    known = [getattr(one, "_copies", None) for one in trainer.callbacks]  # type: ignore[attr-defined]
    letters = [one.write_letter() for one in known if isinstance(one, Copies) and one.is_in_use]
    return {**extra, "lightning_gradnorm": letters}


def _unshare(values: Iterable[object]) -> None:
    """Give this process tensors of its own: tensors pickled to a spawned process lie in memory that all processes write to.

    Lightning does the same for the network. A pickler visits everything that came by pickle, and nothing else.
    """

    class Finder(pickle.Pickler):
        def persistent_id(self, value: object) -> bool | None:
            if not isinstance(value, Tensor):
                return None
            if value.is_shared():  # type: ignore[no-untyped-call]
                value.data = value.data.clone()
            return True

    for value in values:
        with suppress(Exception):
            Finder(io.BytesIO()).dump(value)
