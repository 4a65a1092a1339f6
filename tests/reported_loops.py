"""Loops that people report: gradients dropped, steps behind Lightning's back, several optimizers, errors that are caught."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from models import Automatic, Batch, Manual, network_sgd
from torch import Tensor, nn

plain_sgd = partial(torch.optim.SGD, lr=0.02)
line_search = partial(torch.optim.LBFGS, lr=0.1, max_iter=4, line_search_fn="strong_wolfe")


@dataclass
class Situation:
    """A model, and the batches of each of its optimizer steps, which are all that the rule should learn from."""

    make: Callable[[], Any]
    steps: Sequence[Sequence[int]]
    trainer: dict[str, Any] = field(default_factory=dict)
    optimizer: Callable[[Any], Any] = network_sgd
    by_closure: bool = False
    batches: int = 6
    at_once: int = 0
    """How many batches a batch of the loader consists of, if it is a list of them."""


def each(count: int = 6) -> list[list[int]]:
    return [[i] for i in range(count)]


# automatic optimization -----------------------------------------------------------------------------------------------


class RunsTheClosureAlone(Automatic):
    """Makes no step in every other batch, whose gradients Lightning then drops."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:  # type: ignore[override]
        if batch_idx % 2 == 0:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class AccumulatesByItself(Automatic):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:  # type: ignore[override]
        optimizer_closure()
        if batch_idx % 2 == 1:
            optimizer.step()

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        if batch_idx % 2 == 0:
            optimizer.zero_grad()


class EndsItsEpoch(Automatic):
    """Leaves the rest of the first epoch out, in the middle of an accumulation."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> int | None:
        return -1 if self.current_epoch == 0 and batch_idx == 3 else None


class StepsRaw(Automatic):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:  # type: ignore[override]
        optimizer_closure()
        optimizer.optimizer.step()


class StepsRawByClosure(Automatic):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:  # type: ignore[override]
        optimizer.optimizer.step(closure=optimizer_closure)


class SkipsAWindow(Automatic):
    """Accumulates as the Trainer specifies, and makes no step in one of the windows."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any) -> None:  # type: ignore[override]
        if batch_idx in (2, 3):
            optimizer_closure()
        else:
            optimizer.step(closure=optimizer_closure)


class ZeroesBadGradients(Automatic):
    """As Lightning's issue 4956 advises: the step is made, but without gradients."""

    def on_after_backward(self) -> None:
        if self.trainer.global_step in (1, 2):
            self.zero_grad()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return plain_sgd(self.parameters())


class BackwardForEachLoss(Automatic):
    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        self.step = super().training_step(batch, batch_idx)
        return self.step

    def backward(self, loss: Tensor) -> None:  # type: ignore[override]
        for task in self.tasks:
            self.step[task].backward(retain_graph=True)


class Lookahead(torch.optim.Optimizer):
    """Wraps another optimizer and leaves out Optimizer.__init__, as many do: torch does not know its hooks."""

    def __init__(self, parameters: Any) -> None:
        self.base = network_sgd(parameters)
        self.param_groups, self.defaults, self.state = self.base.param_groups, self.base.defaults, self.base.state
        self.slow = [p.detach().clone() for p in self.param_groups[0]["params"]]
        self.count = 0

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.base.state_dict()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        loss = self.base.step(closure)
        self.count += 1
        if self.count % 2 == 0:
            for slow, p in zip(self.slow, self.param_groups[0]["params"], strict=True):
                p.copy_(slow.lerp_(p, 0.5))
        return loss


class LooksAhead(Automatic):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Lookahead(self.parameters())


class ThenLineSearch(torch.optim.Optimizer):
    """Six steps of SGD, then LBFGS with a line search: how physics-informed networks are trained."""

    def __init__(self, parameters: Any) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {})
        self.phases, self.count = (plain_sgd(parameters), line_search(parameters)), 0

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        self.count += 1
        return self.phases[self.count > 6].step(closure)


class ChangesItsOptimizer(Automatic):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return plain_sgd(self.parameters())

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.optimizers = [line_search(self.parameters())]


class StepsWithinBackward(Automatic):
    """Each parameter steps as soon as it has its gradient, to save memory."""

    def configure_optimizers(self) -> None:  # type: ignore[override]
        return None

    def on_fit_start(self) -> None:
        self.own = {p: plain_sgd([p]) for p in self.parameters()}
        self.handles = [p.register_post_accumulate_grad_hook(self.step_one) for p in self.parameters()]

    def step_one(self, parameter: Tensor) -> None:
        self.own[parameter].step()
        self.own[parameter].zero_grad()

    def on_fit_end(self) -> None:
        for handle in self.handles:
            handle.remove()


# by hand --------------------------------------------------------------------------------------------------------------


class ByHand(Manual):
    def back_propagate(
        self, batch: Batch, parts: int = 1, scale: Callable[[Tensor], Tensor] = lambda loss: loss
    ) -> None:
        losses = self.task_losses(batch)
        for gradnorm in self.gradnorm:
            gradnorm.watch(losses)
        self.manual_backward(scale(torch.stack(list(losses.values())).sum() / parts))


class WithinBackwardByHand(ByHand):
    configure_optimizers = StepsWithinBackward.configure_optimizers  # type: ignore[assignment]
    on_fit_start, step_one = StepsWithinBackward.on_fit_start, StepsWithinBackward.step_one
    on_fit_end = StepsWithinBackward.on_fit_end

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        self.back_propagate(batch)


class LeavesBatchesOut(ByHand):
    """Drops the gradients of some batches, which it does not like."""

    def __init__(self, set_to_none: bool = True) -> None:
        super().__init__()
        self.set_to_none = set_to_none

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        self.back_propagate(batch)
        if batch_idx not in (1, 2):
            optimizer.step()
        optimizer.zero_grad(set_to_none=self.set_to_none)


class RunsOutOfMemory(ByHand):
    """A backward pass fails in two batches; the module continues with the next, or tries again."""

    def __init__(self, again: bool = False) -> None:
        super().__init__()
        self.again = again

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        fails = self.encoder[0].weight.register_hook(self.fail) if batch_idx in (1, 2) else None  # type: ignore[union-attr]
        try:
            self.back_propagate(batch)
        except RuntimeError:
            if fails is None:
                raise
            fails.remove()
            optimizer.zero_grad()
            if not self.again:
                return
            self.back_propagate(batch)
        optimizer.step()

    def fail(self, gradient: Tensor) -> None:
        raise RuntimeError("CUDA out of memory")


class Adversarial(ByHand):
    """A discriminator steps in every batch, the generator in every second: its gradients wait meanwhile."""

    def __init__(self, is_first: bool = True, is_wrapped: bool = True, every: int = 2) -> None:
        super().__init__()
        self.discriminator = nn.Linear(3, 1).double()
        self.is_first, self.is_wrapped, self.every = is_first, is_wrapped, every

    def configure_optimizers(self) -> Any:
        generator = [p for name, p in self.named_parameters() if not name.startswith("discriminator")]
        return network_sgd(generator), torch.optim.SGD(self.discriminator.parameters(), lr=0.1)

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        mine, others = self.optimizers(use_pl_optimizer=self.is_wrapped)  # type: ignore[misc]
        if self.is_first:
            self.discriminate(batch, others)
        if batch_idx % self.every == 0:
            mine.zero_grad()
        self.back_propagate(batch, self.every)
        if not self.is_first:
            self.discriminate(batch, others)
        if (batch_idx + 1) % self.every == 0:
            mine.step()

    def discriminate(self, batch: Batch, optimizer: Any) -> None:
        optimizer.zero_grad()
        with torch.no_grad():
            fake = self.seg_head(self.encoder(batch["x"]))
        self.manual_backward(self.discriminator(fake).mean() - self.discriminator(batch["seg"]).mean())
        optimizer.step()


class StepsAfterTheBatch(ByHand):
    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        self.back_propagate(batch)

    def on_train_batch_end(self, *_: Any) -> None:
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()


class StepsAfterTheEpoch(ByHand):
    """Gradient descent on all data, which Lightning does not count among its steps."""

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        self.back_propagate(batch, parts=6)

    def on_train_epoch_end(self) -> None:
        optimizer: Any = self.optimizers()
        optimizer.step()
        optimizer.zero_grad()


class InPieces(ByHand):
    """Back-propagates a large batch in pieces."""

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        for piece in batch:
            self.back_propagate(piece, parts=len(batch))
        optimizer.step()


class KeepsItsOptimizer(ByHand):
    """The Trainer does not know any optimizer."""

    def configure_optimizers(self) -> None:  # type: ignore[override]
        return None

    def on_fit_start(self) -> None:
        self.own = network_sgd(self.parameters())

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        self.back_propagate(batch, parts=2)
        if batch_idx % 2 == 1:
            self.own.step()
            self.own.zero_grad()


class KeepsItsScaler(ByHand):
    """The loss scale falls when a step overflows, and must not be seen in the norms."""

    def __init__(self) -> None:
        super().__init__()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.back_propagate(batch, scale=self.scaler.scale)
        if batch_idx in (2, 3):
            self.encoder[0].weight.grad[0, 0] = torch.inf  # type: ignore[union-attr,index]
        self.scaler.step(optimizer)
        self.scaler.update()


class ChoosesByEpoch(ByHand):
    def configure_optimizers(self) -> Any:
        return [plain_sgd(self.parameters()), line_search(self.parameters())]

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()[self.current_epoch]  # type: ignore[index]

        def closure() -> Tensor:
            optimizer.zero_grad()
            losses = self.task_losses(batch)
            self.gradnorm[0].watch(losses)
            loss = torch.stack(list(losses.values())).sum()
            self.manual_backward(loss)
            return loss

        if self.current_epoch == 0:
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)


class OneForEachPart(ByHand):
    """The heads' optimizer steps in every batch; in the first epoch it is the only one that does."""

    def __init__(self, starts: int = 0) -> None:
        super().__init__()
        self.starts = starts

    def configure_optimizers(self) -> Any:
        heads = [p for name, p in self.named_parameters() if "head" in name]
        return network_sgd(heads), network_sgd(self.encoder.parameters())

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        of_heads, of_encoder = self.optimizers()  # type: ignore[misc]
        self.zero_grad()
        self.back_propagate(batch)
        of_heads.step()
        if self.current_epoch >= self.starts:
            of_encoder.step()


class Toggles(ByHand):
    """Trains the heads first, while the encoder takes no gradients."""

    def __init__(self, watches_heads: bool = False) -> None:
        super().__init__()
        self.watches_heads = watches_heads

    configure_optimizers = OneForEachPart.configure_optimizers

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        of_heads, of_encoder = self.optimizers()  # type: ignore[misc]
        for optimizer, is_watched in ((of_heads, self.watches_heads), (of_encoder, True)):
            self.toggle_optimizer(optimizer)
            optimizer.zero_grad()
            losses = self.task_losses(batch)
            if is_watched:
                self.gradnorm[0].watch(losses)
            self.manual_backward(torch.stack(list(losses.values())).sum())
            optimizer.step()
            self.untoggle_optimizer(optimizer)


TWICE = {"max_epochs": 2}
LATER_LINE_SEARCH: dict[str, Any] = {"optimizer": ThenLineSearch, "by_closure": True}
PAIRS = [[0, 1], [2, 3], [4, 5]]
SITUATIONS = {
    "a closure without a step": Situation(RunsTheClosureAlone, [[0], [2], [4]]),
    "accumulation of its own": Situation(AccumulatesByItself, PAIRS, optimizer=partial(network_sgd, lr=0.04)),
    "an epoch cut short": Situation(EndsItsEpoch, [[0, 1], *PAIRS], {"accumulate_grad_batches": 2, **TWICE}),
    "raw steps": Situation(StepsRaw, each()),
    "raw steps by closure": Situation(StepsRawByClosure, each()),
    "a window without a step": Situation(SkipsAWindow, [[0, 1], [4, 5]], {"accumulate_grad_batches": 2}),
    "gradients zeroed after backward": Situation(ZeroesBadGradients, [[0], [3], [4], [5]], optimizer=plain_sgd),
    "a backward pass for each loss": Situation(BackwardForEachLoss, each()),
    "Lookahead": Situation(LooksAhead, each(), optimizer=Lookahead),
    "another optimizer later": Situation(ChangesItsOptimizer, each() * 2, TWICE, **LATER_LINE_SEARCH),
    "steps within backward": Situation(StepsWithinBackward, each(), optimizer=plain_sgd),
    "steps within backward by hand": Situation(WithinBackwardByHand, each(), optimizer=plain_sgd),
    "a last window dropped": Situation(lambda: Manual(accumulate=2), PAIRS[:2] * 2, TWICE, batches=5),
    "batches left out": Situation(LeavesBatchesOut, [[0], [3], [4], [5]]),
    "batches left out, zeros": Situation(lambda: LeavesBatchesOut(set_to_none=False), [[0], [3], [4], [5]]),
    "out of memory": Situation(RunsOutOfMemory, [[0], [3], [4], [5]]),
    "out of memory, again": Situation(lambda: RunsOutOfMemory(again=True), each()),
    "a discriminator first": Situation(Adversarial, PAIRS),
    "a discriminator in between": Situation(lambda: Adversarial(is_first=False), PAIRS),
    "a discriminator, raw": Situation(lambda: Adversarial(is_first=False, is_wrapped=False), PAIRS),
    "a discriminator, each batch": Situation(lambda: Adversarial(every=1), each()),
    "steps after the batch": Situation(StepsAfterTheBatch, each()),
    "steps after the epoch": Situation(StepsAfterTheEpoch, [[0, 1, 2, 3, 4, 5]] * 3, {"max_epochs": 3}),
    "a batch in pieces": Situation(InPieces, PAIRS, at_once=2),
    "an optimizer of its own": Situation(KeepsItsOptimizer, PAIRS),
    "a scaler of its own": Situation(KeepsItsScaler, [[0], [1], [4], [5]]),
    "optimizers by epoch": Situation(ChoosesByEpoch, each() * 2, TWICE, **LATER_LINE_SEARCH),
    "an optimizer for each part": Situation(OneForEachPart, each()),
}
