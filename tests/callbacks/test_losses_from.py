"""Losses read from a return value inside the model: the model only returns its total and does not know this library.

Each is compared with a twin that returns its losses from `training_step`.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import lightning as L
import pytest
import torch
from harness import Batches, MemoryLogger, assert_clean, traces
from models import Automatic, Batch, vector_batches
from torch import Tensor, nn
from torch.nn import functional as F
from torchjd import aggregation as A
from torchjd import scalarization as S
from torchmetrics import Metric

from lightning_gradnorm import Aggregation, FixedWeights, GradientNormMonitor, GradNorm, Scalarization

STEPS = 5
NAMES = ["seg", "depth", "normal"]
BY_INDEX = {"seg": "0", "depth": "1", "normal": "2"}
MakeTrainer = Callable[..., L.Trainer]
Pairs = dict[str, tuple[Tensor, Tensor]]
Losses = dict[str, Tensor]


def losses_of(pairs: Pairs) -> Losses:
    return {task: F.mse_loss(*pair) for task, pair in pairs.items()}


# ---- what is returned --------------------------------------------------------------------------------------------------


@dataclass
class Three:
    seg: Tensor
    depth: Tensor
    normal: Tensor


class Named(NamedTuple):
    seg: Tensor
    depth: Tensor
    normal: Tensor


class WithProperties:
    """Computes its losses when they are asked for."""

    def __init__(self, losses: Losses) -> None:
        self._losses = losses

    @property
    def seg(self) -> Tensor:
        return self._losses["seg"]

    @property
    def depth(self) -> Tensor:
        return self._losses["depth"]

    @property
    def normal(self) -> Tensor:
        return self._losses["normal"]


def as_dict(losses: Losses) -> Any:
    return dict(losses)


def under_other_names(losses: Losses) -> Any:
    return {**{f"{task}_loss": loss for task, loss in losses.items()}, "total": sum(losses.values()), "accuracy": 0.5}


def as_dataclass(losses: Losses) -> Any:
    return Three(**losses)


def as_named_tuple(losses: Losses) -> Any:
    return Named(**losses)


def as_namespace(losses: Losses) -> Any:
    return SimpleNamespace(**losses)


def nested(losses: Losses) -> Any:
    return SimpleNamespace(
        reconstruction=losses["seg"], extra={"kl": losses["depth"], "others": [None, losses["normal"]]}
    )


def as_tuple(losses: Losses) -> Any:
    return tuple(losses.values())


def with_the_total(losses: Losses) -> Any:
    return sum(losses.values()), as_dict(losses)


def as_tensor(losses: Losses) -> Any:
    return torch.stack(list(losses.values()))


def in_lists(losses: Losses) -> Any:
    return {"seg": [losses["seg"] / 2, losses["seg"] / 2], "depth": {"a": losses["depth"]}, "normal": losses["normal"]}


def total_of(output: Any) -> Tensor:
    """The sum of all losses in an output."""
    if isinstance(output, Tensor):
        return output.sum()
    if isinstance(output, WithProperties | Three):
        return output.seg + output.depth + output.normal
    if isinstance(output, SimpleNamespace):
        return total_of(vars(output))
    if isinstance(output, Mapping):
        return total_of([value for name, value in output.items() if name not in ("total", "accuracy")])
    if isinstance(output, tuple) and isinstance(output[-1], Mapping):
        return total_of(output[-1])
    return torch.stack([total_of(one) for one in output if one is not None]).sum()


OUTPUTS: dict[str, tuple[Callable[[Losses], Any], Any]] = {
    "a dict": (as_dict, NAMES),
    "a dict with other names": (under_other_names, {task: f"{task}_loss" for task in NAMES}),
    "a dataclass": (as_dataclass, NAMES),
    "a named tuple": (as_named_tuple, NAMES),
    "a named tuple, by index": (as_named_tuple, BY_INDEX),
    "an object": (as_namespace, NAMES),
    "an object with properties": (WithProperties, NAMES),
    "losses in losses": (nested, {"seg": "reconstruction", "depth": "extra.kl", "normal": "extra.others.1"}),
    "a tuple": (as_tuple, BY_INDEX),
    "a tuple of the total and a dict": (with_the_total, {task: f"1.{task}" for task in NAMES}),
    "a tensor with a loss in each entry": (as_tensor, BY_INDEX),
    "a dict of lists of terms": (in_lists, NAMES),
}


# ---- where it is returned ----------------------------------------------------------------------------------------------


class Criterion(nn.Module):
    """Computes the losses, and packs them in some way."""

    def __init__(self, pack: Callable[[Losses], Any]) -> None:
        super().__init__()
        self.pack = pack

    def forward(self, pairs: Pairs) -> Any:
        return self.pack(losses_of(pairs))

    def compute(self, pairs: Pairs) -> Any:
        return self.forward(pairs)


class Accumulated(Metric):
    """A metric whose value in the batch is back-propagated."""

    full_state_update = False
    is_differentiable = True

    def __init__(self, pack: Callable[[Losses], Any]) -> None:
        super().__init__()
        self.pack = pack
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, pairs: Pairs) -> None:
        self.losses = losses_of(pairs)
        self.total = self.total + sum(self.losses.values()).detach()

    def compute(self) -> Any:
        return self.pack(self.__dict__.pop("losses"))


class Hidden(Automatic):
    """Returns its total alone, which it makes of what `place` returns."""

    def __init__(self, place: str = "criterion", pack: Callable[[Losses], Any] = as_dict) -> None:
        super().__init__(3)
        self.place, self.pack = place, pack
        self.criterion = Criterion(pack)
        self.wrapped = nn.ModuleDict({"inner": nn.ModuleList([nn.Identity(), Criterion(pack)])})
        self.object = PlainObject(pack)
        self.listed = [self.object.compute]
        self.mapped = {"main": self.object.compute}
        self.function = self.object.compute
        self.metrics = [Accumulated(pack)]

    def compute_losses(self, pairs: Pairs) -> Any:
        return self.pack(losses_of(pairs))

    def pairs(self, batch: Batch) -> Pairs:
        z = self.encoder(batch["x"])
        return {task: (self.get_submodule(f"{task}_head")(z), batch[task]) for task in self.tasks}

    def output(self, pairs: Pairs) -> Any:
        called = {
            "criterion": self.criterion,
            "criterion.compute": self.criterion.compute,
            "wrapped.inner.1": self.wrapped["inner"][1],
            "compute_losses": self.compute_losses,
            "object.compute": self.object.compute,
            "listed.0": self.listed[0],
            "mapped.main": self.mapped["main"],
            "function": self.function,
            "metrics.0": self.metrics[0],
        }[self.place]
        return called(pairs)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        return total_of(self.output(self.pairs(batch)))


class PlainObject:
    """No module."""

    def __init__(self, pack: Callable[[Losses], Any]) -> None:
        self.pack = pack

    def compute(self, pairs: Pairs) -> Any:
        return self.pack(losses_of(pairs))


PLACES = [
    "criterion",
    "criterion.compute",
    "wrapped.inner.1",
    "compute_losses",
    "object.compute",
    "listed.0",
    "mapped.main",
    "function",
    "metrics.0",
]


class ByHand(Hidden):
    """The same with manual optimization."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(total_of(self.output(self.pairs(batch))))
        optimizer.step()


class Weights(L.Callback):
    """Notes the weights of a callback after each batch, if it has any."""

    def __init__(self, balancing: Any) -> None:
        self.balancing = balancing
        self.weights: list[dict[str, float]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.weights.append(dict(getattr(self.balancing, "weights", {})))


def train(
    trainer: MakeTrainer, model: Any, balancing: Any, *, steps: int = STEPS, **options: Any
) -> list[dict[str, float]]:
    """Train, and check that nothing is left on the model."""
    weights, before = Weights(balancing), traces(model)
    held = (list(getattr(model, "listed", [])), dict(getattr(model, "mapped", {})))
    trainer(callbacks=[balancing, weights], **options).fit(model, Batches(vector_batches(3, steps)))
    pickle.dumps(model)  # a metric that keeps its last value keeps no hook of ours that torch would warn of
    for metric in getattr(model, "metrics", ()):
        metric.reset()
    assert_clean(model, before)
    assert held == (getattr(model, "listed", []), getattr(model, "mapped", {}))
    return weights.weights


def assert_same(found: Any, model: nn.Module, expected: Any, twin: nn.Module) -> None:
    assert len(found) == len(expected) > 1
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=0, abs=1e-9)
    own = dict(model.named_parameters())
    for name, value in twin.named_parameters():
        torch.testing.assert_close(own[name], value, rtol=0, atol=1e-9, msg=name)


def expected_of(trainer: MakeTrainer, make: Callable[..., Any], **options: Any) -> tuple[Any, Automatic]:
    """The result of the same strategy on the twin."""
    twin = Automatic(3)
    weights = train(trainer, twin, make(NAMES), **options)
    return weights, twin


@pytest.mark.each_value_once
@pytest.mark.parametrize("kind", [Hidden, ByHand])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_losses_are_found_in_any_place_and_any_container(
    output: str, place: str, kind: type[Hidden], quiet_trainer: MakeTrainer
) -> None:
    pack, tasks = OUTPUTS[output]
    expected, twin = expected_of(quiet_trainer, GradNorm)
    assert max(abs(weight - 1) for weight in expected[-1].values()) > 1e-3
    model, gradnorm = kind(place, pack), GradNorm(tasks, losses_from=place)
    found = train(quiet_trainer, model, gradnorm)
    assert_same(found, model, expected, twin)
    assert repr(gradnorm).endswith(f"losses: from {place}")


STRATEGIES: dict[str, Callable[..., Any]] = {
    "GradNorm": GradNorm,
    "FixedWeights": lambda tasks, **options: FixedWeights(
        {"seg": 0.5, "depth": 2.0, "normal": 0.5}, tasks=tasks, **options
    ),
    "UW": lambda tasks, **options: Scalarization(S.UW, tasks, **options),
    "FAMO": lambda tasks, **options: Scalarization(S.FAMO, tasks, **options),
    "UPGrad": lambda tasks, **options: Aggregation(A.UPGrad(), tasks, **options),
}


@pytest.mark.each_value_once
@pytest.mark.both_packages
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("place", ["criterion", "compute_losses", "listed.0"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_takes_losses_from_the_model(
    strategy: str, place: str, accumulate: int, quiet_trainer: MakeTrainer, package: ModuleType
) -> None:
    make, options = STRATEGIES[strategy], {"accumulate_grad_batches": accumulate, "steps": 4 * accumulate}
    expected, twin = expected_of(quiet_trainer, make, **options)
    for output in ("a dict", "a tensor with a loss in each entry"):
        pack, tasks = OUTPUTS[output]
        model = Hidden(place, pack)
        found = train(quiet_trainer, model, make(tasks, losses_from=place), **options)
        assert_same(found, model, expected, twin)


@pytest.mark.parametrize("place", ["criterion", "mapped.main"])
def test_the_monitor_takes_losses_from_the_model(place: str, quiet_trainer: MakeTrainer) -> None:
    shown = []
    for model, options in ((Hidden(place), {"losses_from": place}), (Automatic(3), {})):
        logger = MemoryLogger()
        monitor = GradientNormMonitor(NAMES, parameters="encoder.2", every_n_steps=1, **options)
        train(quiet_trainer, model, monitor, logger=logger)
        shown.append({name: values for name, values in logger.scalars.items() if name.startswith("monitor/")})
    assert len(shown[0]["monitor/norm/seg"]) == STEPS
    assert shown[0].keys() == shown[1].keys()
    for name, values in shown[1].items():
        assert shown[0][name] == pytest.approx(values, rel=0, abs=1e-9), name


# ---- a path for each task ----------------------------------------------------------------------------------------------


class OnePlaceEach(Automatic):
    """Each task's loss has its own path: a module, a method, a function."""

    def __init__(self) -> None:
        super().__init__(3)
        self.criteria = nn.ModuleDict({"seg": nn.MSELoss()})
        self.functions = {"depth": F.mse_loss}

    def normal_loss(self, *pair: Tensor) -> dict[str, Tensor]:
        return {"half": F.mse_loss(*pair) / 2, "other half": F.mse_loss(*pair) / 2}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        z = self.encoder(batch["x"])
        seg = self.criteria["seg"](self.seg_head(z), batch["seg"])
        depth = self.functions["depth"](self.depth_head(z), batch["depth"])
        return seg + depth + sum(self.normal_loss(self.normal_head(z), batch["normal"]).values())


PATHS = {"seg": "criteria.seg", "depth": "functions.depth", "normal": "normal_loss"}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_task_may_have_its_own_path(strategy: str, quiet_trainer: MakeTrainer) -> None:
    expected, twin = expected_of(quiet_trainer, STRATEGIES[strategy])
    model = OnePlaceEach()
    found = train(quiet_trainer, model, STRATEGIES[strategy](NAMES, losses_from=PATHS))
    assert_same(found, model, expected, twin)
    assert model.functions == {"depth": F.mse_loss}


# ---- when it is called -------------------------------------------------------------------------------------------------


class CalledTwice(Hidden):
    """Computes the losses of two halves of the batch."""

    def halves(self, batch: Batch) -> list[Batch]:
        return [{name: value[part] for name, value in batch.items()} for part in (slice(0, 1), slice(1, 4))]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        return torch.stack([total_of(self.output(self.pairs(half))) for half in self.halves(batch)]).sum()


class ReturnsSums(CalledTwice):
    """Its twin."""

    def training_step(self, batch: Batch, batch_idx: int) -> Losses:  # type: ignore[override]
        one, other = (losses_of(self.pairs(half)) for half in self.halves(batch))
        losses = {task: one[task] + other[task] for task in self.tasks}
        return {"loss": torch.stack(list(losses.values())).sum(), **losses}


@pytest.mark.parametrize("output", ["a dict", "a tensor with a loss in each entry"])
@pytest.mark.parametrize("place", ["criterion", "compute_losses"])
@pytest.mark.parametrize("strategy", ["GradNorm", "UW"])
def test_several_calls_in_a_batch_are_summed(
    strategy: str, place: str, output: str, quiet_trainer: MakeTrainer
) -> None:
    twin, (pack, tasks) = ReturnsSums(), OUTPUTS[output]
    expected = train(quiet_trainer, twin, STRATEGIES[strategy](NAMES))
    model = CalledTwice(place, pack)
    found = train(quiet_trainer, model, STRATEGIES[strategy](tasks, losses_from=place))
    assert_same(found, model, expected, twin)


class Evaluates(Hidden):
    """Computes the losses of other predictions without gradients too, in the training step and in validation."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        with torch.no_grad():
            before = total_of(self.output(self.pairs({name: 3 * value for name, value in batch.items()})))
        total = super().training_step(batch, batch_idx)
        with torch.inference_mode():
            self.log("change", total_of(self.output(self.pairs(batch))) - before)
        return total

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        with torch.enable_grad():
            self.log("val", total_of(self.output(self.pairs(batch))))


@pytest.mark.each_value_once
@pytest.mark.parametrize("output", ["a dict", "a tuple", "a tensor with a loss in each entry"])
@pytest.mark.parametrize("place", ["criterion", "compute_losses", "listed.0"])
@pytest.mark.parametrize("strategy", ["GradNorm", "FAMO"])
def test_calls_without_gradients_and_in_validation_are_ignored(
    strategy: str, place: str, output: str, quiet_trainer: MakeTrainer
) -> None:
    """FAMO has the losses computed once more, all without gradients."""
    expected, twin = expected_of(quiet_trainer, STRATEGIES[strategy])
    pack, tasks = OUTPUTS[output]
    model, gradnorm = Evaluates(place, pack), STRATEGIES[strategy](tasks, losses_from=place)
    weights, before = Weights(gradnorm), traces(model)
    batches = vector_batches(3, STEPS)
    trainer = quiet_trainer(callbacks=[gradnorm, weights], num_sanity_val_steps=1, val_check_interval=2)
    trainer.fit(model, Batches(batches), Batches(batches[:2]))
    assert_same(weights.weights, model, expected, twin)
    assert_clean(model, before)


class Breaks(Hidden):
    """Fails in its third batch, after its losses are known."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:  # type: ignore[override]
        total = super().training_step(batch, batch_idx)
        if batch_idx == 2:
            raise KeyError("the user's own")
        return total


@pytest.mark.parametrize("place", [place for place in PLACES if place != "metrics.0"])
def test_an_exception_leaves_the_model_as_it_was(place: str, quiet_trainer: MakeTrainer) -> None:
    model = Breaks(place)
    listed, mapped, before = list(model.listed), dict(model.mapped), traces(model)
    with pytest.raises(KeyError, match="the user's own"):
        quiet_trainer(callbacks=[GradNorm(NAMES, losses_from=place)]).fit(model, Batches(vector_batches(3, STEPS)))
    assert (model.listed, model.mapped) == (listed, mapped)
    assert_clean(model, before)


def test_a_callback_used_again_takes_the_losses_of_the_new_model(quiet_trainer: MakeTrainer) -> None:
    gradnorm, found = GradNorm(NAMES, losses_from="listed.0"), []
    for _ in range(2):
        model = Hidden("listed.0")
        found.append(train(quiet_trainer, model, gradnorm))
    assert found[0] == found[1]
    assert found[0][-1] != dict.fromkeys(NAMES, 1.0)
