"""Looks for tensors that wait for the garbage collector."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


@contextmanager
def only_what_comes_from_here() -> Iterator[None]:
    """The collector passes over all objects that are there already: a million, most of them of the packages imported."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Garbage:
    """What exists, and what the collector finds, after some steps in which it did not run."""

    def __init__(self) -> None:
        self.of_graphs: list[torch.Size] = []
        """The tensors that are alive and have a graph behind them."""
        self.tensors: list[torch.Size] = []
        """Those that nobody can reach any more, and that only the collector frees."""
        self._before: set[int] = set()

    def begin(self) -> None:
        """Collect, and switch the collector off. A tensor that is there already may go at any time."""
        gc.collect()
        gc.disable()
        self._before = {id(one) for one in self._tensors_among(gc.get_objects())}

    def end(self) -> None:
        """Look, and collect."""
        try:
            alive = [one for one in self._tensors_among(gc.get_objects()) if id(one) not in self._before]
            self.of_graphs = [one.shape for one in alive if one.grad_fn is not None]
            del alive
            gc.set_debug(gc.DEBUG_SAVEALL)
            gc.collect()
            self.tensors = [one.shape for one in self._tensors_among(gc.garbage) if id(one) not in self._before]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

    @staticmethod
    def _tensors_among(objects: list[object]) -> list[Tensor]:
        return [one for one in objects if issubclass(type(one), Tensor)]
