"""A plan: what the engine decides once about a model, before and in its first batch. Data that you can print and test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from lightning_gradnorm.engine.compiled import UncompiledDuringTraining
from lightning_gradnorm.engine.layers import find_module
from lightning_gradnorm.engine.measurement import AnyRule, Measurement, Setting
from lightning_gradnorm.engine.module_hooks import supports_hooks
from lightning_gradnorm.gradients import GradientReader


@dataclass(frozen=True)
class Plan:
    """How the task gradients of one model are read.

    Example:
        >>> import torch
        >>> W = {"encoder.weight": nn.Parameter(torch.zeros(2, 3))}
        >>> print(Plan(shared_layer=W, heads={"seg": "seg_head", "depth": "depth_head"}))
        W = encoder.weight (2 × 3), heads: seg → seg_head, depth → depth_head
    """

    shared_layer: Mapping[str, nn.Parameter]
    """``W`` by name; empty if no gradients of parameters are read."""
    heads: Mapping[str, str] | None = None
    """Task → head, if the gradients are read where the heads begin."""
    candidates: Sequence[GradientReader] = ()
    """The readers that may be used, in order of preference. The first batch leaves one."""

    @property
    def at_heads(self) -> bool:
        """True if gradients are read at the heads, False if by a first-order pass from each loss."""
        return bool(self.candidates) and self.heads is not None

    def __str__(self) -> str:
        named = [f"{name} ({' × '.join(map(str, p.shape))})" for name, p in self.shared_layer.items()]
        W = ", ".join(named if len(named) < 6 else [*named[:4], f"… ({len(named)} parameters)"])
        heads = ", ".join(f"{task} → {head}" for task, head in (self.heads or {}).items())
        parts = [f"W = {W}"] if W else []
        return ", ".join([*parts, f"heads: {heads or 'none'}"] if W or self.candidates else [])


def inspect_model(measurement: Measurement[AnyRule]) -> tuple[Plan, dict[str, nn.Module], UncompiledDuringTraining]:
    """Find the heads, the shared layer and the readers of a model; split it where compiled code would hide them.

    Returns:
        The plan; task → head module; and the object that undoes the splitting.

    Raises:
        ValueError: a name does not exist, or a module cannot be used.
    """
    setting = measurement.setting
    names = setting.heads if isinstance(setting.heads, Mapping) else None
    heads = _head_modules(setting, names or {})
    W = measurement.find_layer()
    uncompiled = UncompiledDuringTraining(setting.model, (names or {}).values(), W)
    try:
        candidates = measurement.candidates(W, uncompiled.modules)
    except BaseException:
        uncompiled.close()
        raise
    return Plan(W, names, candidates), heads, uncompiled


def _head_modules(setting: Setting, names: Mapping[str, str]) -> dict[str, nn.Module]:
    """Return task → head."""
    tasks: dict[nn.Module, str] = {}
    for task in setting.tasks if names else ():
        name = names[task]
        head = find_module(setting.model, name, caller=f"{setting.caller}: heads['{task}']")
        if head in tasks:
            raise ValueError(
                f"{setting.caller}: heads should name one module for each task; '{name}' is named by both '{tasks[head]}' and "
                f"'{task}'. Leave heads out: then each loss gets its own pass."
            )
        if not supports_hooks(head):
            raise ValueError(
                f"{setting.caller}: heads['{task}'] '{name}' was made by torch.jit.script, which allows no hooks. Leave heads "
                f"out: then each loss gets its own first-order pass."
            )
        tasks[head] = task
    return {task: head for head, task in tasks.items()}
