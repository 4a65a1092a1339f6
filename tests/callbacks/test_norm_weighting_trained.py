"""200 training steps with InverseNorm, LRAnnealing and NTKWeights against their equations by hand: losses of derivatives, no
heads, the gradients of a layer, of two, or of the whole network; in one process and in two."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches, Recorder, state_by_part
from models import as_inputs_and_targets, vector_batches
from norm_rules import RULES, Trained, train_by_hand
from physics import PARTS, Physics, physics_batches
from ranks import Run, Told, assert_identical, shares, train, train_each
from torch import nn

from lightning_gradnorm import Balancer, GradNorm, InverseNorm, LRAnnealing, NormWeighting, NTKWeights
from lightning_gradnorm.strategies import GradNormRule, NormWeightingRule

MakeTrainer = Callable[..., L.Trainer]
STEPS, TOLERANCE = 200, 1e-9
LAYERS: dict[str, Any] = {"a layer": "encoder.4", "two layers": ["encoder.2", "encoder.4"], "all": "all"}


def entries(model: nn.Module, named: Any) -> list[nn.Parameter]:
    if named == "all":
        return list(model.parameters())
    return [model.get_parameter(f"{name}.weight") for name in ([named] if isinstance(named, str) else named)]


@cache
def expected(name: str, layers: str, lacking: bool, steps: int = STEPS) -> Trained:
    twin = Physics()
    return train_by_hand(twin, RULES[name], physics_batches(steps, lacking=lacking), entries(twin, LAYERS[layers]))


def assert_follows(told: Told, by_hand: Trained) -> None:
    assert len(told.weights) == len(by_hand.weights)
    for step, (found, by_equations) in enumerate(zip(told.weights, by_hand.weights, strict=True)):
        assert found == pytest.approx(by_equations, rel=TOLERANCE, abs=TOLERANCE), f"step {step}"
    assert by_hand.network.keys() == told.network.keys()
    for key, value in by_hand.network.items():
        torch.testing.assert_close(told.network[key], value, rtol=0.0, atol=TOLERANCE)
    last = list(by_hand.weights[-1].values())
    assert max(last) - min(last) > 1e-2


def run(name: str, layers: str, lacking: bool, ranks: int, steps: int = STEPS) -> Run:
    batches = [shares(batch, ranks, 1) for batch in physics_batches(steps, lacking=lacking)]
    balancing = NormWeighting(RULES[name].make(), PARTS, shared_layer=LAYERS[layers])
    return Run(Physics(), balancing, batches)


TRAINED = ("InverseNorm", "InverseNorm of the total", "LRAnnealing", "NTKWeights, averaged")
"""In the fast set; `strategies/test_norm_weighting.py` follows the equations of every rule without a network."""


@pytest.mark.each_value_once
@pytest.mark.parametrize("lacking", [False, True], ids=["all present", "some absent"])
@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("name", [pytest.param(one, marks=[] if one in TRAINED else pytest.mark.slow) for one in RULES])
def test_200_steps_of_one_process_follow_the_equations(name: str, layers: str, lacking: bool) -> None:
    one = run(name, layers, lacking, ranks=1)
    (told,) = train(one.model, one.balancing, one.steps)
    assert_follows(told, expected(name, layers, lacking))


FAST = ("InverseNorm", "NTKWeights, averaged")
GROUPS = {**dict.fromkeys(FAST, FAST), "LRAnnealing": ("LRAnnealing",)}


@cache
def on_two_ranks(names: tuple[str, ...]) -> dict[str, list[Told] | str]:
    return train_each({name: run(name, "all", True, ranks=2) for name in names})


@pytest.mark.xdist_group("norm rules on two ranks")  # each group in one pair of processes
@pytest.mark.parametrize("name", [pytest.param(one, marks=[] if one in FAST else pytest.mark.slow) for one in GROUPS])
def test_200_steps_of_two_processes_follow_the_equations(name: str) -> None:
    told = on_two_ranks(GROUPS[name])[name]
    assert not isinstance(told, str), told
    assert_identical(told)
    assert_follows(told[0], expected(name, "all", True))


@pytest.mark.parametrize("name", ["InverseNorm with priorities", "LRAnnealing, L2", "NTKWeights"])
def test_a_loop_of_ones_own_follows_the_equations(name: str) -> None:
    steps = 50
    model = Physics()
    optimizer: Any = model.configure_optimizers()
    rule = NormWeightingRule(PARTS, RULES[name].make())
    weights = []
    with Balancer(model, rule, shared_layer="all") as balancer:
        for batch in physics_batches(steps, lacking=True):
            optimizer.zero_grad()
            losses = model.task_losses(batch)
            balancer.backward(losses, loss=sum(losses.values()) + model.rest())  # type: ignore[arg-type]
            optimizer.step()
            balancer.step()
            weights.append(dict(balancer.weights))
    by_hand = expected(name, "all", True, steps)
    for found, by_equations in zip(weights, by_hand.weights, strict=True):
        assert found == pytest.approx(by_equations, rel=TOLERANCE)
    for key, value in by_hand.network.items():
        torch.testing.assert_close(state_by_part(model)[key], value, rtol=0.0, atol=TOLERANCE)


def test_micro_batches_count_as_one_batch() -> None:
    batches = physics_batches(20)
    whole, halves = ([shares(batch, 1, accumulate) for batch in batches] for accumulate in (1, 2))

    class Scaled(Physics):
        def rest(self) -> torch.Tensor:
            return 0 * super().rest()

    told = [
        train(Scaled(), NormWeighting(LRAnnealing("pde", update_every=1), PARTS), steps)[0] for steps in (whole, halves)
    ]
    for one, other in zip(told[0].weights, told[1].weights, strict=True):
        assert other == pytest.approx(one, rel=TOLERANCE)


def test_a_multi_task_network_is_balanced_by_all_it_has(quiet_trainer: MakeTrainer) -> None:
    from models import multi_task_module

    model = multi_task_module(3)
    twin = copy.deepcopy(model)
    balancing = NormWeighting(NTKWeights())
    inputs, targets = as_inputs_and_targets(vector_batches(3, 1))[0]
    quiet_trainer(callbacks=[balancing], max_epochs=1).fit(model, Batches([(inputs, targets)]))
    k = {}
    for task, loss in twin.task_losses((inputs, targets)).items():
        found = torch.autograd.grad(loss, list(twin.parameters()), retain_graph=True, allow_unused=True)
        k[task] = sum(float(g.square().sum()) for g in found if g is not None) / (4 * loss.item())
    assert balancing.weights == pytest.approx({task: sum(k.values()) / one for task, one in k.items()}, rel=1e-9)


def test_at_the_activation_it_is_the_balancer_of_a_codec(quiet_trainer: MakeTrainer) -> None:
    model = Physics()
    twin = copy.deepcopy(model)
    (batch,) = physics_batches(1)
    del batch["pde"]
    formula = InverseNorm(0.999, reference=1.0, normalize=False)
    balancing = NormWeighting(formula, PARTS[1:], norm_of="activation", representation="encoder")
    model.tasks = PARTS[1:]
    quiet_trainer(callbacks=[balancing], max_epochs=1).fit(model, Batches([batch]))
    u = twin.encoder(batch["boundary"])
    start = twin.encoder(batch["initial"])
    norms = [
        (8 * u / len(u)).norm().item(),
        (0.2 * (start + torch.sin(torch.pi * batch["initial"][:, 1:])) / len(u)).norm().item(),
    ]
    assert list(balancing.weights.values()) == pytest.approx([1 / n for n in norms], rel=1e-9)


def resumed(quiet_trainer: MakeTrainer, tmp_path: Any, formula: Any, after: int) -> tuple[list[dict[str, float]], Any]:
    batches = physics_batches(8, lacking=True)
    model, balancing = Physics(), NormWeighting(formula(), PARTS)
    first = quiet_trainer(callbacks=[balancing], max_steps=after, max_epochs=1)
    first.fit(model, Batches(batches[:after]))
    first.save_checkpoint(tmp_path / "at.ckpt")
    model, balancing = Physics(seed=7), NormWeighting(formula(), PARTS[::-1])
    recorder = Recorder(balancing)
    rest = quiet_trainer(callbacks=[balancing, recorder], max_epochs=2)
    rest.fit(model, Batches(batches[after:]), ckpt_path=tmp_path / "at.ckpt")
    return recorder.weights, state_by_part(model)


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("after", [1, 4])
@pytest.mark.parametrize(
    "formula",
    [InverseNorm, lambda: LRAnnealing("pde", update_every=2), lambda: NTKWeights(0.9)],
    ids=["InverseNorm", "LRAnnealing", "NTKWeights"],
)
def test_a_resumed_run_is_bit_identical(quiet_trainer: MakeTrainer, tmp_path: Any, formula: Any, after: int) -> None:
    model, balancing = Physics(), NormWeighting(formula(), PARTS)
    recorder = Recorder(balancing)
    batches = physics_batches(8, lacking=True)
    quiet_trainer(callbacks=[balancing, recorder], max_epochs=1).fit(model, Batches(batches))
    weights, network = resumed(quiet_trainer, tmp_path, formula, after)
    assert weights == recorder.weights[after:]
    assert all(torch.equal(value, network[key]) for key, value in state_by_part(model).items())


@pytest.mark.parametrize("alpha", [0.0, 1.5])
def test_gradnorm_of_the_whole_network_is_the_textbook(quiet_trainer: MakeTrainer, alpha: float) -> None:
    steps = 40
    batches = physics_batches(steps)
    model, twin = Physics(), Physics()
    balancing = GradNorm(PARTS, shared_layer="all", alpha=alpha)
    recorder = Recorder(balancing)
    quiet_trainer(callbacks=[balancing, recorder], max_epochs=1).fit(model, Batches(batches))
    w = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer, of_weights = twin.configure_optimizers(), torch.optim.Adam([w], lr=0.025)
    first = None
    for batch, found in zip(batches, recorder.weights, strict=True):
        losses = torch.stack(list(twin.task_losses(batch).values()))
        first = losses.detach() if first is None else first
        norms = []
        for i in range(3):  # the textbook: norms of the weighted gradients, differentiated by the weights
            grads = torch.autograd.grad(w[i] * losses[i], list(twin.parameters()), create_graph=True, allow_unused=True)
            norms.append(torch.cat([g.flatten() for g in grads if g is not None]).norm())
        G = torch.stack(norms)
        ratios = losses.detach() / first
        target = (G.mean() * (ratios / ratios.mean()) ** alpha).detach()
        (of_w,) = torch.autograd.grad((G - target).abs().sum(), w, retain_graph=True)
        optimizer.zero_grad()
        ((w.detach() * losses).sum() + twin.rest()).backward()
        optimizer.step()
        w.grad = of_w
        of_weights.step()
        with torch.no_grad():
            w.clamp_(min=1e-4).mul_(3 / w.sum())
        assert list(found.values()) == pytest.approx(w.tolist(), rel=0.0, abs=TOLERANCE)
    for key, value in state_by_part(twin).items():
        torch.testing.assert_close(state_by_part(model)[key], value, rtol=0.0, atol=TOLERANCE)


def test_gradnorm_in_a_loop_of_ones_own_takes_several_layers() -> None:
    model = Physics()
    (batch,) = physics_batches(1)
    with Balancer(model, GradNormRule(PARTS, alpha=0.0), shared_layer=["encoder.0", "encoder.4"]) as balancer:
        balancer.backward(model.task_losses(batch))
        balancer.step()
        last = balancer.rule.last  # type: ignore[attr-defined]
    twin = Physics()
    W = entries(twin, ["encoder.0", "encoder.4"])
    for n, loss in zip(last.norms.tolist(), twin.task_losses(batch).values(), strict=True):
        found = torch.autograd.grad(loss, W)
        assert n == pytest.approx(sum(float(g.square().sum()) for g in found) ** 0.5, rel=1e-12)
