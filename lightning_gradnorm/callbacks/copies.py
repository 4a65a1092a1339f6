"""What a user reads from a callback of which only a copy has been trained: by a library, or by Lightning in a child process.

A library may deep-copy the callbacks that it is given. Lightning's ``ddp_spawn``, ``ddp_fork`` and ``ddp_notebook`` train in
child processes, and call no hook of a callback in the process that called ``fit``. What rank 0 has there comes back through the
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
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import lightning as L
import torch
from torch import Tensor
from typing_extensions import Self

_alive: WeakValueDictionary[str, MayBeCopied] = WeakValueDictionary()
"""All callbacks of this process, by name."""


class MayBeCopied:
    """Base of callbacks that show the state of the copy that was trained in their place.

    A callback shows its own state once it has been trained itself. Copies are made by ``copy``, ``pickle`` or a fork.
    """

    _lineage: tuple[str, ...] = ()
    """This object's name and the names of those it is a copy of, the nearest first. A fork leaves names as they are."""
    _has_trained = False
    _trained_copy: Self | None = None

    def __init__(self) -> None:
        self._lineage = self._named_after(())

    def _named_after(self, lineage: tuple[str, ...]) -> tuple[str, ...]:
        name = uuid.uuid4().hex  # which draws no number from a generator that is seeded
        _alive[name] = self
        return (name, *lineage)

    def _uncopied(self) -> dict[str, Any]:
        """Return attributes that are this object's alone, such as what it has placed on a model, as a copy has them instead."""
        return {}

    def _results(self) -> dict[str, Any]:
        """Return what there is to read after a training, loadable with ``torch.load(weights_only=True)``."""
        raise NotImplementedError

    def _take_over(self, results: dict[str, Any]) -> None:
        """Show the results of a copy that is in another process."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), **self._uncopied(), "_trained_copy": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lineage = self._named_after(state.get("_lineage", ()))

    @property
    def _trained(self) -> Self:
        """The copy that was trained in place of this callback, if one was; or this callback."""
        return self if self._trained_copy is None else self._trained_copy

    def _announce_training(self, trainer: L.Trainer) -> None:
        """Have those that this is a copy of show its state: here from now on, in a parent process when the training ends."""
        self._tell_originals()
        launcher: Any = trainer.strategy.launcher
        if multiprocessing.parent_process() is not None and hasattr(launcher, "get_extra_results"):
            if getattr(launcher, "_start_method", None) != "fork":
                _unshare(vars(self).values())
            launcher.get_extra_results = partial(_collect, launcher)

    def _tell_originals(self) -> None:
        self._has_trained, self._trained_copy = True, None
        for name in self._lineage[1:]:
            original = _alive.get(name)
            if original is not None and not original._has_trained:
                original._trained_copy = self


def _unshare(values: Iterable[object]) -> None:
    """Give this process tensors of its own: those that come by pickle to a spawned process lie in memory that all write to.

    Lightning does so for the network. A pickler finds all that came by pickle, and stops at what did not.
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


def _collect(launcher: Any, trainer: L.Trainer) -> dict[str, Any]:
    """Return what the launcher sends to the parent process, with the results of our callbacks. Called once, on rank 0."""
    del launcher.get_extra_results  # its class's is called, and stays
    callbacks: Sequence[Any] = trainer.callbacks  # type: ignore[attr-defined]
    letters = [_Letter.of(one) for one in callbacks if isinstance(one, MayBeCopied) and one._has_trained]
    return {**launcher.get_extra_results(trainer), "lightning_gradnorm": letters}


class _Letter:
    """The results of a callback, on their way to the process that has its original: unpickled there, they are taken over.

    They wait in a file, as Lightning's network does. The parent reads the queue after the children have ended, and these would
    wait for it if the queue were full.
    """

    def __init__(self, to: int, sender: str, lineage: tuple[str, ...], file: str = "", problem: str = "") -> None:
        self.content = to, sender, lineage, file, problem

    @classmethod
    def of(cls, callback: MayBeCopied) -> _Letter:
        """Write the results to a file. If that fails, the training is not to be lost: the letter says why."""
        parent = multiprocessing.parent_process()
        assert parent is not None
        assert parent.pid is not None
        handle, file = tempfile.mkstemp(prefix="lightning_gradnorm_", suffix=".pt")
        os.close(handle)
        problem = ""
        try:
            torch.save(callback._results(), file)
        except Exception as reason:
            problem = f"{type(reason).__name__}: {reason}"
        return cls(parent.pid, type(callback).__name__, callback._lineage, file, problem)

    def __reduce__(self) -> tuple[Any, ...]:
        return _deliver, self.content


def _deliver(to: int, sender: str, lineage: tuple[str, ...], file: str, problem: str) -> _Letter | None:
    """Take over what is in a letter, if this is the process that it is addressed to; else return it."""
    if os.getpid() != to:  # one between, such as that of a queue's manager
        return _Letter(to, sender, lineage, file, problem)
    original = next((one for name in lineage if (one := _alive.get(name)) is not None), None)
    try:
        if not problem and original is not None:
            original._take_over(torch.load(file, map_location="cpu", weights_only=True))
            original._tell_originals()
    except Exception as reason:
        problem = f"{type(reason).__name__}: {reason}"
    finally:
        with suppress(FileNotFoundError):
            os.remove(file)
    if problem:
        warnings.warn(
            f"{sender}: the network is trained, but what {sender} has learnt in the child process could not be taken over "
            f"({problem}). Read it from a checkpoint: this object is as it was before the training.",
            stacklevel=2,
        )
    return None
