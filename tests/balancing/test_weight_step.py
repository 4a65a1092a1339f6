"""One step of the weights: Adam on tensors alone is torch's Adam, and the host need not look at a number."""

from __future__ import annotations

import traceback
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches
from models import TASKS, Automatic, vector_batches
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

import lightning_gradnorm
from lightning_gradnorm import GradNorm
from lightning_gradnorm.balancing import GradNormRule
from lightning_gradnorm.balancing.weight_step import AdamStep, WeightStep, weight_step

F64 = torch.float64
PACKAGE = str(Path(lightning_gradnorm.__file__).parent)


class General(torch.optim.Adam):
    """Adam by another name, so that it is moved as any optimizer is."""


@pytest.mark.parametrize(
    "options", [{"lr": 0.025}, {"lr": 0.3, "betas": (0.5, 0.9), "eps": 1e-3}, {"betas": (0.0, 0.5)}]
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-13), (torch.float32, 2e-6)])
def test_adam_on_tensors_alone_is_torchs_adam(options: Any, dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.full((4,), 2.0, dtype=dtype).requires_grad_() for _ in range(2)]
    ours = weight_step(weights[0], partial(torch.optim.Adam, **options))
    theirs = torch.optim.Adam([weights[1]], **options)
    assert type(ours) is AdamStep
    for _ in range(200):
        gradient = torch.randn(4, generator=generator, dtype=dtype) * 10 ** float(torch.randn((), generator=generator))
        with torch.no_grad():
            assert ours.move(gradient, torch.zeros(4), None, lambda before, moved: moved)
        weights[1].grad = gradient.clone()
        theirs.step()
        torch.testing.assert_close(*weights, rtol=tolerance, atol=tolerance)
    state, expected = ours.state_dict()["state"][0], theirs.state_dict()["state"][0]
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=10 * tolerance, atol=0.0, check_dtype=False)


def test_the_state_of_torchs_adam_and_of_ours_can_take_each_others_place() -> None:
    steps = torch.rand(20, 2, 3, dtype=F64, generator=torch.Generator().manual_seed(1)) + 0.1
    makers = {"ours": torch.optim.Adam, "general": General}
    rules = {name: GradNormRule("abc", optimizer=partial(maker, lr=0.1), dtype=F64) for name, maker in makers.items()}
    assert [type(rule._step) for rule in rules.values()] == [AdamStep, WeightStep]
    for norms, losses in steps[:10]:
        for rule in rules.values():
            rule.step(norms, losses)
    exchanged = {
        name: GradNormRule("abc", optimizer=partial(maker, lr=0.1), dtype=F64) for name, maker in makers.items()
    }
    exchanged["ours"].load_state_dict(rules["general"].state_dict())
    exchanged["general"].load_state_dict(rules["ours"].state_dict())
    for norms, losses in steps[10:]:
        for rule in (*rules.values(), *exchanged.values()):
            rule.step(norms, losses)
    first, *others = (rule.weights.detach() for rule in (*rules.values(), *exchanged.values()))
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-11, atol=0.0)


@pytest.mark.parametrize("option", ["weight_decay", "amsgrad", "maximize"])
def test_an_adam_with_more_to_it_is_left_to_torch(option: str) -> None:
    made = weight_step(torch.ones(2).requires_grad_(), partial(torch.optim.Adam, **{option: True}))
    assert type(made) is WeightStep


def test_an_adam_that_somebody_watches_is_left_to_torch() -> None:
    def watched(parameters: Any) -> torch.optim.Optimizer:
        adam = torch.optim.Adam(parameters)
        adam.register_step_post_hook(lambda *_: None)
        return adam

    assert type(weight_step(torch.ones(2).requires_grad_(), watched)) is WeightStep


# ---- the host ----------------------------------------------------------------------------------------------------------

LOOKS = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::masked_select"}
"""What makes the host wait for a GPU: reading a number, and whatever has a size that depends on numbers."""


class Waits(TorchDispatchMode):
    """Notes which code of ours asks for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in LOOKS:
            ours = [one for one in traceback.extract_stack() if one.filename.startswith(PACKAGE)]
            if ours:
                self.places.append(f"{Path(ours[-1].filename).name}:{ours[-1].lineno} {func._schema.name}")
        return func(*args, **(kwargs or {}))


def test_a_step_with_absent_tasks_or_bad_numbers_makes_nobody_wait() -> None:
    rule, looking = (GradNormRule("abc", initial_losses=dict.fromkeys("abc", 1.0)) for _ in range(2))
    rule.looks_at_once = False
    one, some = torch.ones(3), torch.tensor([True, False, True])
    steps: list[tuple[Tensor, Tensor, Tensor | None]] = [
        (torch.tensor([1.0, 2.0, 3.0]), one, None),
        (torch.tensor([1.0, torch.nan, 3.0]), one, some),
        (torch.tensor([1.0, torch.nan, 3.0]), one, None),
        (one, torch.tensor([1.0, -1.0, 1.0]), None),
        (torch.tensor([1.0, 2.0, 3.0]), 2 * one, some),
    ]
    rule.step(one, one)  # L_i(0) is looked at once
    looking.step(one, one)
    with Waits() as waits:
        for step in steps:
            rule.step(*step)
            rule.note_step()
    assert waits.places == []
    with Waits() as waits:
        assert rule.skipped == 2
        assert list(rule.culprits) == ["b"]
    assert waits.places, "what would be seen is seen"
    for step in steps:
        looking.step(*step)
        looking.note_step()
    assert torch.equal(rule.weights, looking.weights)
    assert (looking.skipped, looking.culprits) == (rule.skipped, rule.culprits)
    assert rule.last is not None
    assert torch.equal(rule.last.losses, 2 * one)
    assert torch.equal(rule.mean_weights, looking.mean_weights)


class OffTheHost(L.Callback):
    """Trains from the second batch on as if the weights were on a GPU, and notes who waits for them."""

    def __init__(self, gradnorm: GradNorm) -> None:
        self.gradnorm, self.waits = gradnorm, Waits()

    @override
    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            assert self.gradnorm._rule is not None
            self.gradnorm._rule.looks_at_once = False
            self.waits.__enter__()

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 5:
            self.waits.__exit__(None, None, None)


@pytest.mark.parametrize("with_heads", [True, False])
@pytest.mark.parametrize("norm_of", ["weight", "activation"])
def test_between_batches_the_callback_reads_no_number(quiet_trainer: Any, with_heads: bool, norm_of: Any) -> None:
    model = Automatic(3)
    gradnorm = GradNorm(TASKS[:3], heads=model.heads() if with_heads else None, norm_of=norm_of)
    watching = OffTheHost(gradnorm)
    trainer = quiet_trainer(callbacks=[gradnorm, watching], max_epochs=1, log_every_n_steps=100)
    trainer.fit(model, Batches(vector_batches(3, 8)))
    assert watching.waits.places == []
    assert gradnorm.weights != dict.fromkeys(TASKS[:3], 1.0)
