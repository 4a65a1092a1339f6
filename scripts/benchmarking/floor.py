"""The floor of a measured step: T gradients of the shared layer's weight on top of a plain step. And the noise of a machine."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import pairwise

import torch

from benchmarking.models import Model
from benchmarking.networks import NETWORKS
from benchmarking.plan import median_and_quartiles, quartiles
from benchmarking.running import Setting

REPETITIONS = 10
NOISE = 0.05
"""How far equal weights may be from equal weights before we call the machine too noisy."""


def weight_gradient_times(kind: str, setting: Setting) -> list[float]:
    """Return several measured times of one gradient of the shared layer's weight, in seconds.

    The trunk runs in between, as in a training step: otherwise everything would still be in the caches.
    """
    model = Model(kind, 2).to(setting.device)
    batch = setting.batch_of(kind)
    autocast = torch.autocast(setting.device, torch.bfloat16, enabled=setting.precision == "bf16")
    with autocast:
        z = model.encoder(batch)
    seed = torch.randn_like(z)
    times = []
    for _ in range(1 + min(REPETITIONS, NETWORKS[kind].steps)):
        with autocast, torch.no_grad():
            model.encoder(batch)
        setting.synchronize()
        began = setting.now()
        torch.autograd.grad(z, model.shared_weight, seed, retain_graph=True)
        setting.synchronize()
        times.append(setting.now() - began)
    return times[1:]


def floors(step: Sequence[float], equal: Sequence[float], tasks: int, weight_gradients: Sequence[float]) -> list[float]:
    """Return the overhead of each run over the run of equal weights before it, in units of T weight-gradients."""
    floor = tasks * statistics.median(weight_gradients)
    return [(ours - theirs) / floor for ours, theirs in zip(step, equal, strict=True)]


def equal_against_equal(times: Sequence[float]) -> list[float]:
    """Return the ratio of each run with equal weights to the one before it; 1 on a machine without noise."""
    return [later / sooner for sooner, later in pairwise(times)] or [1.0]


def noise_cell(times: Sequence[float]) -> str:
    """Return how much runs with equal weights differ, marked if it is too much."""
    found = equal_against_equal(times)
    return median_and_quartiles(found) + (" noisy" if is_noisy(times) else "")


def is_noisy(times: Sequence[float]) -> bool:
    """Return True if runs with equal weights differ too much from one another to compare anything with them."""
    low, high = quartiles(equal_against_equal(times))
    return low < 1 - NOISE or high > 1 + NOISE
