"""Helpers for tests with a Trainer: a loader, recorders, and two questions (do they agree? is the model clean?)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers.logger import Logger
from models import Automatic
from textbook import Trajectory
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_gradnorm import MultiTaskModule
from lightning_gradnorm.callbacks.base import BalancingCallback


class Batches:
    """A fixed list of batches as a resumable loader: no workers, no random order."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self.batches = list(batches)
        self.start = self.handed_out = 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        start, self.start = self.start, 0
        for index in range(start, len(self.batches)):
            self.handed_out = index + 1
            yield self.batches[index]

    def state_dict(self) -> dict[str, int]:
        return {"next": self.handed_out % len(self.batches)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = state["next"]


class Recorder(L.Callback):
    """Records the current weights after each optimizer step, with `accumulate` batches per step."""

    def __init__(self, balancing: BalancingCallback[Any], accumulate: int = 1) -> None:
        self.balancing = balancing
        self.accumulate = accumulate
        self.weights: list[dict[str, float]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.accumulate == 0:
            self.weights.append(dict(self.balancing.weights))


class MemoryLogger(Logger):
    """Records logged values: `scalars["gradnorm/loss"]` has one number per logging call."""

    name = "memory"
    version = "0"

    def __init__(self) -> None:
        super().__init__()
        self.scalars: dict[str, list[float]] = {}
        self.steps: dict[str, list[int | None]] = {}

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        for key, value in metrics.items():
            self.scalars.setdefault(key, []).append(float(value))
            self.steps.setdefault(key, []).append(step)

    def at(self, key: str, steps: Sequence[int]) -> list[float]:
        """The values logged in these steps; Lightning repeats the last value in the steps between."""
        by_step = dict(zip(self.steps[key], self.scalars[key], strict=True))
        return [by_step[step] for step in steps]

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


def seed(number: int) -> None:
    """Seed the CPU's random numbers. `torch.manual_seed` formats the stack per device, which takes longer than a step."""
    torch.default_generator.manual_seed(number)


class BeforeBatch(L.Callback):
    """Calls a function with the batch's index before each training batch."""

    def __init__(self, function: Callable[[int], object]) -> None:
        self.function = function

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.function(batch_idx)


class Overflows(L.Callback):
    """Puts an infinity into the gradient of the encoder's first layer, which is not W, in some training batches."""

    def __init__(self, batches: Collection[int]) -> None:
        self.batches = batches

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx in self.batches:
            gradient = pl_module.get_parameter("encoder.0.weight").grad
            assert gradient is not None
            gradient[0, 0] = torch.inf


class Shares(L.LightningDataModule):
    """Each rank reads its share of every batch: rank r of n the r-th of n parts. Can be pickled, for spawned processes."""

    def __init__(self, batches: Sequence[Mapping[str, Tensor]]) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> Batches:
        assert self.trainer is not None
        rank, ranks = self.trainer.global_rank, self.trainer.world_size
        return Batches([{name: value.chunk(ranks)[rank] for name, value in batch.items()} for batch in self.batches])

    def teardown(self, stage: str) -> None:
        assert self.trainer is not None
        self.trainer.strategy.barrier()  # a process that leaves while another still speaks to it aborts that one


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """Encoder and heads by a name that does not depend on how the module stores them; of other modules, the whole."""
    if isinstance(model, MultiTaskModule):
        heads = {task: model.get_submodule(name) for task, name in model.task_heads.items()}
    elif not isinstance(model, Automatic):
        return {"module": model}
    else:
        heads = {task: model.get_submodule(name) for task, name in model.heads().items()}
    return {"encoder": model.get_submodule("encoder"), **heads}


def state_by_part(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, as `encoder.0.weight`, `seg.bias`."""
    return {f"{part}.{name}": v for part, module in parts(model).items() for name, v in module.state_dict().items()}


def parameters_by_part(model: nn.Module) -> dict[str, nn.Parameter]:
    """All parameters, named as in `state_by_part`."""
    return {f"{part}.{name}": p for part, module in parts(model).items() for name, p in module.named_parameters()}


def assert_agrees(
    recorder: Recorder,
    model: nn.Module,
    trajectory: Trajectory,
    twin: nn.Module,
    tolerance: float = 1e-9,
    state: Callable[[nn.Module], dict[str, Tensor]] = state_by_part,
) -> None:
    """The weights after every step, and all parameters and buffers at the end, are those of the textbook."""
    assert len(recorder.weights) == len(trajectory.weights)
    for step, (found, expected) in enumerate(zip(recorder.weights, trajectory.weights, strict=True)):
        assert found.keys() == expected.keys()
        worst = max(abs(found[task] - expected[task]) for task in expected)
        assert worst <= tolerance, f"after step {step}: {found} instead of {expected}"
    found_state, expected_state = state(model), state(twin)
    assert found_state.keys() == expected_state.keys()
    for name, expected_value in expected_state.items():
        difference = float((found_state[name] - expected_value).abs().max())
        assert difference <= tolerance, f"{name} differs by {difference}"


_LIGHTNINGS_OWN = ("_hparams",)  # made when first asked for, with or without callbacks
_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def traces(model: nn.Module) -> set[str]:
    """Everything attached to this instance that could have been put there from outside: hooks, functions, attributes."""
    found = set()
    for path, module in model.named_modules():
        found |= {f"{path}: attribute {name}" for name in vars(module) if name not in _LIGHTNINGS_OWN}
        found |= {
            f"{path}: function {name}"
            for name, v in vars(module).items()
            if callable(v) and not isinstance(v, nn.Module)
        }
        for table in _HOOK_TABLES:
            found |= {f"{path}: {table} {hook!r}" for hook in getattr(module, table, {}).values()}
        found |= {f"{path}: class {type(module).__qualname__}"}
    for name, parameter in model.named_parameters():
        for table in ("_backward_hooks", "_post_accumulate_grad_hooks"):
            found |= {f"{name}: {table} {hook!r}" for hook in (getattr(parameter, table, None) or {}).values()}
    return found


def assert_clean(model: nn.Module, before: set[str]) -> None:
    """Nothing was left on the model, and it can be pickled, copied and run."""
    left = traces(model) - before
    assert left == set(), f"left on the model: {sorted(left)}"
    for copied in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        for name, value in model.state_dict().items():
            assert torch.equal(copied.state_dict()[name], value)
        assert traces(copied) - before == set()


def case(sentence: str, *values: Any) -> Any:
    """A row of a table of wrong uses."""
    return pytest.param(*values, id=sentence)


def assert_says(error: BaseException, *expected: str) -> None:
    """The message of the error has all of `expected` in it."""
    for part in expected:
        assert part in str(error), f"{part!r} is not in the message: {error}"


class NoNumberIsAskedFor(TorchDispatchMode):
    """What would make the host wait on a GPU is an error on the CPU too: `float(tensor)`, `bool(tensor)`, `tensor.item()`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            raise AssertionError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))
