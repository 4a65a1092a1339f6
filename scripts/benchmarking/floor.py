"""The floor of a measured step: T gradients of the shared layer's weight on top of a plain step."""

from __future__ import annotations

import torch

from benchmarking.models import Model
from benchmarking.networks import NETWORKS
from benchmarking.running import Setting

REPETITIONS = 10


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
