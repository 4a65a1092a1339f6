"""`Balancer` in a plain loop gives the textbook's numbers, and those of scalarizers and aggregators by hand."""

from __future__ import annotations

from functools import partial
from typing import Any

import by_hand
import pytest
import textbook
import torch
from loops import Network, distance, divide_in_backward, gradnorm_rule, parameter_distance, train
from models import TASKS, Batch, network_sgd, vector_batches
from torch import Tensor
from torch.nn import functional as F
from torchjd import aggregation as A
from torchjd import scalarization as S

from lightning_gradnorm import Balancer
from lightning_gradnorm.strategies import AggregationRule, FixedRule, GradNormRule, ScalarizationRule

STEPS = 12


def by_textbook(
    T: int, batches: list[Batch], accumulate: int = 1, moved: float = 0.1, **options: Any
) -> tuple[Network, list[dict]]:
    model = Network(T)
    run = textbook.train(
        model,
        model.forward_for_textbook,
        batches,
        [model.encoder[2].weight],
        network_sgd(model.parameters()),
        alpha=1.2,
        accumulate=accumulate,
        **options,
    )
    assert max(abs(weight - 1) for weight in run.weights[-1].values()) > moved  # it has balanced something
    return model, run.weights


def assert_equal(
    model: Network, weights: list[dict], expected: tuple[Network, list[dict]], bound: float = 1e-9
) -> None:
    assert distance(weights, expected[1]) <= bound
    assert parameter_distance(model, expected[0]) <= bound


@pytest.mark.each_value_once
@pytest.mark.parametrize("heads", ["mapping", None, "auto"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("T", [2, 3, 6])
def test_a_plain_loop_agrees_with_the_textbook(T: int, accumulate: int, heads: Any) -> None:
    batches, model = vector_batches(T, STEPS * accumulate), Network(T)
    heads = model.heads() if heads == "mapping" else heads
    weights, _ = train(model, gradnorm_rule(T), batches, accumulate=accumulate, heads=heads)
    assert_equal(model, weights, by_textbook(T, batches, accumulate))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch.compile's own
@pytest.mark.filterwarnings("ignore:`torch.jit.script")
@pytest.mark.parametrize("with_heads", [True, False])
def test_a_compiled_model_agrees_with_the_textbook(with_heads: bool) -> None:
    batches, model = vector_batches(3, STEPS), Network()
    compiled = torch.compile(model, backend="aot_eager")
    weights, _ = train(compiled, gradnorm_rule(), batches, heads=model.heads() if with_heads else None)
    assert_equal(model, weights, by_textbook(3, batches))


# ---- accumulation ----------------------------------------------------------------------------------------------------


def _undivided(balancer: Balancer, losses: dict[str, Tensor], n: int) -> None:
    balancer.backward(losses)


def _divided_total(balancer: Balancer, losses: dict[str, Tensor], n: int) -> None:
    balancer.backward(losses, loss=sum(losses.values()) / n)


def _divided_losses(balancer: Balancer, losses: dict[str, Tensor], n: int) -> None:
    balancer.backward({task: loss / n for task, loss in losses.items()})


def _watched(balancer: Balancer, losses: dict[str, Tensor], n: int) -> None:
    balancer.watch(losses)
    balancer.backward(loss=sum(losses.values()), backward=lambda loss: (loss / n).backward())


def _prepared(balancer: Balancer, losses: dict[str, Tensor], n: int) -> None:
    (balancer.prepare_loss(losses) / n).backward()


@pytest.mark.parametrize("form", [divide_in_backward, _watched, _prepared])
def test_micro_batches_are_averaged_when_backward_divides(form: Any) -> None:
    batches, model = vector_batches(3, STEPS * 3), Network()
    weights, _ = train(model, gradnorm_rule(), batches, accumulate=3, backpropagate=form, heads=model.heads())
    assert_equal(model, weights, by_textbook(3, batches, 3))


@pytest.mark.parametrize("form", [_undivided])
def test_undivided_micro_batches_give_the_same_task_weights(form: Any) -> None:
    """The network's gradient is then n times the mean, as without a Balancer; a learning rate of 1/n makes up for it."""
    batches, model = vector_batches(3, STEPS * 3), Network()
    slower = torch.optim.SGD(model.parameters(), lr=0.02 / 3, momentum=0.9)
    options: dict[str, Any] = {"accumulate": 3, "backpropagate": form, "optimizer": slower}
    weights, _ = train(model, gradnorm_rule(), batches, **options)
    assert_equal(model, weights, by_textbook(3, batches, 3))


@pytest.mark.parametrize("form", [_divided_total, _divided_losses])
def test_a_division_of_the_losses_is_a_coefficient_of_the_tasks(form: Any) -> None:
    """All norms are then a third of the textbook's, which only changes Adam's steps through its epsilon."""
    batches, model, scaled = vector_batches(3, STEPS * 3), Network(), torch.optim.SGD
    weights, _ = train(model, gradnorm_rule(), batches, accumulate=3, backpropagate=form)
    assert_equal(model, weights, by_textbook(3, batches, 3), bound=1e-6)
    # With SGD it can be made up for by the learning rate, exactly.
    model = Network()
    rule = gradnorm_rule(optimizer=partial(scaled, lr=0.18))
    weights, _ = train(model, rule, batches, accumulate=3, backpropagate=form)
    assert_equal(model, weights, by_textbook(3, batches, 3, weight_optimizer=partial(scaled, lr=0.06)))


def test_coefficients_and_a_regularizer_come_from_the_given_loss() -> None:
    coefficients, batches = {"seg": 2.0, "depth": 0.5, "normal": 1.25}, vector_batches(3, STEPS * 2)

    def penalty(model: Network) -> Tensor:
        return 0.01 * torch.stack([p.square().sum() for p in model.parameters()]).sum()

    class Regularized(Network):
        def forward_for_textbook(self, batch: Batch) -> textbook.Forward:
            given = super().forward_for_textbook(batch)
            given.rest = penalty(self)
            return given

    def backpropagate(balancer: Balancer, losses: dict[str, Tensor], n: int) -> None:
        total = sum(coefficients[task] * loss for task, loss in losses.items()) + penalty(model)
        balancer.backward(losses, loss=total, backward=lambda loss: (loss / n).backward())

    model, expected = Network(), Regularized()
    found, _ = train(model, gradnorm_rule(), batches, accumulate=2, backpropagate=backpropagate, heads=model.heads())
    run = textbook.train(
        expected,
        expected.forward_for_textbook,
        batches,
        [expected.encoder[2].weight],
        network_sgd(expected.parameters()),
        alpha=1.2,
        accumulate=2,
        coefficients=coefficients,
    )
    assert_equal(model, found, (expected, run.weights))


@pytest.mark.parametrize("as_none", [True, False])
def test_an_absent_task_takes_no_part(as_none: bool) -> None:
    """In every third batch there is no depth: `None`, or no entry."""
    batches = vector_batches(3, STEPS)
    for batch in batches[2::3]:
        del batch["depth"]
    sgd = partial(torch.optim.SGD, lr=0.03)  # an optimizer without state, which the textbook needs here
    expected = Network()
    run = textbook.train(
        expected,
        expected.forward_for_textbook,
        batches,
        [expected.encoder[2].weight],
        network_sgd(expected.parameters()),
        alpha=1.2,
        weight_optimizer=sgd,
        tasks=TASKS[:3],
    )

    def backpropagate(balancer: Balancer, losses: dict[str, Tensor], n: int) -> None:
        balancer.backward({**dict.fromkeys(TASKS[:3]), **losses} if as_none else losses)

    model = Network()
    # What torch's SGD does with a parameter without a gradient: nothing. The textbook's gradient is None as well.
    found, _ = train(model, gradnorm_rule(optimizer=sgd), batches, backpropagate=backpropagate, heads=model.heads())
    assert_equal(model, found, (expected, run.weights))


@pytest.mark.parametrize("with_heads", [True, False])
@pytest.mark.parametrize("schedule", [{"update_every": 3}, {"stop_after": 7}, {"initial_losses": 4}], ids=str)
def test_schedules_of_the_rule_agree_with_the_textbook(schedule: dict[str, int], with_heads: bool) -> None:
    batches, model = vector_batches(3, STEPS * 2), Network()
    options: dict[str, Any] = {"accumulate": 2, "heads": model.heads() if with_heads else None}
    weights, _ = train(model, gradnorm_rule(**schedule), batches, **options)
    assert_equal(model, weights, by_textbook(3, batches, 2, moved=0.05, **schedule))


def test_norms_at_the_representation_agree_with_the_textbook() -> None:
    batches, model = vector_batches(3, STEPS * 2), Network()
    weights, _ = train(model, gradnorm_rule(), batches, accumulate=2, heads=model.heads(), norm_of="activation")
    assert_equal(model, weights, by_textbook(3, batches, 2, norm_of="activation"))


# ---- other rules -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulate", [1, 2])
def test_uncertainty_weighting_agrees_with_by_hand(accumulate: int) -> None:
    batches, model, expected = vector_batches(3, STEPS * accumulate), Network(), Network()
    rule = ScalarizationRule(TASKS[:3], S.UW(3))
    weights, _ = train(model, rule, batches, accumulate=accumulate)
    scalarizer = S.UW(3).double()
    optimizer = network_sgd(expected.parameters())
    found = by_hand.scalarize(
        expected,
        expected.forward_for_textbook,
        batches,
        scalarizer,
        optimizer,
        tasks=TASKS[:3],
        accumulate=accumulate,
    )
    assert_equal(model, weights, (expected, found.weights), bound=1e-8)
    assert max(abs(weight - 1) for weight in weights[-1].values()) > 0.05


@pytest.mark.parametrize("with_heads", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_upgrad_agrees_with_by_hand(accumulate: int, with_heads: bool) -> None:
    batches, model, expected = vector_batches(3, STEPS * accumulate), Network(), Network()
    heads = model.heads() if with_heads else None
    rule = AggregationRule(TASKS[:3], A.UPGrad())
    weights, _ = train(model, rule, batches, accumulate=accumulate, heads=heads)
    found = by_hand.aggregate(
        expected,
        expected.forward_for_textbook,
        batches,
        A.UPGrad(),
        network_sgd(expected.parameters()),
        tasks=TASKS[:3],
        accumulate=accumulate,
    )
    assert_equal(model, weights, (expected, found.weights), bound=1e-8)


def test_fixed_weights_match_a_weighted_sum() -> None:
    batches, model, expected = vector_batches(3, STEPS), Network(), Network()
    given = {"seg": 0.5, "depth": 2.0, "normal": 1.0}
    weights, state = train(model, FixedRule(given), batches)
    optimizer = network_sgd(expected.parameters())
    for batch in batches:
        optimizer.zero_grad()
        torch.stack([given[task] * loss for task, loss in expected(batch).items()]).sum().backward()
        optimizer.step()
    assert parameter_distance(model, expected) <= 1e-12
    assert weights[-1] == given
    assert state == {}


def test_dwa_works_by_epochs() -> None:
    batches, model, expected = vector_batches(3, 6), Network(), Network()
    optimizer, found = network_sgd(model.parameters()), []
    with Balancer(model, ScalarizationRule(TASKS[:3], S.DWA())) as balancer:
        for _ in range(4):
            for batch in batches:
                optimizer.zero_grad()
                balancer.backward(model(batch))
                optimizer.step()
                balancer.step()
                found.append(balancer.weights)
            balancer.end_epoch()
    hand = by_hand.scalarize(
        expected,
        expected.forward_for_textbook,
        batches,
        S.DWA(),
        network_sgd(expected.parameters()),
        tasks=TASKS[:3],
        epochs=4,
    )
    assert_equal(model, found, (expected, hand.weights), bound=1e-8)
    assert found[-1] != found[0]


def test_famo_is_given_the_losses_after_the_step() -> None:
    batches, model, expected = vector_batches(3, STEPS), Network(), Network()
    rule = ScalarizationRule(TASKS[:3], S.FAMO(3))
    weights, _ = train(
        model, rule, batches, step=lambda balancer, batch: balancer.step(losses_after_step=lambda: model(batch))
    )
    hand = by_hand.scalarize(
        expected,
        expected.forward_for_textbook,
        batches,
        S.FAMO(3).double(),
        network_sgd(expected.parameters()),
        tasks=TASKS[:3],
    )
    assert_equal(model, weights, (expected, hand.weights), bound=1e-8)


@pytest.mark.parametrize("make", [lambda: A.NashMTL(3, max_norm=0.0, optim_niter=5), A.GradVac, A.MGDA])
def test_other_aggregations_run(make: Any) -> None:
    try:
        aggregator = make()
    except ImportError as reason:
        pytest.skip(str(reason))
    model, before = Network(), Network()
    train(model, AggregationRule(TASKS[:3], aggregator), vector_batches(3, 5), heads=model.heads())
    assert 1e-4 < parameter_distance(model, before) < 10


# ---- precision -------------------------------------------------------------------------------------------------------


class Single(Network):
    """In single precision."""

    def __init__(self) -> None:
        super().__init__()
        self.float()


def _single_batches(count: int = 50) -> list[Batch]:
    return [{name: value.float() for name, value in batch.items()} for batch in vector_batches(3, count)]


def _with_scaler(heads: bool, overflows: set[int], accumulate: int = 1) -> list[dict[str, float]]:
    model, batches = Single(), _single_batches()
    optimizer = network_sgd(model.parameters())
    scaler, found = torch.amp.GradScaler("cpu", init_scale=2.0**12), []
    with Balancer(model, gradnorm_rule(), heads=model.heads() if heads else None) as balancer:
        for index, batch in enumerate(batches):
            with torch.autocast("cpu", torch.float16):
                losses = model(batch)
            balancer.backward(losses, backward=lambda loss: scaler.scale(loss / accumulate).backward())
            if (index + 1) % accumulate:
                continue
            if index in overflows:
                model.encoder[0].weight.grad[0, 0] = torch.inf
            before = model.encoder[0].weight.detach().clone()
            scaler.step(optimizer)
            assert torch.equal(before, model.encoder[0].weight) == (index in overflows)
            balancer.step(scaler=scaler)
            scaler.update()
            optimizer.zero_grad()
            found.append(balancer.weights)
    return found


def _rows(weights: list[dict[str, float]]) -> Tensor:
    return torch.tensor([list(one.values()) for one in weights])


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("heads", [True, False])
def test_half_precision_with_a_scaler_follows_single_precision(heads: bool, accumulate: int) -> None:
    single, _ = train(Single(), gradnorm_rule(), _single_batches(), accumulate=accumulate)
    assert (_rows(single)[-1] - 1).abs().max() > 0.1
    torch.testing.assert_close(_rows(_with_scaler(heads, set(), accumulate)), _rows(single), rtol=0.01, atol=0)


def test_a_step_that_the_scaler_skips_changes_no_weight() -> None:
    skipped = {3, 17, 18}
    weights = _rows(_with_scaler(True, skipped))
    moved = (weights[1:] - weights[:-1]).abs().sum(dim=1)
    assert {step for step in range(1, len(weights)) if moved[step - 1] == 0} == skipped


def test_a_scaler_in_double_precision_changes_nothing() -> None:
    """Scales are powers of two, but grow between the steps: the norms are those of unscaled gradients."""
    batches, model = vector_batches(3, STEPS * 2), Network()
    optimizer, scaler = network_sgd(model.parameters()), torch.amp.GradScaler("cpu", growth_interval=3)
    found = []
    with Balancer(model, gradnorm_rule(), heads=model.heads()) as balancer:
        for index, batch in enumerate(batches):
            balancer.backward(model(batch), backward=lambda loss: scaler.scale(loss / 2).backward())
            if index % 2:
                scaler.step(optimizer)
                balancer.step(scaler=scaler)
                scaler.update()
                optimizer.zero_grad()
                found.append(balancer.weights)
    assert_equal(model, found, by_textbook(3, batches, 2))


def test_losses_of_any_shape_count_with_their_means() -> None:
    found = []
    for each in (False, True):
        model = Network()
        optimizer = network_sgd(model.parameters())
        with Balancer(model, gradnorm_rule()) as balancer:
            for batch in vector_batches(3, 5):
                optimizer.zero_grad()
                z = model.encoder(batch["x"])
                errors = {t: (model.get_submodule(h)(z) - batch[t]).square() for t, h in model.heads().items()}
                balancer.backward({t: error.mean(1) if each else error.mean() for t, error in errors.items()})
                optimizer.step()
                balancer.step()
            found.append(balancer.weights)
    assert found[1] == pytest.approx(found[0], rel=0, abs=1e-9)
    assert max(abs(weight - 1) for weight in found[0].values()) > 1e-3


def test_weights_are_double_only_for_a_double_network() -> None:
    for model, dtype in ((Network(), torch.float64), (Single(), torch.float32)):
        rule = GradNormRule(TASKS[:3])
        with Balancer(model, rule):
            assert rule.weights.dtype == dtype


def test_a_loss_of_double_precision_makes_the_weights_double() -> None:
    model, rule = Single(), gradnorm_rule()
    with Balancer(model, rule) as balancer:
        for batch in _single_batches(3):
            z = model.encoder(batch["x"])
            heads = {task: getattr(model, f"{task}_head")(z).double() for task in model.tasks}
            balancer.backward({task: F.mse_loss(said, batch[task].double()) for task, said in heads.items()})
            balancer.step()
    assert rule.weights.dtype == torch.float64
