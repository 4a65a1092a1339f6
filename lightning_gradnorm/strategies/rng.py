"""Random numbers of a strategy's own: the same on every rank and after a resume, and none of the network's used up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_randomness(seed: int, step: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's generators by ``seed`` and ``step`` for the time being.

    Args:
        seed: of the whole training.
        step: how many times the strategy has drawn before.
        device: where random numbers may be drawn besides the CPU.

    Example:
        >>> with own_randomness(seed=1, step=7):
        ...     first = torch.rand(())
        >>> with own_randomness(seed=1, step=7):
        ...     print(bool(torch.rand(()) == first))
        True
    """
    device = torch.device(device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices, device_type="cuda"):
        # Large odd factors, so that neighbouring seeds and steps have nothing to do with each other.
        mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xD1B54A32D192ED03) % 2**63
        torch.default_generator.manual_seed(mixed)
        if devices:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(mixed)
        yield
