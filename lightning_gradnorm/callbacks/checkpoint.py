"""What a balancing callback remembers: taken over from a checkpoint, or begun anew with a new training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from typing_extensions import override


class Rule(Protocol):
    """What a strategy knows from step to step."""

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, in the order of the weights."""

    @property
    def weights(self) -> Tensor:
        """The weights that were last in force, shape (T,)."""

    def state_dict(self) -> dict[str, Any]:
        """Return all state as plain tensors and numbers."""


AnyRule = TypeVar("AnyRule", bound=Rule)


class Restoring(L.Callback, Generic[AnyRule]):
    """Keeps a rule, of which a training that begins at step 0 without a checkpoint begins with a new one.

    Lightning restores callbacks before or after ``on_fit_start``, and for validation too: what it brings is laid aside, and
    used when training starts.
    """

    _remembers: str | None = None
    """What is lost where a checkpoint does not have it, in words; ``None`` if there is nothing to lose."""

    def __init__(self) -> None:
        self._names: tuple[str, ...] = ()
        self._rule: AnyRule | None = None
        self._restored: dict[str, Any] | None = None
        self._restored_by: str | None = None
        self._stage: str | None = None

    # ---- what a strategy answers -------------------------------------------------------------------------------------

    def _new_rule(self, like: Tensor) -> AnyRule:
        """Return a rule without a past, of the dtype and on the device of ``like``."""
        raise NotImplementedError

    def _load(self, rule: AnyRule, state: Mapping[str, Any]) -> None:
        """Have the rule take over what another one knew."""
        raise NotImplementedError

    def _begin_anew(self) -> None:
        """Forget what belonged to an earlier training."""

    # ------------------------------------------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return type(self).__name__

    @property
    def _known(self) -> AnyRule:
        assert self._rule is not None
        return self._rule

    def _begin(self, trainer: L.Trainer) -> None:
        """Decide, at the start of training, with what it begins."""
        if self._restored_by in ("validate", "test", "predict"):
            self._restored = None  # a checkpoint that was looked at is not one to go on from
        if self._restored is None and (trainer.global_step == 0 or trainer.ckpt_path is not None):
            self._rule = None
            self._begin_anew()
            if trainer.global_step > 0 and self._remembers:
                rank_zero_warn(
                    f"{self._name}: the checkpoint {trainer.ckpt_path} has no state of {self._name}; {self._remembers} "
                    f"start anew. Resume from a checkpoint of a run that had {self._name} among its callbacks to go on with it."
                )

    def _prepare(self, like: Tensor) -> None:
        """Make the rule where ``like`` is, in its precision; called at the start, and when a loss is float64."""
        if self._rule is not None and set(self._rule.tasks) != set(self._names):
            self._rule = None  # the same Trainer goes on with another model
            self._begin_anew()
        if self._rule is not None and self._restored is None and self._rule.tasks == self._names:
            now = self._rule.weights
            if now.device == like.device and (now.dtype == torch.float64 or like.dtype != torch.float64):
                return
        state = self._restored or (None if self._rule is None else self._rule.state_dict())
        rule = self._new_rule(like if like.dtype == torch.float64 else like.float())
        if state is not None:
            self._load(rule, state)
        self._rule, self._restored = rule, None

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stage = stage

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stage = None

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._rule is not None and self._restored is None:
            return self._rule.state_dict()
        return self._restored or {}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored, self._restored_by = dict(state_dict) or None, self._stage
