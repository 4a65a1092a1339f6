"""Random numbers for strategies: the same on every rank and after a resume, without consuming the network's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def seeded_rng(seed: int, step: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's generators, those of ``device`` included, with ``seed`` and ``step``; restore them on exit.

    Example:
        >>> with seeded_rng(seed=1, step=7):
        ...     first = torch.rand(())
        >>> with seeded_rng(seed=1, step=7):
        ...     print(bool(torch.rand(()) == first))
        True
    """
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, device_type="cuda"):
        # Large odd factors decorrelate neighboring seeds and steps.
        mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**63
        torch.default_generator.manual_seed(mixed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(mixed)
        yield
