"""Open files that processes do not share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Generic, TypeVar
from weakref import WeakSet

Handle = TypeVar("Handle")


class PerProcess(Generic[Handle]):
    """A handle opened on first use in each process, because a loader's workers must not share an HDF5 handle.

    It is closed before the process forks, because the HDF5 library would give the child the parent's file. Both processes
    reopen it when needed. Pickling omits it.

    Args:
        open_: Opens the handle. Must be picklable if workers are started with ``spawn``: a bound method or a ``partial``.

    Example:
        >>> opened = PerProcess(list)
        >>> opened() is opened()
        True
    """

    def __init__(self, open_: Callable[[], Handle]) -> None:
        self._open = open_
        self._handle: Handle | None = None
        _open_handles.add(self)

    def __call__(self) -> Handle:
        """Return the handle of this process."""
        if self._handle is None:
            self._handle = self._open()
        return self._handle

    def close(self) -> None:
        """Close the handle. It is reopened when needed."""
        handle, self._handle = self._handle, None
        if handle is not None and hasattr(handle, "close"):
            handle.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": self._open}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_open"])  # type: ignore[misc]


_open_handles: WeakSet[PerProcess[Any]] = WeakSet()


def _close_all() -> None:
    for opened in list(_open_handles):
        opened.close()


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(before=_close_all)
