"""Provides each rule with what it needs in each optimizer step: nothing, the losses, or norms of the task gradients."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, Literal, TypeVar

from torch import Tensor, nn

from lightning_gradnorm.engine.compiled import hides_its_graph
from lightning_gradnorm.engine.layers import ALL, encoder_layer, find_module, find_shared_layers
from lightning_gradnorm.engine.loop import Loop
from lightning_gradnorm.engine.ranks import all_reduce_losses, reduce_step
from lightning_gradnorm.engine.reader_choice import weight_readers
from lightning_gradnorm.engine.rule import LossRule, NormRule, Rule
from lightning_gradnorm.engine.step_state import BatchState, OptimizerStepState
from lightning_gradnorm.gradients import ActivationGradients, GradientReader, RowReader, WeightGradients

AnyRule = TypeVar("AnyRule", bound=Rule)
Heads = Mapping[str, str] | Literal["auto"] | None
"""Task → dotted name of its head; ``"auto"``: found in the first batch; ``None``: gradients are not read at heads."""


@dataclass
class Setting:
    """The surroundings of a rule."""

    caller: str
    """Begins each message."""
    model: nn.Module
    loop: Loop
    tasks: tuple[str, ...]
    shared_layer: str | Sequence[str] | None = None
    heads: Heads = None
    representation: str = "encoder"
    norm_of: Literal["weight", "activation"] = "weight"
    options: Mapping[str, Any] = field(default_factory=dict)
    """Further options of the training loop: ``timeout`` of collectives."""

    def __post_init__(self) -> None:
        if self.shared_layer == ALL and self.heads == "auto":
            self.heads = None  # norms are taken of the heads, too, so the gradients are read at the losses


class Measurement(Generic[AnyRule]):
    """Provides one rule with its inputs. This base measures nothing: the weights are fixed.

    Args:
        rule: the rule.
        setting: the model and the loop it works on.
    """

    replaces_gradients: ClassVar[bool] = False
    """Whether the task gradients are replaced, so that they are read in every backward pass."""

    def __init__(self, rule: AnyRule, setting: Setting) -> None:
        self.rule = rule
        self.setting = setting
        self.reader: GradientReader | None = None
        """The reader chosen in the first batch."""

    def find_layer(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters ``W`` by name; empty if no gradients of parameters are read.

        Raises:
            ValueError: the layer that you name does not exist. It is not used, but a typo is an error for every rule.
        """
        if self.setting.shared_layer is not None:
            find_shared_layers(self.setting.model, self.setting.shared_layer, caller=self.setting.caller)
        return {}

    def candidates(self, W: Mapping[str, nn.Parameter], uncompiled: Collection[nn.Module]) -> list[GradientReader]:
        """Return the readers that may be used, in order of preference; empty if no gradient is read."""
        return []

    @property
    def searches_layer(self) -> bool:
        """Whether to find the shared layer in the graph of the first batch."""
        return False

    @property
    def should_measure(self) -> bool:
        """Whether to read the task gradients of the next optimizer step."""
        return self.reader is not None

    def find_targets(self, batch: BatchState) -> None:
        """Called before each backward pass, on all ranks, before we decide where to read gradients."""

    def before_backward(self, loss: Tensor, batch: BatchState, step: OptimizerStepState) -> None:
        """Called before each backward pass."""

    def after_backward(self, step: OptimizerStepState, *, has_moved: bool) -> None:
        """Called after each backward pass; the parameters may have moved within it."""

    def after_step(self, step: OptimizerStepState) -> bool:
        """Called once per optimizer step. Update the rule; return True if any task contributed to the step."""
        return bool(step.losses)

    def discard_step(self) -> None:
        """Called when the loss scaler skips the network's step."""
        self.rule.discard_step()

    def update_after_step(self, losses: Mapping[str, Sequence[Any]]) -> None:
        """Called with the losses of the same batch after the network's step, for a rule that needs them."""

    def warn(self) -> None:
        """Warn about problems that the rule has found. May wait for the device."""

    def end_epoch(self) -> None:
        """Called at the end of each epoch."""

    def close(self) -> None:
        """Release what was acquired."""


class NormMeasurement(Measurement[NormRule]):
    """Feeds a rule with the norms of the task gradients at the shared layer, or at the representation."""

    def __init__(self, rule: NormRule, setting: Setting) -> None:
        super().__init__(rule, setting)
        self._warned: set[str] = set()

    @property
    def searches_layer(self) -> bool:
        """Whether to find the shared layer in the graph of the first batch."""
        return self.setting.norm_of == "weight" and self.setting.shared_layer is None

    def find_layer(self) -> Mapping[str, nn.Parameter]:
        """Return the parameters ``W`` by name. If they are to be found in the graph, return a fallback for a hidden graph.

        Raises:
            ValueError: the layer does not exist, or is inside a head.
        """
        setting = self.setting
        if setting.norm_of == "activation":
            return {}
        if setting.shared_layer is None:
            W = encoder_layer(setting.model)
            if not W and hides_its_graph(setting.model):
                raise ValueError(
                    f"{setting.caller}: shared_layer=None cannot look into {type(setting.model).__name__}, because parts of it "
                    f"are compiled or sharded. Name the last layer that all tasks share: shared_layer='encoder.layer4'."
                )
            return W
        W = find_shared_layers(setting.model, setting.shared_layer, caller=setting.caller)
        for task, head in setting.heads.items() if isinstance(setting.heads, Mapping) else ():
            inside = [name for name in W if name.startswith(f"{head}.")]
            if inside:
                raise ValueError(
                    f"{setting.caller}: the shared layer '{inside[0]}' is in '{head}', which is the head of task '{task}'. "
                    f"Name the last layer that all tasks share, and as heads the modules that read its output. If no module "
                    f"does, leave heads out."
                )
        return W

    def candidates(self, W: Mapping[str, nn.Parameter], uncompiled: Collection[nn.Module]) -> list[GradientReader]:
        """Return readers of ``∇_W L_i``, or of ``∇_z L_i`` for ``norm_of="activation"``."""
        setting = self.setting
        if setting.norm_of == "activation" or setting.representation != "encoder":
            caller = f"{setting.caller}: representation"
            encoder = find_module(setting.model, setting.representation, caller=caller)
        readers: list[RowReader] = weight_readers(setting.model, W, uncompiled) if W else []
        if setting.norm_of == "activation":
            readers = [ActivationGradients(encoder, f"'{setting.representation}'")]
        for reader in readers:
            reader.kinds = self.rule.norms
        return list(readers)

    @property
    def should_measure(self) -> bool:
        """Whether the rule needs the norms of the next step."""
        return self.rule.should_measure

    def after_step(self, step: OptimizerStepState) -> bool:
        """Update the weights from the step's mean norms and losses."""
        loop = self.setting.loop
        if loop.ranks.size == 1 and not step.measured:
            return True  # there is no other rank to agree with
        reader = self.reader if step.measured else None
        assert reader is None or isinstance(reader, RowReader)
        if isinstance(reader, WeightGradients) and step.losses and reader.unreached >= set(step.losses):
            self._check_layer_still_exists(reader)
        weights = self.rule.loss_weights
        scale = loop.step_scale(step.backwards)
        means = reduce_step(self.setting.tasks, step, reader, weights, loop.ranks, scale)
        counts = bool(step.losses) or (means.present is not None and bool(means.present.any()))
        if means.norms is not None and counts:
            norms = means.norms / (weights if means.norms.ndim == 1 else weights[:, None])
            self.rule.step(norms, means.losses, means.present)
            if self.rule.syncs_every_step:
                self.warn()
        return counts

    def _check_layer_still_exists(self, reader: WeightGradients) -> None:
        """Refuse to balance by a layer that the model no longer has. A layer that a step leaves out has norms of 0."""
        model = self.setting.model
        own = {id(parameter) for parameter in model.parameters()}
        if not all(id(W) in own for W in reader.targets):
            raise ValueError(
                f"{self.setting.caller}: the shared layer that {type(model).__name__} had when training began has been "
                f"replaced, so no gradient arrives there. Replace it before training starts (in configure_model), or "
                f"train in two runs, the second from the checkpoint of the first."
            )

    def warn(self) -> None:
        """Warn once about each of the rule's remarks: numbers that allow no update, a task that dominates, and so on."""
        for key, message in self.rule.remarks.items():
            if key not in self._warned:
                self._warned.add(key)
                self.setting.loop.ranks.warn(f"{self.setting.caller}: {message}")

    def end_epoch(self) -> None:
        """Let the rule check the past epoch, and warn about what it finds. May wait for the device."""
        self.rule.end_epoch()
        self.warn()


AnyLossRule = TypeVar("AnyLossRule", bound=LossRule)


class LossMeasurement(Measurement[AnyLossRule]):
    """Feeds a rule with the losses, averaged over the ranks, before each backward pass."""

    def __init__(self, rule: AnyLossRule, setting: Setting) -> None:
        super().__init__(rule, setting)
        self._fallbacks = rule.fallbacks
        self._has_warned = False
        self._stepped: set[str] = set()
        """The tasks in the last step."""

    def before_backward(self, loss: Tensor, batch: BatchState, step: OptimizerStepState) -> None:
        """Let the rule set the weights of the losses that are about to be back-propagated."""
        if getattr(self.rule, "scalarizer", None) is None or batch.is_repeated:
            return
        ranks = self.setting.loop.ranks
        waiting = {task: [loss.value for loss in losses] for task, losses in batch.waiting().items()}
        if not waiting and ranks.size == 1:
            return
        losses, present = all_reduce_losses(self.setting.tasks, waiting, self.rule.loss_weights, ranks)
        if bool(present.any()):
            self.rule.weigh(losses, present)

    def after_step(self, step: OptimizerStepState) -> bool:
        """Let the rule learn from the step."""
        self._stepped = set(step.losses)
        self.rule.step()
        if self.rule.fallbacks > self._fallbacks and not self._has_warned:
            self._has_warned = True
            self.setting.loop.ranks.warn(
                f"{self.setting.caller}: {self.rule.kind} gave no usable weights ({self.rule.reason}); all tasks get equal "
                f"weights in this step. Further such steps are counted in balancing/fallbacks."
            )
        self._fallbacks = self.rule.fallbacks
        return bool(step.losses)

    def update_after_step(self, losses: Mapping[str, Sequence[Any]]) -> None:
        """Give the rule the losses of the tasks that were in the step, averaged over the ranks."""
        tasks, ranks = self.setting.tasks, self.setting.loop.ranks
        here = {
            task: [one for one in losses.get(task, ()) if isinstance(one, Tensor)]
            for task in tasks
            if task in self._stepped
        }
        self.rule.update_after_step(*all_reduce_losses(tasks, here, self.rule.loss_weights, ranks))
