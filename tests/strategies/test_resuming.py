"""Resuming with options that differ from the checkpoint's: which ones win, what is reported, and errors change nothing."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import Batches
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Automatic, vector_batches
from torch import Tensor
from torchjd import aggregation as A
from torchjd import scalarization as S

from lightning_gradnorm import GradNorm
from lightning_gradnorm.strategies import AggregationRule, FixedRule, GradNormRule, ScalarizationRule
from lightning_gradnorm.strategies.weight_optimizer import MaskedAdam

F64 = torch.float64
NAMES = ["seg", "depth", "normal"]
adam, adamw, sgd = torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD


def steps_of(*rules: GradNormRule, count: int = 6, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        norms, losses = torch.rand(2, 3, generator=generator, dtype=F64) + 0.2
        for rule in rules:
            rule.step(norms, losses)
            rule.count_step()


def rule_with(optimizer: Any = adam, **options: Any) -> GradNormRule:
    given = {
        name: options.pop(name) for name in ("lr", "momentum", "betas", "amsgrad", "weight_decay") if name in options
    }
    return GradNormRule(NAMES, optimizer=partial(optimizer, **{"lr": 0.025, **given}), dtype=F64, **options)


def trained(*args: Any, **options: Any) -> GradNormRule:
    rule = rule_with(*args, **options)
    steps_of(rule)
    return rule


@contextmanager
def says(*expected: str) -> Iterator[None]:
    """So many warnings of ours are given, in this order, each with its text in it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    told = [str(one.message) for one in caught if str(one.message).startswith("GradNorm: ")]
    assert len(told) == len(expected), told
    for message, part in zip(told, expected, strict=True):
        assert part in message


def group_of(rule: GradNormRule) -> dict[str, Any]:
    return rule._step.optimizer.param_groups[0]


OPTIONS: dict[str, tuple[Any, Any, str]] = {
    "lr": (0.025, 0.1, "lr of the weights' optimizer is 0.025 in the checkpoint and 0.1 here"),
    "betas": (
        (0.9, 0.999),
        (0.5, 0.9),
        "betas of the weights' optimizer is (0.9, 0.999) in the checkpoint and (0.5, 0.9) here",
    ),
    "weight_decay": (0, 0.1, "weight_decay of the weights' optimizer is 0 in the checkpoint and 0.1 here"),
}


@pytest.mark.parametrize("resume_options", ["checkpoint", "given"])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_different_optimizer_option_is_reported_and_one_of_the_two_is_used(option: str, resume_options: Any) -> None:
    old, new, told = OPTIONS[option]
    first = trained(**{option: old})
    resumed = rule_with(**{option: new}, resume_options=resume_options)
    in_force = "the checkpoint's applies" if resume_options == "checkpoint" else "this run's applies"
    with says(f"{told}; {in_force}"):
        resumed.load_state_dict(first.state_dict())
    assert group_of(resumed)[option] == (old if resume_options == "checkpoint" else new)
    # The moments are kept in either case: it continues as torch's own optimizer would.
    oracle = first.weights.detach().clone().requires_grad_()
    optimizer = adam([oracle], **{"lr": 0.025, option: new if resume_options == "given" else old})
    state = copy.deepcopy(first.state_dict()["optimizer"])
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    before = resumed.weights.detach().clone()
    gradient = resumed.step(*torch.rand(2, 3, dtype=F64) + 0.2).terms.gradient
    oracle.grad = gradient
    optimizer.step()
    assert not torch.equal(before, resumed.weights.detach())
    torch.testing.assert_close(
        resumed.weights.detach(), 3 * oracle.detach() / oracle.detach().sum(), rtol=1e-12, atol=0.0
    )


def test_momentum_is_reported_and_a_checkpoint_without_it_has_none_to_keep() -> None:
    first = trained(sgd, lr=0.05)
    for resume_options, in_force in (("checkpoint", 0), ("given", 0.9)):
        resumed = rule_with(sgd, lr=0.05, momentum=0.9, resume_options=resume_options)
        with says("momentum of the weights' optimizer is 0 in the checkpoint and 0.9 here"):
            resumed.load_state_dict(first.state_dict())
        assert group_of(resumed)["momentum"] == in_force
        steps_of(resumed)


def test_several_options_are_reported_one_by_one() -> None:
    first, resumed = trained(), rule_with(lr=0.1, betas=(0.5, 0.9), initial_losses=20)
    with says("initial_losses is {'seg': 'mean of 1'", "betas of", "lr of"):
        resumed.load_state_dict(first.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.1},
        {"min_weight": 0.2},
        {"update_every": 3},
        {"stop_after": 9},
        {"priorities": dict.fromkeys(NAMES, 2.0)},
    ],
    ids=str,
)
def test_options_that_are_no_part_of_a_checkpoint_are_the_given_ones(options: dict[str, Any]) -> None:
    first, resumed = trained(), rule_with(**options)
    with says():
        resumed.load_state_dict(first.state_dict())


def test_a_value_changed_by_a_scheduler_is_not_a_different_option() -> None:
    first = trained()
    group_of(first)["lr"] = 0.001
    resumed, changed = rule_with(), rule_with(lr=0.1, resume_options="given")
    with says():
        resumed.load_state_dict(first.state_dict())
    assert group_of(resumed)["lr"] == 0.001
    with says("lr of the weights' optimizer is 0.025 in the checkpoint and 0.1 here"):
        changed.load_state_dict(first.state_dict())
    assert group_of(changed)["lr"] == 0.1
    again = rule_with()  # what is in force goes into the next checkpoint
    with says("lr of the weights' optimizer is 0.1 in the checkpoint and 0.025 here"):
        again.load_state_dict(changed.state_dict())


@pytest.mark.parametrize("resume_options", ["checkpoint", "given"])
@pytest.mark.parametrize(("first_has", "second_has"), [(True, False), (False, True)])
def test_amsgrad_is_used_as_requested_and_needs_its_own_moments(
    first_has: bool, second_has: bool, resume_options: Any
) -> None:
    first = trained(amsgrad=first_has)
    resumed, whole = rule_with(amsgrad=second_has, resume_options=resume_options), rule_with(amsgrad=first_has)
    whole.load_state_dict(first.state_dict())
    anew = ["the moments of the weights' optimizer start over"] if resume_options == "given" else []
    with says("amsgrad of the weights' optimizer", *anew):
        resumed.load_state_dict(first.state_dict())
    in_force = first_has if resume_options == "checkpoint" else second_has
    assert group_of(resumed)["amsgrad"] == in_force
    assert isinstance(resumed._step, MaskedAdam) != in_force
    steps_of(resumed, whole, seed=1)
    assert torch.equal(resumed.weights, whole.weights) == (resume_options == "checkpoint")


# ---- another class of optimizer ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("other", [adamw, sgd, torch.optim.RMSprop, torch.optim.Adagrad], ids=lambda one: one.__name__)
def test_the_state_of_another_class_is_refused_by_name(other: Any) -> None:
    rule = rule_with(other)
    before = rule.state_dict()
    with pytest.raises(
        ValueError, match=rf"GradNorm: .* moved by Adam, but this run's optimizer is {other.__name__}\. .*'given'"
    ):
        rule.load_state_dict(trained().state_dict())
    assert_same(rule.state_dict(), before)


@pytest.mark.parametrize(
    ("other", "keeps"),
    [(adamw, True), (torch.optim.RAdam, True), (torch.optim.NAdam, False), (sgd, False), (torch.optim.Adagrad, False)],
)
def test_with_the_given_options_another_class_keeps_the_moments_that_fit(other: Any, keeps: bool) -> None:
    first, rule = trained(), rule_with(other, lr=0.01, resume_options="given")
    anew = [] if keeps else [f"the moments of the weights' optimizer start over: {other.__name__} has different ones"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rule.load_state_dict(first.state_dict())
    told = [str(one.message) for one in caught]
    assert "the class of the weights' optimizer is Adam in the checkpoint" in told[0]
    assert [any(part in one for one in told) for part in anew] == [True] * len(anew)
    assert type(rule._step.optimizer) is other
    assert group_of(rule)["lr"] == 0.01
    assert torch.equal(rule.weights, first.weights)
    found = rule._step.optimizer.state.get(rule.weights, {})
    if keeps:
        assert torch.equal(found["exp_avg"], first.state_dict()["optimizer"]["state"][0]["exp_avg"])
    steps_of(rule)


def test_a_checkpoint_that_does_not_name_its_optimizer_still_loads() -> None:
    first = trained()
    state = as_of_an_older_version(first.state_dict())
    resumed, changed, momentum = rule_with(), rule_with(lr=0.1), rule_with(sgd, momentum=0.9)
    with says():
        resumed.load_state_dict(state)
    steps_of(first, resumed, seed=1)
    assert torch.equal(first.weights, resumed.weights)
    with says("lr of the weights' optimizer is 0.025 in the checkpoint and 0.1 here"):
        changed.load_state_dict(state)
    with pytest.raises(ValueError, match="moved by another optimizer, but this run's optimizer is SGD"):
        momentum.load_state_dict(state)


def as_of_an_older_version(state: dict[str, Any]) -> dict[str, Any]:
    optimizer = {name: one for name, one in state["optimizer"].items() if name not in ("class", "given")}
    older = {name: one for name, one in state.items() if name not in ("kind", "initial_weights", "updates_in_initial")}
    return {**older, "optimizer": optimizer}


# ---- L_i(0) and the weights to begin with --------------------------------------------------------------------------------

LOSSES = torch.tensor([4.0, 2.0, 8.0], dtype=F64)


def with_first_losses(given: Any, updates: int = 1, **options: Any) -> GradNormRule:
    rule = rule_with(initial_losses=given, **options)
    for _ in range(updates):
        rule.step(torch.ones(3, dtype=F64), LOSSES)
    return rule


@pytest.mark.parametrize("older", [False, True], ids=["", "of an older version"])
@pytest.mark.parametrize(
    ("first", "second", "told", "given"),
    [
        (1, {"seg": 1.0}, "{'seg': 'mean of 1'}", [1.0, 2.0, 8.0]),
        ({"seg": 1.0}, {"seg": 3.0}, "{'seg': 1.0} in the checkpoint and {'seg': 3.0} here", [3.0, 2.0, 8.0]),
        ({"seg": 1.0}, 1, "{'seg': 1.0} in the checkpoint and {'seg': 'mean of 1'} here", [0.0, 2.0, 8.0]),
    ],
)
def test_different_first_losses_are_reported_once(
    first: Any, second: Any, told: str, given: list[float], older: bool
) -> None:
    state = with_first_losses(first).state_dict()
    kept = state["initial_losses"].tolist()
    for resume_options, expected in (("checkpoint", kept), ("given", given)):
        resumed = rule_with(initial_losses=second, resume_options=resume_options)
        with says("initial_losses is"):
            resumed.load_state_dict(as_of_an_older_version(state) if older else state)
        assert resumed.initial_losses.tolist() == expected
        resumed.step(torch.ones(3, dtype=F64), 2 * LOSSES)
        anew = [2 * loss if value == 0 else value for value, loss in zip(expected, LOSSES.tolist(), strict=True)]
        assert resumed.initial_losses.tolist() == anew


def test_another_number_of_first_updates_counts_on_from_those_so_far() -> None:
    state = with_first_losses(2, updates=2).state_dict()
    for resume_options, expected in (("checkpoint", LOSSES), ("given", LOSSES * (1 + 1 + 4) / 3)):
        resumed = rule_with(initial_losses=3, resume_options=resume_options)
        with says("'normal': 'mean of 2'} in the checkpoint and {'seg': 'mean of 3'"):
            resumed.load_state_dict(state)
        for _ in range(3):
            resumed.step(torch.ones(3, dtype=F64), 4 * LOSSES)
        torch.testing.assert_close(resumed.initial_losses, expected)


def test_numbers_that_float32_has_rounded_are_the_same_numbers() -> None:
    given = {"seg": 0.1, "depth": 0.7, "normal": 1 / 3}
    first = GradNormRule(NAMES, initial_losses=given, initial_weights=given)
    resumed = rule_with(initial_losses=given, initial_weights=given)
    with says():
        resumed.load_state_dict(first.state_dict())


def test_a_task_that_has_not_been_seen_begins_with_what_is_given() -> None:
    first = rule_with()
    first.step(torch.ones(3, dtype=F64), LOSSES, torch.tensor([True, True, False]))
    resumed = rule_with(initial_losses={"normal": 5.0})
    with says():
        resumed.load_state_dict(first.state_dict())
    assert resumed.initial_losses.tolist() == [4.0, 2.0, 5.0]


def test_weights_to_begin_with_count_only_if_they_are_given_and_differ() -> None:
    given = {"seg": 1.0, "depth": 1.0, "normal": 4.0}
    first, plain = trained(initial_weights=given), trained()
    for resumed, state in ((rule_with(), first), (rule_with(initial_weights=given), first)):
        with says():
            resumed.load_state_dict(state.state_dict())
        assert torch.equal(resumed.weights, first.weights)
    for resume_options in ("checkpoint", "given"):
        resumed = rule_with(initial_weights=given, resume_options=resume_options)
        with says("initial_weights is {'seg': 1.0, 'depth': 1.0, 'normal': 1.0} in the checkpoint and {'seg': 0.5,"):
            resumed.load_state_dict(plain.state_dict())
        expected = plain.weights.tolist() if resume_options == "checkpoint" else [0.5, 0.5, 2.0]
        assert resumed.weights.tolist() == expected
        assert torch.equal(resumed.mean_weights, plain.mean_weights)


# ---- errors change nothing -------------------------------------------------------------------------------------------------


def assert_same(one: Any, other: Any) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def without(*path: str) -> Callable[[dict[str, Any]], None]:
    def damage(state: dict[str, Any]) -> None:
        for name in path[:-1]:
            state = state[name]
        del state[path[-1]]

    return damage


def cut(*path: Any) -> Callable[[dict[str, Any]], None]:
    def damage(state: dict[str, Any]) -> None:
        for name in path[:-1]:
            state = state[name]
        state[path[-1]] = state[path[-1]][:2]

    return damage


DAMAGES = {
    "no weights": without("weights"),
    "no mean weights": without("weights_mean"),
    "no counts": without("updates_seen"),
    "no steps": without("steps"),
    "no optimizer": without("optimizer"),
    "no groups": without("optimizer", "param_groups"),
    "no moments": without("optimizer", "state"),
    "two weights": cut("weights"),
    "two first losses": cut("initial_losses"),
    "two moments": cut("optimizer", "state", 0, "exp_avg"),
    "last numbers without losses": without("last_seen", "losses"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("optimizer", [adam, partial(adam, amsgrad=True)], ids=["on tensors alone", "torch's"])
def test_a_state_that_is_damaged_leaves_the_rule_as_it_was(optimizer: Any, damage: str) -> None:
    first, rule = (trained(optimizer, absent_tasks="last_seen") for _ in range(2))
    steps_of(rule, seed=3)
    state, before, twin = first.state_dict(), rule.state_dict(), trained(optimizer, absent_tasks="last_seen")
    steps_of(twin, seed=3)
    DAMAGES[damage](state)
    if damage == "two moments" and not isinstance(rule._step, MaskedAdam):
        pytest.skip("torch does not look at what it loads")
    with pytest.raises((ValueError, KeyError, RuntimeError)):
        rule.load_state_dict(state)
    assert_same(rule.state_dict(), before)
    steps_of(rule, twin, seed=4)
    assert torch.equal(rule.weights, twin.weights)


RULES: dict[str, Callable[[], Any]] = {
    "GradNorm": rule_with,
    "UW": lambda: ScalarizationRule(NAMES, S.UW(3)),
    "UPGrad": lambda: AggregationRule(NAMES, A.UPGrad()),
    "fixed weights": lambda: FixedRule(dict.fromkeys(NAMES, 1.0)),
}


@pytest.mark.parametrize("written_by", RULES)
@pytest.mark.parametrize("read_by", RULES)
def test_a_state_of_another_strategy_is_refused_by_the_names_of_both(read_by: str, written_by: str) -> None:
    rule, state = RULES[read_by](), RULES[written_by]().state_dict()
    before = rule.state_dict()
    if read_by == written_by:
        return rule.load_state_dict(state)
    with pytest.raises(ValueError, match=f"it is from {written_by}") as error:
        rule.load_state_dict(state)
    assert (read_by if read_by != "fixed weights" else "FixedRule") in str(error.value)
    assert "version" not in str(error.value)
    return assert_same({**rule.state_dict(), "losses": 0}, {**before, "losses": 0})


# ---- through a Trainer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume_options", ["checkpoint", "given"])
def test_a_callback_resumes_as_requested_and_reports_it_once(
    resume_options: Any, quiet_trainer: Any, tmp_path: Path
) -> None:
    def gradnorm(lr: float, **options: Any) -> GradNorm:
        return GradNorm(NAMES, shared_layer="encoder.2", optimizer=partial(adam, lr=lr), **options)

    saves = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=4)
    trainer = quiet_trainer(callbacks=[gradnorm(0.025), saves], enable_checkpointing=True, max_steps=4)
    trainer.fit(Automatic(3), Batches(vector_batches(3, 8)))
    path = next(tmp_path.glob("*.ckpt"))
    resumed = gradnorm(0.1, resume_options=resume_options)
    with says("lr of the weights' optimizer is 0.025 in the checkpoint and 0.1 here"):
        quiet_trainer(callbacks=[resumed]).fit(Automatic(3), Batches(vector_batches(3, 8)), ckpt_path=path)
    assert group_of(resumed.rule)["lr"] == (0.1 if resume_options == "given" else 0.025)
    same = gradnorm(0.025, alpha=0.3)
    with says():
        quiet_trainer(callbacks=[same]).fit(Automatic(3), Batches(vector_batches(3, 8)), ckpt_path=path)
    assert same.weights != resumed.weights


def test_a_wrong_value_is_refused_with_the_right_ones() -> None:
    for make in (GradNorm, GradNormRule):
        with pytest.raises(ValueError, match="resume_options should be 'checkpoint' or 'given'; got 'mine'"):
            make(NAMES, resume_options="mine")  # type: ignore[operator]
