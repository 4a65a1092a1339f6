"""Aggregates the task gradients of all shared parameters: the textbook method, for any network."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from itertools import compress
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from lightning_gradnorm.engine.aggregation import RanksWeights
from lightning_gradnorm.engine.measurement import LossMeasurement, Setting
from lightning_gradnorm.engine.rule import GradientRule
from lightning_gradnorm.engine.step_state import BatchState, OptimizerStepState
from lightning_gradnorm.gradients import GradientReader, SharedGradients, reason_not_retraversable, row_width
from lightning_gradnorm.gradients.graph import reachable_nodes


class AtParameters(LossMeasurement[GradientRule]):
    """Aggregates the gradients of the parameters that at least two tasks reach, after the backward pass.

    Until every task has been seen, any parameter that one task reaches may be shared. So the gradients of all of these are kept
    apart; those that turn out not to be shared get the plain sum.

    Args:
        rule: the aggregation.
        setting: the model and the loop it works on.
    """

    replaces_gradients = True

    def __init__(self, rule: GradientRule, setting: Setting) -> None:
        super().__init__(rule, setting)
        self.gramian: Tensor | None = None
        """``J Jᵀ`` of the last step, over all ranks."""
        self._weights = RanksWeights(rule, setting)
        self._keeps_weights = False
        self._seen: set[str] = set()
        self._reached: dict[str, set[Tensor]] = {task: set() for task in setting.tasks}
        """Task → the parameters that its loss has reached so far in the graph, on any rank."""
        self._moved: dict[str, set[Tensor]] = {task: set() for task in setting.tasks}
        """Task → the parameters at which its gradient has arrived so far, on any rank. They may be fewer: DDP sends all of its
        outputs through one node if it looks for unused parameters or the graph is static."""
        self._before: dict[str, Any] | None = None
        """The rule's state before it aggregated in this optimizer step."""

    def candidates(self, W: Mapping[str, nn.Parameter], uncompiled: Collection[nn.Module]) -> list[GradientReader]:
        """Return the reader of the shared parameters.

        Raises:
            ValueError: the model is sharded.
        """
        model = self.setting.model
        sharded = [name for name, parameter in model.named_parameters() if hasattr(parameter, "full_tensor")]
        if sharded:
            raise ValueError(
                f"{self.setting.caller}: at='parameters' takes whole gradients, but '{sharded[0]}' is sharded (a DTensor, as "
                f"of fully_shard). Use at='representation', or DistributedDataParallel."
            )
        return [SharedGradients()]

    @property
    def should_measure(self) -> bool:
        """An aggregation needs the gradients of every step."""
        return True

    @property
    def _gradients(self) -> SharedGradients:
        assert isinstance(self.reader, SharedGradients)
        return self.reader

    # ---- which parameters are shared ---------------------------------------------------------------------------------

    def find_targets(self, batch: BatchState) -> None:
        """Find the parameters that the losses reach: in this pass or an earlier one, on any rank.

        Raises:
            ValueError: tasks share nothing, or the graph cannot be traversed once per task.
        """
        model = self.setting.model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._merge(trained, self._look(batch))
        is_complete = self._seen >= set(self.setting.tasks)
        shared = _of_several(self._reached, 2, trained)
        if is_complete and all(parameter.requires_grad for parameter in model.parameters()):
            self._require_shared(shared)
        if not is_complete:  # what one task reaches may be another's as well, unless it is in the task's head
            heads = self.setting.heads if isinstance(self.setting.heads, Mapping) else {}
            own = {parameter for name in heads.values() for parameter in model.get_submodule(name).parameters()}
            shared |= _of_several(self._reached, 1, trained) - own
        self._gradients.set_targets([parameter for parameter in trained if parameter in shared])

    def _look(self, batch: BatchState) -> dict[str, set[Node]]:
        """Return the nodes behind the losses that are about to be back-propagated, by task."""
        caller, found = self.setting.caller, {}
        for task, losses in batch.waiting().items():
            found[task] = reachable_nodes(loss.node for loss in losses)
            if task not in self._seen:
                heads = batch.branches.get(task)
                if cause := reason_not_retraversable(reachable_nodes(heads) if heads else found[task]):
                    raise ValueError(
                        f"{caller}: at='parameters' takes a separate backward pass for each task, and that of task '{task}' "
                        f"comes to {cause.split(',')[0]}"
                        f"{'' if cause.endswith('False.') else ', whose graph cannot be traversed twice.'} Or use "
                        f"at='representation'."
                    )
        return found

    def _merge(self, trained: list[nn.Parameter], found: Mapping[str, set[Node]]) -> None:
        """Record the parameters that the losses reach, on all ranks together."""
        here = {
            task: {variable for node in nodes if isinstance(variable := getattr(node, "variable", None), Tensor)}
            for task, nodes in found.items()
        }
        if self.setting.loop.ranks.size == 1:
            self._seen |= here.keys()
            for task, leaves in here.items():
                self._reached[task] |= leaves & set(trained)
            return
        tasks = self.setting.tasks
        table = [[task in here, *(p in here.get(task, ()) for p in trained)] for task in tasks]
        of_ranks = self._weights.on_cpu.sum(torch.tensor(table, dtype=torch.float32)) > 0
        for task, row in zip(tasks, of_ranks, strict=True):
            self._seen |= {task} if row[0] else set()
            self._reached[task] |= {trained[i] for i in row[1:].nonzero().flatten().tolist()}

    def _require_shared(self, shared: Collection[Tensor]) -> None:
        tasks, model = self.setting.tasks, type(self.setting.model).__name__
        apart = [task for task in tasks if self._reached[task].isdisjoint(shared)]
        if not apart:
            return
        others = [task for task in tasks if task not in apart]
        what = (
            f"task '{apart[0]}' shares no trained parameter with the others, {others}. Leave it out of tasks"
            if others
            else f"the tasks {list(tasks)} share no trained parameter. (Is what they share detached, or computed under "
            f"torch.no_grad()?) Train them without an aggregation"
        )
        raise ValueError(
            f"{self.setting.caller}: at='parameters' aggregates the gradients of the parameters that tasks share, but in "
            f"{model} {what}, or balance by the losses alone, as Scalarization does."
        )

    # ---- one backward pass -------------------------------------------------------------------------------------------

    def before_backward(self, loss: Tensor, batch: BatchState, step: OptimizerStepState) -> None:
        """Keep the tasks' gradients apart in this backward pass."""
        super().before_backward(loss, batch, step)
        # The weights of a step's first evaluation apply to all of them: the optimizer expects a single function.
        self._keeps_weights = batch.is_repeated and self.rule.has_weights
        if not step.backwards:  # a repeated evaluation also starts without the gradients of the last one
            self._gradients.forget()
            self._before = None
        if step.measured:
            self._gradients.begin(loss, stop=batch.reading_nodes())

    @torch.no_grad()
    def after_backward(self, step: OptimizerStepState, *, has_moved: bool) -> None:
        """Set the gradient that results from aggregating those read since the optimizer's last step.

        Raises:
            ValueError: the optimizer has not waited for it.
        """
        loop = self.setting.loop
        if not step.measured or loop.is_accumulating():
            return
        if has_moved and step.losses:
            raise ValueError(
                f"{self.setting.caller}: at='parameters' aggregates when a backward pass is over, but the parameters have "
                f"moved within it (in hooks of the parameters that step). Step after it, or use at='representation'."
            )
        if self._before is None:
            self._before = self.rule.aggregator_state()
        elif not self._keeps_weights:  # another micro-batch: aggregate all of them again
            self.rule.load_aggregator_state(self._before)
        parameters = list(self._gradients.held)
        widths = [row_width([parameter]) for parameter in parameters]
        size = float(loop.step_scale(step.backwards))  # ratio of .grad to the gradient of the mean loss
        marks = 1 + len(parameters)  # of a task: is it there, and at which parameters has its gradient arrived
        table = self.rule.loss_weights.new_zeros(len(self.setting.tasks), marks + sum(widths))
        for row, task in zip(table, self.setting.tasks, strict=True):
            arrived = self._gradients.rows.get(task, {})
            row[:marks] = torch.tensor([step.counts.get(task, 0), *(p in arrived for p in parameters)])
        self._gradients.write_rows(table[:, marks:], self.setting.tasks)
        table = loop.ranks.sum(table)
        J = table[:, marks:].div_(loop.ranks.size * (size or 1.0))
        marked = (table[:, :marks] > 0).cpu()
        for task, (_, *here) in zip(self.setting.tasks, marked.tolist(), strict=True):
            self._moved[task].update(compress(parameters, here))
        shared = _of_several(self._moved, min(2, len(self._seen)), parameters)
        shares = [not self._moved[task].isdisjoint(shared) for task in self.setting.tasks]
        present = marked[:, 0] & torch.tensor(shares)
        if len(shared) == len(parameters):
            gradient = self._aggregate(J, present)
        else:
            columns = torch.tensor([parameter in shared for parameter in parameters])
            columns = columns.repeat_interleave(torch.tensor(widths)).to(J.device)
            gradient = J.sum(dim=0)
            gradient[columns] = self._aggregate(J[:, columns], present).to(gradient)
        # Each rank adds this to its own copy of the parameters' gradients, so all must add the same bits.
        gradient = loop.ranks.broadcast_from_rank0(gradient) * size
        pieces = dict(zip(parameters, torch.split(gradient, widths), strict=True))
        # The head of an absent task gets no gradient, rather than one of zeros.
        self._gradients.place({p: piece for p, piece in pieces.items() if p in shared or bool(piece.any())})

    def _aggregate(self, J: Tensor, present: Tensor) -> Tensor:
        rule = self.rule
        self.gramian = (J @ J.T).cpu()
        if self._keeps_weights:
            return self._weights.kept(present).to(J) @ J
        if rule.has_weights:
            matrix = J if rule.input == "matrix" else None
            return self._weights.of(self.gramian, present, matrix).to(J) @ J
        return rule.aggregate(J, present)

    def after_step(self, step: OptimizerStepState) -> bool:
        """Let the rule learn from the step."""
        self._before = None
        return super().after_step(step)

    def discard_step(self) -> None:
        """Discard what the rule has learned since the last step."""
        if self._before is not None:
            self.rule.load_aggregator_state(self._before)
            self._before = None
        super().discard_step()

    def close(self) -> None:
        """Destroy the process group."""
        self._weights.on_cpu.close()


def _of_several(by_task: Mapping[str, set[Tensor]], least: int, parameters: Collection[Tensor]) -> set[Tensor]:
    """Return the parameters that are listed for at least ``least`` tasks."""
    return {parameter for parameter in parameters if sum(parameter in one for one in by_task.values()) >= least}
