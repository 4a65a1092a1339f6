"""Wrong input to `Balancer` is an error that names the culprit and the fix, and the next step works."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from loops import Network, gradnorm_rule, parameter_distance, train
from models import TASKS, Batch, network_sgd, vector_batches
from torch import Tensor, nn
from torchjd import aggregation as A
from torchjd import scalarization as S

from lightning_gradnorm import Balancer, GradNorm
from lightning_gradnorm.strategies import AggregationRule, FixedRule, GradNormRule, ScalarizationRule

NAMES = TASKS[:3]
BATCHES = vector_batches(3, 4)
Losses = dict[str, Tensor]


def balance(rule: Any = None, model: nn.Module | None = None, **options: Any) -> Balancer:
    return Balancer(model or Network(), rule or gradnorm_rule(), **options)


# ---- construction ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        ("GradNorm", "got str."),
        (GradNormRule, "got the class GradNormRule."),
        (S.UW(3), "got UW. Give it to ScalarizationRule or AggregationRule, and the rule to Balancer."),
        (A.UPGrad(), "got UPGrad. Give it to ScalarizationRule or AggregationRule, and the rule to Balancer."),
        (GradNorm(NAMES), "got GradNorm. That is a callback for a Lightning Trainer."),
        (None, "got NoneType."),
    ],
    ids=lambda value: type(value).__name__,
)
def test_something_that_is_not_a_rule(rule: Any, found: str) -> None:
    with pytest.raises(TypeError) as error:
        Balancer(Network(), rule)
    assert str(error.value).startswith(
        f"Balancer: rule should be a rule such as GradNormRule(['seg', 'depth']); {found}"
    )


def test_something_that_is_not_a_model() -> None:
    with pytest.raises(TypeError, match="Balancer: model should be a module; got list"):
        Balancer([1], gradnorm_rule())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shared_layer": "encodr.2"}, "shared_layer 'encodr.2' is not in Network; did you mean 'encoder.2'"),
        ({"shared_layer": "seg_head", "heads": Network().heads()}, "shared layer 'seg_head.weight' is in 'seg_head'"),
        ({"shared_layer": "encoder.1"}, "is a Tanh, which has no parameters"),
        ({"heads": {"seg": "seg_head"}}, r"heads should name every task; \['depth', 'normal'\] are missing"),
        ({"heads": {**Network().heads(), "dept": "seg_head"}}, "heads names 'dept', which .* did you mean 'depth'"),
        (
            {"heads": {**Network().heads(), "seg": "segm_head"}},
            "'segm_head' is not in Network; did you mean 'seg_head'",
        ),
        ({"heads": {**Network().heads(), "seg": "depth_head"}}, "heads should name one module for each task"),
        (
            {"shared_layer": 3},
            "shared_layer should be a dotted name such as 'encoder.4', a list of such names, 'all', or None; got 3",
        ),
        ({"heads": ["seg_head"]}, "heads should be a mapping from task to the name of its head, 'auto' or None"),
        ({"norm_of": "weights"}, "norm_of should be 'weight' or 'activation'; got 'weights'"),
        ({"norm_of": "activation", "representation": "enc"}, "representation 'enc' is not in Network"),
    ],
    ids=str,
)
def test_layers_and_heads(options: dict[str, Any], message: str) -> None:
    model = Network()
    with pytest.raises((ValueError, TypeError), match=f"^Balancer: .*{message}"):
        Balancer(model, gradnorm_rule(), **options)
    Balancer(model, gradnorm_rule()).close()  # the failed one has left nothing behind


def test_a_model_whose_tasks_share_no_layer() -> None:
    model = nn.ModuleDict({task: nn.Linear(2, 2) for task in NAMES})
    losses = {task: head(torch.ones(1, 2)).sum() for task, head in model.items()}
    expected = (
        r"Balancer: shared_layer=None found no layer .* ModuleDict: the tasks \['seg', .* share no trained weight"
    )
    with Balancer(model, gradnorm_rule()) as balancer, pytest.raises(ValueError, match=expected):
        balancer.backward(losses)


@pytest.mark.filterwarnings("ignore:`torch.jit.script")
def test_a_second_balancer_on_the_same_model() -> None:
    model = Network()
    with balance(model=model):
        for again in (model, torch.compile(model)):
            with pytest.raises(ValueError, match=r"Network already has a Balancer, with GradNormRule: .* close\(\)"):
                Balancer(again, ScalarizationRule(NAMES, S.UW(3)))
    balance(model=model).close()


# ---- the order of calls ----------------------------------------------------------------------------------------------


def test_backward_without_losses() -> None:
    model = Network()
    with balance(model=model) as balancer:
        for given in ({}, {"loss": sum(model(BATCHES[0]).values())}, {"losses": {}}):
            with pytest.raises(
                ValueError, match=r"backward needs the losses, .* \['seg', 'depth', 'normal'\]; got none"
            ):
                balancer.backward(**given)


def test_backward_without_gradients() -> None:
    model = Network()
    balancer = balance(model=model)
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"Balancer: backward was called under torch\.no_grad"):
        balancer.backward(model(BATCHES[0]))


def test_step_without_backward() -> None:
    model = Network()
    with balance(model=model) as balancer:
        for _ in range(2):
            with pytest.raises(RuntimeError, match="step was called without a backward pass since the last step"):
                balancer.step()
            balancer.backward(model(BATCHES[0]))
            balancer.step()


@pytest.mark.parametrize("method", ["close", "load_state_dict"])
def test_close_in_the_middle_of_a_step(method: str) -> None:
    model = Network()
    balancer = balance(model=model)
    state = balancer.state_dict()
    balancer.backward(model(BATCHES[0]))
    with pytest.raises(RuntimeError, match=f"{method} was called between backward and step, which would lose"):
        balancer.close() if method == "close" else balancer.load_state_dict(state)
    balancer.step()
    balancer.close()


def test_the_end_of_a_with_block_in_the_middle_of_a_step() -> None:
    model = Network()
    with pytest.raises(RuntimeError, match="close was called between"), balance(model=model) as balancer:
        balancer.backward(model(BATCHES[0]))


def test_an_exception_in_the_middle_of_a_step_is_not_hidden_and_frees_the_model() -> None:
    model = Network()

    def step(balancer: Balancer) -> None:
        balancer.backward(model(BATCHES[0]))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), balance(model=model, heads=model.heads()) as balancer:
        step(balancer)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    balance(model=model).close()


@pytest.mark.parametrize(
    "use",
    [
        lambda balancer, losses: balancer.watch(losses),
        lambda balancer, losses: balancer.backward(losses),
        lambda balancer, losses: balancer.prepare_loss(losses),
        lambda balancer, losses: balancer.step(),
        lambda balancer, losses: balancer.load_state_dict(balancer.state_dict()),
    ],
)
def test_use_after_close(use: Callable[[Balancer, Losses], Any]) -> None:
    model = Network()
    balancer = balance(model=model)
    balancer.close()
    with pytest.raises(RuntimeError, match=r"Balancer: it is closed. Make a new one."):
        use(balancer, model(BATCHES[0]))


def test_the_scaler_has_been_updated_already() -> None:
    model = Network()
    optimizer, scaler = network_sgd(model.parameters()), torch.amp.GradScaler("cpu")
    with balance(model=model) as balancer:
        balancer.backward(model(BATCHES[0]), backward=lambda loss: scaler.scale(loss).backward())
        scaler.step(optimizer)
        scaler.update()
        expected = r"Call balancer.step\(scaler=scaler\) after scaler.step\(optimizer\) and before scaler.update\(\)"
        with pytest.raises(RuntimeError, match=expected):
            balancer.step(scaler=scaler)
        balancer.step()


def test_famo_without_losses_after_the_step() -> None:
    model = Network()
    with balance(ScalarizationRule(NAMES, S.FAMO(3)), model) as balancer:
        balancer.backward(model(BATCHES[0]))
        with pytest.raises(ValueError, match=r"FAMO needs the losses of the batch again .*losses_after_step=lambda"):
            balancer.step()
        with pytest.raises(
            ValueError, match=r"losses_after_step names 'sge', which is not among .* did you mean 'seg'"
        ):
            balancer.step(losses_after_step=lambda: {"sge": torch.zeros(())})


def test_a_prepared_loss_that_is_not_back_propagated() -> None:
    model = Network()
    with balance(model=model, heads=model.heads()) as balancer:
        balancer.prepare_loss(model(BATCHES[0]))
        with pytest.raises(RuntimeError, match="the loss that prepare_loss returned last has not been back-propagated"):
            balancer.prepare_loss(model(BATCHES[1]))
        balancer.prepare_loss(model(BATCHES[1])).backward()
        balancer.step()


def test_a_model_in_evaluation_mode() -> None:
    model = Network().eval()
    with (
        balance(model=model, heads=model.heads()) as balancer,
        pytest.raises(
            RuntimeError, match=r"the model is in evaluation mode, .* Call model.train\(\) before the forward"
        ),
    ):
        balancer.backward(model(BATCHES[0]))


# ---- losses ----------------------------------------------------------------------------------------------------------


def _renamed(losses: Losses) -> Losses:
    return {"sge" if task == "seg" else task: loss for task, loss in losses.items()}


def _same(losses: Losses) -> Losses:
    return {**losses, "depth": losses["seg"]}


def _detached(losses: Losses) -> Losses:
    return {**losses, "seg": losses["seg"].detach()}


def _contained(losses: Losses) -> Losses:
    return {**losses, "depth": losses["depth"] + losses["seg"]}


def _numbers(losses: Losses) -> Any:
    return {**losses, "seg": losses["seg"].item()}


def _listed(losses: Losses) -> Any:
    return list(losses.values())


WRONG: dict[str, tuple[Callable[[Losses], Any], str]] = {
    "an unknown name": (_renamed, "losses names 'sge', which is not among the tasks .*; did you mean 'seg'"),
    "one tensor twice": (_same, "tasks 'seg' and 'depth' have the same tensor as their loss"),
    "no gradient": (_detached, "the loss of task 'seg' .*grad"),
    "a loss within another": (
        _contained,
        "the loss of task 'depth' (contains that of|also reads the head of) (task )?'seg'",
    ),
    "a number": (
        _numbers,
        "the loss of task 'seg' should be a tensor; got a float; did you call .item\\(\\)\\? Give the loss",
    ),
    "a list": (_listed, "losses should be a mapping from task to loss; got list"),
}


@pytest.mark.parametrize("with_heads", [True, False])
@pytest.mark.parametrize("kind", WRONG)
def test_wrong_losses_are_an_error_and_the_next_batch_is_balanced(kind: str, with_heads: bool) -> None:
    change, message = WRONG[kind]
    model, plain = Network(), Network()
    heads = model.heads() if with_heads else None
    with balance(model=model, heads=heads) as balancer:
        with pytest.raises((ValueError, TypeError), match=f"^Balancer: .*{message}"):
            balancer.backward(change(model(BATCHES[0])))
        assert all(p.grad is None for p in model.parameters())
        _assert_works(balancer, model, plain, heads)


def _assert_works(balancer: Balancer, model: Network, plain: Network, heads: Any = None) -> None:
    optimizer = network_sgd(model.parameters())
    optimizer.zero_grad()
    for batch in BATCHES[1:]:
        balancer.backward(model(batch))
        optimizer.step()
        balancer.step()
        optimizer.zero_grad()
    expected, _ = train(plain, gradnorm_rule(), BATCHES[1:], heads=heads)
    assert balancer.weights == expected[-1]
    assert parameter_distance(model, plain) == 0


def _drop_seg(losses: Losses) -> Tensor:
    return torch.stack([loss for task, loss in losses.items() if task != "seg"]).sum()


@pytest.mark.parametrize("with_heads", [True, False])
@pytest.mark.parametrize("prepared", [True, False])
def test_a_loss_that_is_not_part_of_the_backward_pass(prepared: bool, with_heads: bool) -> None:
    model, plain = Network(), Network()
    heads = model.heads() if with_heads else None
    with balance(model=model, heads=heads) as balancer:

        def backward(losses: Losses) -> None:
            if prepared:
                balancer.prepare_loss(losses, loss=_drop_seg(losses)).backward()
            else:
                balancer.backward(losses, loss=_drop_seg(losses))

        with pytest.raises(ValueError, match=r"^Balancer: what was given as the loss of task 'seg' took no part in"):
            backward(model(BATCHES[0]))
        with pytest.raises(RuntimeError, match="step was called without a backward pass"):
            balancer.step()
        _assert_works(balancer, model, plain, heads)


def _twice(loss: Tensor) -> None:
    loss.backward(retain_graph=True)
    loss.backward()


def test_a_loss_is_back_propagated_once() -> None:
    model = Network()
    once = "backward should back-propagate its loss exactly once; it did"
    with balance(model=model) as balancer:
        with pytest.raises(ValueError, match=f"{once} 0 times"):
            balancer.backward(model(BATCHES[0]), backward=lambda loss: None)
        with pytest.raises(ValueError, match=f"{once} 2 times"):
            balancer.backward(model(BATCHES[0]), backward=_twice)
        with pytest.raises(RuntimeError, match="a loss from prepare_loss is back-propagated for the second time"):
            _twice(balancer.prepare_loss(model(BATCHES[0])))
        balancer.step()
        with pytest.raises(ValueError, match="loss should be part of the graph, but it carries no gradient"):
            balancer.backward(model(BATCHES[0]), loss=torch.zeros(()))


def test_an_error_in_the_backward_pass_costs_that_step_alone() -> None:
    """Out of memory, say: whoever catches it and sets the gradients to zero trains on as if the batch had not been."""

    def fails(loss: Tensor) -> None:
        loss.backward()
        raise MemoryError("no more")

    model, plain = Network(), Network()
    with balance(model=model, heads=model.heads()) as balancer:
        with pytest.raises(MemoryError, match="no more"):
            balancer.backward(model(BATCHES[0]), backward=fails)
        _assert_works(balancer, model, plain, plain.heads())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_warns_once_and_leaves_the_weights(value: float) -> None:
    model = Network()

    def broken(batch: Batch) -> Losses:
        losses = model(batch)
        return {**losses, "depth": losses["depth"] * value}

    with balance(model=model) as balancer:
        balancer.backward(model(BATCHES[0]))
        balancer.step()
        before = balancer.weights

        def step(batch: Batch) -> None:
            balancer.backward(broken(batch))
            balancer.step()

        with pytest.warns(UserWarning, match=r"^Balancer: .*'depth'.* the weights stay as they are") as caught:
            step(BATCHES[1])
        step(BATCHES[2])  # would be an error, as any warning in these tests is
        assert len(caught) == 1
        assert balancer.weights == before
        assert balancer.rule.skipped == 2
        balancer.backward(model(BATCHES[3]))
        balancer.step()
        assert balancer.weights != before


# ---- what can be read ------------------------------------------------------------------------------------------------


def test_mean_weights_of_a_rule_that_keeps_none() -> None:
    with (
        balance(ScalarizationRule(NAMES, S.UW(3))) as balancer,
        pytest.raises(AttributeError, match="Balancer: ScalarizationRule keeps no mean_weights"),
    ):
        _ = balancer.mean_weights


def test_a_state_of_other_tasks_or_of_another_strategy() -> None:
    with balance(GradNormRule(["a", "b", "c"])) as balancer:
        with pytest.raises(ValueError, match="seg"):
            balancer.load_state_dict(gradnorm_rule().state_dict())
        with pytest.raises(ValueError, match="GradNorm: the state should be from GradNorm; it is from UW"):
            balancer.load_state_dict(ScalarizationRule(["a", "b", "c"], S.UW(3)).state_dict())


def test_a_balancer_shows_its_plan() -> None:
    with balance() as balancer:
        expected = "Balancer(GradNormRule['seg', 'depth', 'normal'], W = encoder.2.weight (6 × 7), heads: none)"
        assert repr(balancer) == expected


def test_losses_of_a_batch_that_is_not_back_propagated_are_not_mixed_with_the_next() -> None:
    model, plain = Network(), Network()
    with balance(model=model) as balancer:
        balancer.watch(model(BATCHES[0]))
        with pytest.raises(
            ValueError, match=r"the loss of task 'seg' was given before and has not been back-propagated"
        ):
            balancer.backward(model(BATCHES[0]))
        _assert_works(balancer, model, plain)


def test_a_task_that_never_has_a_loss_is_warned_of_once() -> None:
    model = Network()

    def train_without(task: str, balancer: Balancer) -> None:
        for _ in range(60):
            balancer.backward({**model(BATCHES[0]), task: None})
            balancer.step()

    message = r"no loss of tasks \['normal'\] was seen in the first 50 steps"
    with balance(model=model) as balancer, pytest.warns(UserWarning, match=message) as warned:
        train_without("normal", balancer)
    assert len(warned) == 1


def test_fixed_weights_take_no_state_of_another_strategy() -> None:
    with balance(FixedRule(dict.fromkeys(NAMES, 1.0))) as balancer:
        balancer.load_state_dict(balancer.state_dict())
        with pytest.raises(ValueError, match="FixedRule: the state should be empty"):
            balancer.load_state_dict(gradnorm_rule().state_dict())


def test_a_scalarizer_that_is_not_made_yet() -> None:
    with pytest.raises(TypeError, match=r"scalarizer should be a module, such as UW\(3\); got the class UW"):
        ScalarizationRule(NAMES, S.UW)  # type: ignore[arg-type]


def test_a_shared_layer_that_does_not_exist_is_an_error_for_a_rule_that_reads_none() -> None:
    with pytest.raises(ValueError, match=r"Balancer: shared_layer 'encoder\.layr' is not in Network"):
        Balancer(Network(), FixedRule({"seg": 1.0, "depth": 1.0, "normal": 1.0}), shared_layer="encoder.layr")


def test_an_unknown_place_of_an_aggregation_comes_with_both_ways_out() -> None:
    network = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 1))
    with pytest.raises(ValueError, match="representation 'encoder' is not in Sequential") as raised:
        Balancer(network, AggregationRule(NAMES, A.MGDA()))
    assert "representation='trunk'" in str(raised.value)
    assert "of_parameters=True" in str(raised.value)
