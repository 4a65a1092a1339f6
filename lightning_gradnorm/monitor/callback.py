"""Shows which term of a composite loss moves the shared parameters, and leaves the training bit-identical."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import combinations
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from typing_extensions import Self, override

from lightning_gradnorm._messages import check, is_integer
from lightning_gradnorm.callbacks.copies import Copies
from lightning_gradnorm.callbacks.logging import log_image, log_step_metrics, logger_step, loggers_of_images
from lightning_gradnorm.callbacks.losses import LossSource, wraps_innermost
from lightning_gradnorm.callbacks.packages import is_one_of, works_in_both_packages
from lightning_gradnorm.callbacks.trainer_loop import TrainerLoop
from lightning_gradnorm.engine.layers import find_parameters
from lightning_gradnorm.engine.module_hooks import Remove, ReplacedMethod, patch_attribute
from lightning_gradnorm.gradients import REST, GradientNorms
from lightning_gradnorm.gradients.graph import has_gradient
from lightning_gradnorm.monitor.measurement import StepMeasurement
from lightning_gradnorm.monitor.summary import RunningSummary

_NAME = "GradientNormMonitor"
_check = partial(check, _NAME)


@works_in_both_packages
class GradientNormMonitor(L.Callback):
    """Show how much each term of a composite loss moves the shared parameters, and which terms conflict.

    Terms are whatever adds up to the loss: tasks, regularizers, penalties, physics terms. Every ``every_n_steps`` optimizer
    steps, the monitor reads each term's gradient by a separate first-order pass, right before the ordinary backward
    pass. The other steps cost nothing. Training stays bit-identical: parameters, random numbers, running statistics, loss
    scale.

    The values describe each term's contribution to ``.grad`` as the optimizer is about to use it, before clipping: with the
    term's coefficient in the loss and the weight that `GradNorm`, `FixedWeights` or `Scalarization` gives it in that step,
    averaged over micro-batches and ranks, without the loss scale. Anything else in the loss appears as ``rest_of_loss``.
    `Aggregation` does not update by a sum of terms; with it, the values describe the gradients before they are aggregated.

    Args:
        losses: keys of the mapping that ``training_step`` returns; or ``{"seg": "train/seg_loss", …}``, names under which
            the module logs its losses; or ``None``: the tasks of a `MultiTaskModule`, or in any other module every scalar
            with a gradient in that mapping except ``loss``. A module with manual optimization calls `watch` before
            ``manual_backward``.
        parameters: ``"shared"``: the encoder of a `MultiTaskModule`; elsewhere every parameter that at least two losses
            reach (a penalty on all parameters reaches every one: then name the encoder), or all if there are none. ``"all"``:
            every parameter. Or the dotted name of a module or of one parameter.
        every_n_steps: measure the first of every N optimizer steps. A measured step takes one extra pass per term, and
            memory for as many gradients.
        prefix: the beginning of logged names. Two monitors in one Trainer, for example for two layers, need different ones.
        cosine_image: draws the cosines for loggers that take images: a function of the terms' names and a tensor of shape
            (T, T), nan where unknown, that returns an RGB image of shape (3, height, width), a tensor or an array. The
            ``experiments`` extra has `cosine_heatmap` in ``lightning_gradnorm.experiments.report.heatmap``. ``None`` logs no
            image.
        losses_from: as for `GradNorm`.

    Raises:
        ValueError: an argument is out of range; or, in training, the model lacks a loss or a parameter, or a loss contains
            another one.

    Logs in measured steps: ``monitor/norm/<loss>``; ``monitor/share/<loss>``, the length of the gradient's projection on
    the sum of all gradients, relative to that sum (see `GradientNorms.shares`); ``monitor/imbalance``, the largest norm over
    the smallest; ``monitor/cosine/<a>/<b>``; ``monitor/conflict/<a>/<b>``, the share of the measured steps so far in which
    that cosine was negative; and an image, ``monitor/cosine``, from ``cosine_image``. At the end of training
    it prints a `summary` with suggested static weights: those with sum T that make the mean norms equal (`GradNorm`'s goal
    with ``alpha=0``; Chen et al., 2018, section 3.2). Your own hooks on parameters or modules run in each extra pass.

    Example:
        >>> import lightning as L
        >>> from lightning_gradnorm import GradientNormMonitor
        >>> monitor = GradientNormMonitor(["data", "physics", "l2"], parameters="encoder", every_n_steps=100)
        >>> trainer = L.Trainer(callbacks=[monitor], logger=False)
    """

    def __init__(
        self,
        losses: Sequence[str] | Mapping[str, str] | None = None,
        parameters: str = "shared",
        every_n_steps: int = 50,
        prefix: str = "monitor",
        cosine_image: Callable[[Sequence[str], Tensor], Any] | None = None,
        losses_from: str | Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self._source = LossSource(_NAME, losses, parameter="losses", losses_from=losses_from)
        if REST in self._source.names:
            raise ValueError(f"{_NAME}: losses names '{REST}', which stands for the remainder; give it another name.")
        is_name = isinstance(parameters, str) and parameters != ""
        _check(is_name, "parameters", "'shared', 'all' or a dotted name", parameters)
        _check(is_integer(every_n_steps, least=1), "every_n_steps", "an integer, at least 1", every_n_steps)
        _check(isinstance(prefix, str) and prefix != "", "prefix", "the beginning of logged names", prefix)
        can_draw = cosine_image is None or callable(cosine_image)
        _check(can_draw, "cosine_image", "a function of names and cosines, or None", cosine_image)
        self.losses = losses
        self.parameters = parameters
        self.prefix = prefix
        self.every_n_steps = every_n_steps
        self.cosine_image = cosine_image
        self._summary = RunningSummary(self._source.names, parameters)
        self._steps = 0
        self._measurement: StepMeasurement | None = None
        self._remove_patch: Remove | None = None
        self._copies = Copies(self)

    # ---- the start of training ---------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_one_of(trainer.strategy, "FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"):
            raise ValueError(
                f"{_NAME}: {type(trainer.strategy).__name__} keeps only a shard of each parameter on each rank. Measure the "
                f"gradients in a short run with strategy='ddp'."
            )
        self._release_model()
        self._copies.announce_training(trainer)
        self._source.resolve(pl_module)
        name: str | None = self.parameters
        if name == "shared":  # the parameters that two losses reach, unless the module declares its encoder
            name = "encoder" if self._source.declared and hasattr(pl_module, "encoder") else None
        if trainer.global_step == 0:
            self._steps, self._summary = 0, RunningSummary()
        self._summary.names, self._summary.parameters = self._source.names, name or "shared"
        self._summary.is_of_sum = all(getattr(one, "update_is_weighted_sum", True) for one in trainer.callbacks)  # type: ignore[attr-defined]
        parameters = None if name is None else find_parameters(pl_module, name, caller=f"{_NAME}: parameters")
        self._measurement = StepMeasurement(self._source, pl_module, parameters, TrainerLoop(trainer, self))

    # ---- one batch ---------------------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._unpatch()
        if self._measurement is None:
            return
        self._end_step_if_made(trainer)  # after the last batch, in a hook of the module
        if not self._measurement.is_active:
            if self._steps % self.every_n_steps:
                return
            self._measurement.start_step()
        self._patch_next_step(pl_module, self._measurement)

    def _patch_next_step(self, module: L.LightningModule, measurement: StepMeasurement) -> None:
        """Capture the losses of the next call of ``training_step``, and read their gradients before the backward pass.

        Balancing callbacks patch ``training_step`` too, for the whole training. This patch is placed on top of theirs right
        before the call and is removed before theirs runs, so the order of removal does not matter.
        """

        @wraps_innermost(module.training_step)
        def step(*args: Any, **kwargs: Any) -> Any:
            self._unpatch()
            manual_backward = module.manual_backward

            def read_first(loss: Tensor, *args: Any, **kwargs: Any) -> None:
                measurement.read(loss, share=1.0)
                manual_backward(loss, *args, **kwargs)

            with ExitStack() as patches:
                patches.callback(self._source.capture(module, self.watch))
                if not module.automatic_optimization:
                    patches.callback(patch_attribute(module, "manual_backward", read_first))
                output = module.training_step(*args, **kwargs)
            total = output.get("loss") if isinstance(output, Mapping) else output
            if module.automatic_optimization and isinstance(total, Tensor):  # Lightning refuses anything else
                measurement.read(total, share=1 / module.trainer.accumulate_grad_batches)
            return output

        self._remove_patch = patch_attribute(module, "training_step", ReplacedMethod(module, "training_step", step))

    def watch(self, losses: Mapping[str, Tensor | None]) -> None:
        """Measure these losses in the backward pass that follows, if this is a measured step.

        A module with manual optimization calls it in ``training_step``, before its own ``manual_backward``. For other modules
        the callback calls it.

        Args:
            losses: name → loss of any shape. Pass the very tensors that make up the back-propagated loss. ``None``: the loss
                is absent from this batch.

        Raises:
            TypeError, ValueError: a named loss is not a tensor, or carries no gradient.
        """
        if not isinstance(losses, Mapping):
            raise TypeError(f"{_NAME}: watch takes a mapping from name to loss; got {type(losses).__name__}.")
        if self._measurement is not None and self._measurement.is_active:
            idle = not torch.is_grad_enabled()
            self._measurement.watch({name: one for name, one in losses.items() if not idle or has_gradient(one)})

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if self._measurement is not None:
            self._measurement.before_backward()

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._measurement is not None:
            self._measurement.after_backward()

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._measurement is not None:
            self._measurement.note_step(optimizer)

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self._unpatch()
        if self._measurement is None:
            return
        self._measurement.end_batch()
        self._end_step_if_made(trainer)

    def _end_step_if_made(self, trainer: L.Trainer) -> None:
        if (measurement := self._measurement) is None or not measurement.was_stepped():
            return
        if measurement.is_active and not measurement.skipped:
            shown = self._source.shown
            wrong = self._source.find_misnamed(is_all=bool(shown)) or self._source.find_unlogged(shown, is_late=False)
            if wrong:
                raise ValueError(wrong)
            found = measurement.collect()
            if found is not None:
                self._record_step(trainer, *found)
        self._steps += not measurement.skipped  # a step that the loss scaler skips does not count
        measurement.end_step()

    # ---- what is shown -----------------------------------------------------------------------------------------------

    def _record_step(self, trainer: L.Trainer, found: GradientNorms, weights: Mapping[str, float]) -> None:
        terms = found.of([name for name in found if name != REST])
        if found.get(REST) == 0:
            found = terms
        self._summary.add(found, weights)
        log_step_metrics(trainer, _metrics(found, terms, self._summary.conflicts, self.prefix), every_step=True)
        if self.cosine_image is None or len(terms) < 2 or not trainer.is_global_zero:
            return
        if loggers_of_images(trainer):
            image = self.cosine_image(list(terms), terms.cosines)
            log_image(trainer, f"{self.prefix}/cosine", image, logger_step(trainer))

    def __repr__(self) -> str:
        names = ", ".join(self._trained._summary.names) or "all losses"
        return f"{_NAME}({names}; parameters='{self.parameters}', every {self.every_n_steps} steps)"

    @property
    def last(self) -> GradientNorms | None:
        """The last measured step. Its names include ``rest_of_loss`` if the loss has a remainder."""
        return self._trained._summary.last

    @property
    def conflicts(self) -> dict[tuple[str, str], float]:
        """By pair, the share of the measured steps so far in which two losses conflict: their cosine is negative."""
        return self._trained._summary.conflicts

    @property
    def suggested_weights(self) -> dict[str, float]:
        """Static weights, summing to T, that would have made the losses' mean norms equal in the steps measured so far."""
        return self._trained._summary.suggested_weights

    def summary(self) -> str:
        """Return a few sentences about the steps measured so far."""
        return self._trained._summary.sentences(_NAME)

    # ---- the end -----------------------------------------------------------------------------------------------------

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._unpatch()
        if trainer.current_epoch == 0 and self._steps and self._measurement is not None:
            unlogged = self._source.find_unlogged(self._source.shown, is_late=True)
            for message in (unlogged, self._source.find_unwatched(pl_module)):
                if message is not None:  # a warning: the loss may come later
                    self._measurement.loop.ranks.warn(message)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_step_if_made(trainer)
        self._release_model()
        rank_zero_info(self.summary())

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._release_model()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._release_model()

    def _unpatch(self) -> None:
        if self._remove_patch is not None:
            self._remove_patch()
            self._remove_patch = None

    def _release_model(self) -> None:
        self._unpatch()
        if self._measurement is not None:
            self._measurement.terms.release_graph()  # removes the hooks on the losses
            self._measurement = None

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(prefix=self.prefix)

    @override
    def state_dict(self) -> dict[str, Any]:
        one = self._trained
        return {"steps": one._steps, "tally": one._summary.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._copies.trained = None
        self._steps = state_dict["steps"]
        self._summary.load_state_dict(state_dict["tally"])

    _results, _take_over = state_dict, load_state_dict

    @property
    def _trained(self) -> Self:
        """The copy that was trained in place of this callback, or this callback."""
        return self._copies.trained or self

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_measurement": None, "_remove_patch": None}


def _metrics(
    found: GradientNorms, terms: GradientNorms, conflicts: Mapping[tuple[str, str], float], prefix: str
) -> dict[str, float]:
    """Return the values to log for a step: of all gradients, and of those of the named losses."""
    others = {f"share/{name}": share for name, share in found.shares.items()}
    others["imbalance"] = terms.imbalance
    others |= {f"cosine/{one}/{other}": terms.cosine(one, other) for one, other in combinations(terms, 2)}
    others |= {f"conflict/{one}/{other}": share for (one, other), share in conflicts.items()}
    norms = {f"norm/{name}": norm for name, norm in found.items()}
    shown = norms | {name: value for name, value in others.items() if not math.isnan(value)}
    return {f"{prefix}/{name}": value for name, value in shown.items()}
