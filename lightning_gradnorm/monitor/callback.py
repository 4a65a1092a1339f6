"""Shows which part of a composite loss moves the shared parameters, without changing the training by a bit."""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.seed import isolate_rng
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from typing_extensions import override

from lightning_gradnorm._messages import check, did_you_mean, is_integer, nearest
from lightning_gradnorm.callbacks.losses import capture_logged
from lightning_gradnorm.callbacks.packages import is_one_of, works_in_both_packages
from lightning_gradnorm.callbacks.trainer_loop import loss_scale, scaler_skips
from lightning_gradnorm.engine.layers import plain_name
from lightning_gradnorm.engine.module_hooks import Remove, patch_attribute
from lightning_gradnorm.engine.rule import DeclaresTasks
from lightning_gradnorm.gradients import (
    REST,
    GradientNorms,
    LossTermGradients,
    check_loss,
    flat_row,
    inner_products,
    row_width,
)
from lightning_gradnorm.monitor.heatmap import paint_cosines
from lightning_gradnorm.monitor.summary import Tally

_NAME = "GradientNormMonitor"
_check = partial(check, _NAME)


@works_in_both_packages
class GradientNormMonitor(L.Callback):
    """Show how large each part of a composite loss is in the update of the shared parameters, and which parts conflict.

    Parts are whatever is added up in the loss: tasks, regularizers, penalties, physics terms. In every so many optimizer
    steps each part's gradient is read by a first-order pass of its own, right before the ordinary backward pass; the other
    steps cost nothing. The training stays the same to the bit: parameters, random numbers, running statistics, loss scale.

    What is shown is each part's contribution to ``.grad`` as the optimizer is about to use it, before clipping: with the
    coefficient it has in the loss and the weight that `GradNorm`, `FixedWeights` or `Scalarization` gives it in that step,
    the mean over micro-batches and ranks, without the loss scale. What the loss has besides the named parts is shown as
    ``rest_of_loss``. With `Aggregation`, whose update is no sum of parts, it is the gradients before they are aggregated.

    Args:
        losses: keys of the mapping that ``training_step`` returns; or ``{"seg": "train/seg_loss", …}``, names under which
            the module logs its losses; or ``None``: the tasks of a `MultiTaskModule`, and of any other module all
            scalars with a gradient in that mapping but ``loss``. A module with manual optimization calls `watch` before
            ``manual_backward``.
        parameters: ``"shared"``: the encoder of a `MultiTaskModule`; elsewhere all parameters that at least two of the
            losses reach (which a penalty on all parameters makes all those that a task reaches: name the encoder then).
            Or the dotted name of a module, for all of its parameters, or of one parameter.
        every_n_steps: measure in the first of every so many optimizer steps. A measured step takes one pass for each part,
            and memory for as many gradients.
        prefix: what the logged names begin with. Two monitors in one Trainer, of two layers say, need two of them.

    Raises:
        ValueError: an argument out of range; and in training, a loss or a parameter that the model lacks, or a loss that
            contains another one.

    Logs, in measured steps: ``monitor/norm/<part>``; ``monitor/share/<part>``, the length of its gradient's projection on
    the sum of all, relative to that sum (see `GradientNorms.shares`); ``monitor/imbalance``, the largest norm over the
    smallest; ``monitor/cosine/<a>/<b>``; and to TensorBoard ``monitor/cosine``, a picture of all cosines. At the end of
    training it prints a `summary`, in which static weights are suggested: those of sum T that make the mean norms equal,
    which is what GradNorm aims at with ``alpha=0`` (Chen et al., 2018, section 3.2).

    Hooks of your own on parameters or modules are called in each of these passes.

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
    ) -> None:
        super().__init__()
        if losses is not None:
            _check_names(losses)
        _check(isinstance(parameters, str) and parameters != "", "parameters", "'shared' or a dotted name", parameters)
        is_count = is_integer(every_n_steps) and every_n_steps >= 1
        _check(is_count, "every_n_steps", "an integer, at least 1", every_n_steps)
        _check(isinstance(prefix, str) and prefix != "", "prefix", "what logged names begin with", prefix)
        self.losses = losses
        self.parameters = parameters
        self.prefix = prefix
        self.every_n_steps = every_n_steps
        self.last: GradientNorms | None = None
        """What the last measured step has shown; among its names is ``rest_of_loss``, if there is any."""
        self._logged_names = dict(losses) if isinstance(losses, Mapping) else None
        self._tally = Tally()
        self._aggregated = False
        self._steps = 0
        self._trainer: L.Trainer | None = None
        self._undo: Remove | None = None
        self._forget_training()

    def _forget_training(self) -> None:
        self._names: list[str] = [] if self.losses is None else list(self.losses)
        self._names_given = self.losses is not None
        self._declared = False
        self._sought: dict[str, nn.Parameter] | None = None
        self._reached: dict[str, set[str]] = {}
        self._gradients = LossTermGradients([], asked_by=_NAME)
        self._logged: set[str] = set()
        self._ever_offered: dict[str, None] = {}
        self._forget_window()

    def _forget_window(self) -> None:
        self._in_window = self._stepped = self._skipped = False
        self._candidates: dict[str, nn.Parameter] = {}
        self._watched: list[tuple[str, Tensor]] = []
        self._offered: dict[str, None] = {}  # in their order, as all that follows
        self._shown: set[str] = set()

    # ---- what is sought ----------------------------------------------------------------------------------------------

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_one_of(trainer.strategy, "FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"):
            raise ValueError(
                f"{_NAME}: {type(trainer.strategy).__name__} keeps only a piece of each parameter on each rank. Look at the "
                f"gradients in a short run with strategy='ddp'."
            )
        self._take_hooks_away()
        self._forget_training()
        if trainer.global_step == 0:
            self._steps, self._tally, self.last = 0, Tally(), None
        self._trainer = trainer
        self._aggregated = not all(getattr(callback, "update_is_weighted_sum", True) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        self._resolve_losses(pl_module)
        self._sought = self._find_parameters(pl_module)
        self._gradients = LossTermGradients(pl_module.buffers(), asked_by=_NAME)

    def _resolve_losses(self, module: L.LightningModule) -> None:
        if not isinstance(module, DeclaresTasks):
            return
        declared = list(module.task_heads)
        if self._logged_names is not None:
            raise ValueError(
                f"{_NAME}: losses names them as they are logged, {sorted(self._logged_names.values())}, but "
                f"{type(module).__name__} shows them itself. Use losses=None for all of its tasks, or a list of their names."
            )
        unknown = [name for name in self._names if name not in declared]
        if unknown:
            raise ValueError(
                f"{_NAME}: loss '{unknown[0]}' is not in {type(module).__name__}; {did_you_mean(unknown[0], declared)}"
            )
        self._names, self._names_given, self._declared = self._names or declared, True, True

    def _find_parameters(self, module: L.LightningModule) -> dict[str, nn.Parameter] | None:
        """Return the named parameters, frozen ones too; ``None`` if it depends on which losses reach them."""
        parameters = {plain_name(name): p for name, p in module.named_parameters()}
        name = plain_name(self.parameters)
        if name == "shared":
            if not (self._declared and isinstance(getattr(module, "encoder", None), nn.Module)):
                return None
            name = "encoder"
        modules = {plain_name(path): part for path, part in module.named_modules(remove_duplicate=False) if path}
        if name in modules:  # by the module, for parameters that are tied have one name of several
            inside = {id(parameter) for parameter in modules[name].parameters()}
            found = {called: p for called, p in parameters.items() if id(p) in inside}
        else:
            tied = {plain_name(called): p for called, p in module.named_parameters(remove_duplicate=False)}
            found = {name: tied[name]} if name in tied else {}
            if not found:
                raise ValueError(
                    f"{_NAME}: parameters '{self.parameters}' is not in {type(module).__name__}; "
                    f"{did_you_mean(name, ['shared', *modules, *parameters])}"
                )
        if not found:
            raise ValueError(
                f"{_NAME}: parameters '{self.parameters}' of {type(module).__name__} is a {type(modules[name]).__name__}, "
                f"which has no parameters. Name a layer that has, or use parameters='shared'."
            )
        return found

    # ---- around the forward pass -------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._take_hooks_away()
        if not self._in_window:
            if self._steps % self.every_n_steps:
                return
            self._in_window = True
            every = {plain_name(name): p for name, p in pl_module.named_parameters()}
            sought = every if self._sought is None else self._sought
            self._candidates = {name: p for name, p in sought.items() if p.requires_grad}
            self._gradients.begin(list(self._candidates.values()))
        self._undo = self._around_training_step(pl_module)

    def _around_training_step(self, module: L.LightningModule) -> Remove:
        """Shadow the next call of ``training_step``.

        Other callbacks, such as the balancing ones, shadow it too, for a whole training. So this goes on top of theirs just
        before the call, and has gone again when theirs is called: who undoes his first does not matter.
        """
        training_step = module.training_step

        @functools.wraps(inspect.unwrap(training_step))
        def step(*args: Any, **kwargs: Any) -> Any:
            undo()
            with ExitStack() as shadows:
                if self._logged_names is not None:
                    shadows.callback(capture_logged(module, self._logged_names, self.watch, self._logged))
                if not module.automatic_optimization:
                    shadows.callback(self._before_manual_backward(module))
                output = training_step(*args, **kwargs)
            if module.automatic_optimization and output is not None:
                self._take_output(module, output)
            return output

        undo = patch_attribute(module, "training_step", step)
        return undo

    def _before_manual_backward(self, module: L.LightningModule) -> Remove:
        manual_backward = module.manual_backward

        def read_first(loss: Tensor, *args: Any, **kwargs: Any) -> None:
            self._read(loss, share=1.0)
            manual_backward(loss, *args, **kwargs)

        return patch_attribute(module, "manual_backward", read_first)

    def _take_output(self, module: L.LightningModule, output: Any) -> None:
        if self._logged_names is None:
            if not isinstance(output, Mapping):
                raise TypeError(
                    f"{_NAME}: {type(module).__name__}.training_step should return a mapping with 'loss' and its parts; got "
                    f"{type(output).__name__}. Return {{'loss': loss, 'data': data, …}}, or name the losses as they are "
                    f"logged: losses={{'data': 'train/data_loss', …}}."
                )
            self.watch({name: value for name, value in output.items() if name != "loss"})
        total = output.get("loss") if isinstance(output, Mapping) else output
        if isinstance(total, Tensor):  # else Lightning says what is wrong
            self._read(total, share=1 / module.trainer.accumulate_grad_batches)

    def watch(self, losses: Mapping[str, Tensor | None]) -> None:
        """Look at these losses in the backward pass that follows, if this is a step that is measured.

        A module with manual optimization calls it in ``training_step``, before its own ``manual_backward``; for the
        others it is called by the callback.

        Args:
            losses: part → scalar loss, the very tensors of which the back-propagated loss is made. ``None`` says that the
                part is absent from this batch.

        Raises:
            TypeError, ValueError: a loss that was named is not a scalar, or carries no gradient.
        """
        if not isinstance(losses, Mapping):
            raise TypeError(f"{_NAME}: watch takes a mapping from part to loss; got {type(losses).__name__}.")
        if not (self._in_window and torch.is_grad_enabled()):
            return
        self._offered |= dict.fromkeys(losses)
        for name, loss in losses.items():
            if not self._names_given:
                if not _could_be_part(loss):
                    continue
            elif name not in self._names or loss is None:
                continue
            assert loss is not None
            check_loss(loss, asked=f"{_NAME}: the loss '{name}'")
            if not any(one is loss and called == name for called, one in self._watched):
                self._watched.append((name, loss))

    # ---- around the backward pass ------------------------------------------------------------------------------------

    def _read(self, total: Tensor, *, share: float) -> None:
        # Before Lightning says that backward begins: what balances the losses looks away until then.
        assert self._trainer is not None
        with isolate_rng():
            self._gradients.read(total, self._watched, share=share, scale=loss_scale(self._trainer))

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self._gradients.attach_hooks()

    @override
    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._gradients.finalize()

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._stepped = True
        self._skipped = self._skipped or (self._in_window and scaler_skips(trainer, optimizer))

    # ---- after the optimizer step ------------------------------------------------------------------------------------

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        self._take_hooks_away()
        self._shown |= {name for name, _ in self._watched}
        self._watched = []
        if not self._stepped:
            return
        if self._in_window and not self._skipped:
            self._check_named(pl_module)
            self._take_in(trainer)
        self._steps += not self._skipped  # a step that the loss scaler skips is none
        self._forget_window()
        self._gradients.begin([])

    def _check_named(self, module: L.LightningModule) -> None:
        """Refuse a loss that was not back-propagated, and a name that has not come up by the end of a measured step."""
        for name in self._names if self._names_given else ():
            if name in self._shown and name not in self._gradients.parts and self._candidates:
                raise ValueError(
                    f"{_NAME}: what was given as the loss '{name}' took no part in the backward pass. Add it to what is "
                    f"back-propagated (by manual_backward, in manual optimization); give the very tensor, not a copy of it, "
                    f"and give it before backward."
                )
        self._ever_offered |= self._offered
        if self._declared or not (self._offered or self._logged):
            return
        for name in self._names if self._names_given else ():
            if name in self._ever_offered:
                continue
            if self._logged_names is None:
                near = nearest(name, self._offered.keys() - set(self._names))
                question = f"did you mean '{near}'? " if near else ""
                raise ValueError(
                    f"{_NAME}: loss '{name}' is not among those that {type(module).__name__} has shown, which are "
                    f"{sorted(self._offered)}; {question}(A part that is absent from a batch is given as None.)"
                )
            called = self._logged_names[name]
            near = nearest(called, self._logged - set(self._logged_names.values()))
            if near:
                raise ValueError(
                    f"{_NAME}: '{called}' was not logged in the measured step, which logged {sorted(self._logged)}; did you "
                    f"mean '{near}'?"
                )

    @torch.no_grad()
    def _take_in(self, trainer: L.Trainer) -> None:
        """Gather what all ranks have read in this step, and show it."""
        self._agree_on_names(trainer)
        parts, parameters = self._gradients.parts, list(self._candidates.values())
        if not parameters or not self._names:
            return  # all of them frozen, or no loss: so it is on all ranks
        nothing = flat_row([None] * len(parameters), parameters)
        names = [*self._names, REST]
        table = nothing.new_zeros(len(names), 3 + len(parameters))
        for line, name in zip(table, names, strict=True):
            if name in parts:
                part = parts[name]
                line[0], line[1], line[2] = 1, part.weighted, part.plain
                line[3:] = torch.tensor(part.reaches)
        if trainer.world_size > 1:
            table = trainer.strategy.reduce(table, reduce_op="sum")
        rows, weights = {}, {}
        for (present, weighted, plain, *reaches), name in zip(table.tolist(), names, strict=True):
            if present:
                row = parts[name].row if name in parts else nothing.clone()
                if trainer.world_size > 1:  # one by one: a table of all would be another copy of them
                    row = trainer.strategy.reduce(row, reduce_op="sum") / trainer.world_size
                rows[name], weights[name] = row, weighted / plain if plain else 1.0
                reached = self._reached.setdefault(name, set())
                reached.update(called for called, reach in zip(self._candidates, reaches, strict=True) if reach)
        rows = self._shared_pieces(rows)
        if set(rows) - {REST}:
            self._show(trainer, GradientNorms(list(rows), inner_products(list(rows.values()))), weights)

    def _agree_on_names(self, trainer: L.Trainer) -> None:
        """Add names that have come up for the first time, on whatever rank."""
        if self._names_given:
            return
        shown: list[Any] = [(list(self._ever_offered), list(self._gradients.parts))]
        if trainer.world_size > 1:
            shown = [None] * trainer.world_size
            dist.all_gather_object(shown, (list(self._ever_offered), list(self._gradients.parts)))
        known = set(self._names).union(*(parts for _, parts in shown))
        self._names = [name for name in dict.fromkeys(n for offered, _ in shown for n in offered) if name in known]

    def _shared_pieces(self, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """Cut out of the rows what at least two losses have reached, if that is what is sought."""
        if self._sought is not None:
            return rows
        wanted = min(2, len(self._names))
        by_loss = [reached for name, reached in self._reached.items() if name != REST]
        shared = [sum(name in reached for reached in by_loss) >= wanted for name in self._candidates]
        if not any(shared):
            if len(by_loss) < len(self._names):
                return {}  # there are losses still to come
            raise ValueError(
                f"{_NAME}: parameters='shared' are those that two of the losses {self._names} reach, and there is none. Name a "
                f"layer: parameters='encoder'."
            )
        widths = [row_width([parameter]) for parameter in self._candidates.values()]

        def cut(row: Tensor) -> Tensor:
            return torch.cat([piece for piece, wanted in zip(torch.split(row, widths), shared, strict=True) if wanted])

        return {name: cut(row) for name, row in rows.items()}

    def _show(self, trainer: L.Trainer, found: GradientNorms, weights: Mapping[str, float]) -> None:
        if found.get(REST) == 0:
            found = found.of([name for name in found if name != REST])
        self.last = found
        self._tally.add(found, weights)
        parts = found.of([name for name in found if name != REST])
        shown = {f"{self.prefix}/norm/{name}": norm for name, norm in found.items()}
        shown |= {f"{self.prefix}/share/{name}": share for name, share in found.shares.items()}
        shown[f"{self.prefix}/imbalance"] = parts.imbalance
        for one, other in itertools.combinations(parts, 2):
            shown[f"{self.prefix}/cosine/{one}/{other}"] = found.cosine(one, other)
        shown = {
            tag: value
            for tag, value in shown.items()
            if not math.isnan(value) or tag.startswith(f"{self.prefix}/norm/")
        }
        trainer.callback_metrics.update({tag: torch.tensor(value, dtype=torch.float64) for tag, value in shown.items()})
        # Not by self.log: of that Lightning writes the steps of log_every_n_steps, which are others.
        step = trainer.fit_loop.epoch_loop._batches_that_stepped
        for logger in trainer.loggers:
            logger.log_metrics(shown, step=step)
            if is_one_of(logger, "TensorBoardLogger") and trainer.is_global_zero and len(parts) > 1:
                picture = paint_cosines(list(parts), parts.cosines)
                logger.experiment.add_image(f"{self.prefix}/cosine", picture, step)  # type: ignore[attr-defined]

    # ---- the end -----------------------------------------------------------------------------------------------------

    @property
    @override
    def state_key(self) -> str:
        return self._generate_state_key(prefix=self.prefix)

    @property
    def suggested_weights(self) -> dict[str, float]:
        """Static weights, of sum T, that would have made the parts' mean norms equal in the steps measured so far."""
        return self._tally.suggested_weights

    def summary(self) -> str:
        """Return, in a few sentences, what the steps measured so far have shown."""
        encoder = self._declared and self.parameters == "shared"
        shared = "`encoder`" if encoder else "the shared parameters"
        where = shared if self.parameters == "shared" else f"`{self.parameters}`"
        what = "the sum of the gradients, before they are aggregated," if self._aggregated else "the update"
        return self._tally.sentences(_NAME, what, where)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._let_go()
        rank_zero_info(self.summary())

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._take_hooks_away()
        if trainer.current_epoch == 0 and self._steps and not self._declared:
            self._warn_of_unseen(pl_module)

    def _warn_of_unseen(self, module: L.LightningModule) -> None:
        """Say, after the first epoch, which names no measured step has shown: they may come later, or be wrong."""
        if self._logged_names is not None:
            missing = [called for called in self._logged_names.values() if called not in self._logged]
            if missing:
                rank_zero_warn(
                    f"{_NAME}: '{missing[0]}' was not logged in the measured steps of the first epoch, which logged "
                    f"{sorted(self._logged)}. Log the loss in training_step, before its backward, or mend the name in losses."
                )
        elif not self._ever_offered and not module.automatic_optimization:
            rank_zero_warn(
                f"{_NAME}: no loss was seen in the first epoch. {type(module).__name__} optimizes manually: it should call "
                f"watch({{'data': loss, …}}) on this callback before manual_backward."
            )

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._let_go()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._let_go()

    def _take_hooks_away(self) -> None:
        if self._undo is not None:
            self._undo()
            self._undo = None
        self._gradients.release_graph()

    def _let_go(self) -> None:
        """Hold on to nothing of the model."""
        self._take_hooks_away()
        self._forget_window()
        self._trainer, self._sought = None, None
        self._gradients = LossTermGradients([], asked_by=_NAME)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "tally": self._tally.state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._steps = state_dict["steps"]
        self._tally.load_state_dict(state_dict["tally"])


def _could_be_part(loss: object) -> bool:
    return isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad and not loss.is_complex()


def _check_names(losses: object) -> None:
    is_list = isinstance(losses, Sequence | Mapping) and not isinstance(losses, str)
    names = list(losses) if isinstance(losses, Sequence | Mapping) else []
    values = list(losses.values()) if isinstance(losses, Mapping) else []
    if not is_list or not names or not all(isinstance(one, str) for one in [*names, *values]):
        raise TypeError(
            f"{_NAME}: losses should be a list of names, such as ['data', 'physics'], or a mapping from name to the name under "
            f"which the loss is logged; got {losses!r}"
        )
    for some in (names, values):
        if len(set(some)) != len(some):
            raise ValueError(f"{_NAME}: losses should all be different; got {losses!r}")
    if "loss" in names and not values:
        raise ValueError(
            f"{_NAME}: losses names 'loss', which is what is back-propagated, the sum of all; it should name the parts that "
            f"are added up in it. Got {names}"
        )
    if REST in names:
        raise ValueError(f"{_NAME}: losses names '{REST}', as which the remainder is shown; give it another name.")
