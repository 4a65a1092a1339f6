"""Networks that were not written for this callback: a few steps of each, against the double-backward textbook."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from foreign import (
    STEPS,
    MakeTrainer,
    assert_trains_as_the_textbook_says,
    balance,
    fit,
    node_names,
    table,
    with_heads,
)
from harness import Batches
from shapes import Case
from shapes.calls import CALLS
from shapes.checkpoints import CHECKPOINTS
from shapes.doubles import BEHIND, IN_PLACE, TIED
from shapes.layers import LAYERS
from shapes.surroundings import SURROUNDINGS
from torch import Tensor, nn


@table(LAYERS)
def test_the_shared_layer_may_be(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)


@table(SURROUNDINGS)
def test_around_the_shared_layer_there_may_be(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)


@table(CALLS | BEHIND)
def test_encoder_and_heads_may_be_called_with(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)


@table(CHECKPOINTS)
def test_activations_may_be_checkpointed_in(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)


AT_Z = {
    **CALLS,
    "the heads run twice": replace(CALLS["the heads run twice"], modes=(False,)),
    "the heads, named, run twice": replace(
        CALLS["the heads run twice"],
        modes=(True,),
    ),
}
del AT_Z["a dataclass"]  # torch does not see its tensors


@table(AT_Z)
def test_the_norm_may_be_taken_at_a_representation_where(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads, norm_of="activation")


@pytest.mark.slow
@table({name: replace(case, marks=()) for name, case in CHECKPOINTS.items()})
def test_the_norm_may_be_taken_at_the_representation_with_checkpoints_in(
    case: Case, heads: bool, quiet_trainer: MakeTrainer
) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads, norm_of="activation")


@pytest.mark.slow
@table(LAYERS | SURROUNDINGS | CALLS | CHECKPOINTS)
def test_two_batches_may_make_one_step_with(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads, accumulate=2)


@with_heads(IN_PLACE, False)
def test_a_head_may_begin_in_place_without_heads(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)


@with_heads(IN_PLACE, True)
def test_a_head_that_begins_in_place_is_refused_with_heads(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    """Later heads read what it overwrites, so the tasks cannot be distinguished at the heads."""
    model = case.make()
    with pytest.raises(ValueError, match=r"changes the representation in place.*inplace=False, or leave heads out"):
        fit(quiet_trainer, model, balance(model, case, heads), case.batches(1))


@with_heads(TIED, False)
def test_without_heads_the_gradient_of_a_tied_weight_is_the_whole_one(
    case: Case, heads: bool, quiet_trainer: MakeTrainer
) -> None:
    assert_trains_as_the_textbook_says(quiet_trainer, case, heads)


@with_heads(TIED, True)
def test_with_heads_a_tied_weight_is_refused(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    model = case.make()
    with pytest.raises(ValueError, match="reaches the shared layer by a path that does not pass its head"):
        fit(quiet_trainer, model, balance(model, case, heads), case.batches(1))


def test_a_dataclass_that_torch_does_not_know_is_refused_with_heads(quiet_trainer: MakeTrainer) -> None:
    case = CALLS["a dataclass"]
    model = case.make()
    with pytest.raises(ValueError, match=r"does not visibly pass its head.*Leave heads out"):
        fit(quiet_trainer, model, balance(model, case, heads=True), case.batches(1))


def test_the_attention_that_is_trained_is_the_fused_one() -> None:
    for name, fused in {
        "F.scaled_dot_product_attention in the trunk": 1,
        "F.scaled_dot_product_attention in the heads": 3,
        "MultiheadAttention in the heads": 3,
        "TransformerEncoderLayer": 1,
    }.items():
        case = SURROUNDINGS[name]
        model = case.make()
        losses = model.task_losses(case.batches(1)[0])
        assert sum("Flash" in node for node in node_names(losses.values())) == fused, name


@table({name: case for name, case in SURROUNDINGS.items() if "Norm" in name or "Dropout" in name})
def test_nothing_is_computed_or_drawn_twice(case: Case, heads: bool, quiet_trainer: MakeTrainer) -> None:
    model, plain = case.make(), case.make()
    states = []
    for one, callbacks in ((model, [balance(model, case, heads)]), (plain, [])):
        torch.manual_seed(5)
        quiet_trainer(callbacks=callbacks).fit(one, Batches(case.batches(STEPS)))
        states.append(torch.get_rng_state())
    assert torch.equal(*states), "the callback has drawn random numbers"
    counts = [buffer for name, buffer in model.named_buffers() if name.endswith("num_batches_tracked")]
    assert all(count == STEPS for count in counts)
    assert counts or "Norm" not in str(model)


class Counted(nn.Module):
    """A parametrization that counts how often the weight is computed."""

    calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight


@pytest.mark.parametrize("heads", [False, True], ids=["no heads", "heads"])
@pytest.mark.parametrize(
    "layer",
    ["encoder.layer", None],
)
def test_a_parametrized_weight_is_computed_once_in_a_step(
    layer: str | None, heads: bool, quiet_trainer: MakeTrainer
) -> None:
    case = replace(LAYERS["Linear"], layer=layer)
    model, counted = case.make(), Counted()
    nn.utils.parametrize.register_parametrization(model.encoder.layer, "weight", counted)
    counted.calls = 0
    fit(quiet_trainer, model, balance(model, case, heads), case.batches(STEPS))
    assert counted.calls == STEPS
