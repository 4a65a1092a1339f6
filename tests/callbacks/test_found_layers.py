"""With only the tasks named, the layer and heads found give the same numbers as the same layer named explicitly.

All shapes of `tests/shapes`, which `test_foreign_shapes.py` compares with the textbook by name. Real-world networks and
trainings are in `test_found_in_training.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from foreign import MakeTrainer, fit
from harness import Recorder, traces
from shapes import Case
from shapes.calls import CALLS
from shapes.checkpoints import CHECKPOINTS, REENTRANT
from shapes.doubles import BEHIND, IN_PLACE, TIED
from shapes.layers import LAYERS
from shapes.surroundings import SURROUNDINGS

from lightning_gradnorm import GradNorm

STEPS = 5
TOLERANCE = 1e-9

# ---- the shapes ------------------------------------------------------------------------------------------------------

OUT_PROJ = ("encoder.attention.layer.out_proj", "out_proj.weight")
DEEPEST: Mapping[str, tuple[str, str]] = {
    **{
        f"{norm}, by its name": ("encoder.stem", "stem.weight")
        for norm in ("LayerNorm", "GroupNorm", "BatchNorm", "PReLU")
    },
    "MultiheadAttention: in_proj_weight": OUT_PROJ,
    "weight_norm, the old one: weight_v": ("encoder.layer", "layer.weight_g"),
    "LSTM: weight_ih_l0": ("encoder.rnn", "rnn.weight_ih_l0"),
    "GRU: weight_ih_l0": ("encoder.rnn", "rnn.weight_ih_l0"),
    "F.scaled_dot_product_attention behind the shared layer": ("encoder.attention.layer", "attention.layer.weight"),
    "F.scaled_dot_product_attention, causal": ("encoder.attention.layer", "attention.layer.weight"),
    "TransformerEncoderLayer: its attention's out_proj": ("encoder.attention.linear2", "linear2.weight"),
    "a head tied to a layer behind the shared one": ("encoder.layer", "encoder.layer.weight"),
}
"""Cases that name another layer than the deepest: the deepest one, and how what is found ends."""
HEADS: Mapping[str, Mapping[str, str]] = {
    # torch sees no tensors in such a dataclass: what of it is read later begins the head.
    "a dataclass": {task: f"{task}_head.from_coarse" for task in ("seg", "depth", "normal")},
    "a head tied to a layer behind the shared one": {"seg": "seg_head.out"},
    "a head tied to the encoder's weight": {"seg": "seg_head.out"},
    "an embedding tied to the output projections": {},
    "the last head": {"normal": "normal_head.linear", "seg": "seg_head.1", "depth": "depth_head.1"},
    "the first head": {"seg": "seg_head.linear"},
}
"""Heads other than the case's own."""
WHOLE = {"seg": "seg_head", "depth": "depth_head", "normal": "normal_head"}


def rows(*groups: Mapping[str, Case], also_fast: Sequence[str] = ()) -> Any:
    """One row for each case. The first of each group is fast, and those whose heads are not whole."""
    found = []
    for cases in groups:
        for place, (name, case) in enumerate(cases.items()):
            is_fast = place == 0 or name in also_fast or name in HEADS
            marks = (*case.marks, *(() if is_fast else (pytest.mark.slow,)))
            found.append(pytest.param(name, case, id=name, marks=marks))
    return pytest.mark.parametrize(("name", "case"), found)


REFUSED = {name: case for name, case in CHECKPOINTS.items() if "the heads, use_reentrant=True" in name}
FAST = ["LSTM, by default", "weight_norm", "weight_norm, the old one: weight_v", "LayerNorm, by its name"]


@rows(
    LAYERS,
    SURROUNDINGS,
    CALLS,
    BEHIND,
    {name: case for name, case in CHECKPOINTS.items() if name not in REFUSED},
    TIED,
    IN_PLACE,
    also_fast=FAST,
)
def test_all_that_is_found_gives_the_numbers_of_the_same_layer_named(
    name: str, case: Case, quiet_trainer: MakeTrainer
) -> None:
    layer, found_as = DEEPEST.get(name, (case.layer, case.W[0]))
    model = case.make()
    before = traces(model)
    gradnorm = GradNorm(list(model.tasks))
    found, _ = fit(quiet_trainer, model, gradnorm, case.batches(STEPS))
    assert traces(model) == before
    assert f"{found_as} (" in repr(gradnorm)
    assert f", heads: {heads_of(name)}, losses" in repr(gradnorm)

    named, _ = fit(
        quiet_trainer,
        case.make(),
        GradNorm(list(model.tasks), shared_layer=layer, heads=None),
        case.batches(STEPS),
    )
    assert_same(found, named)


def heads_of(name: str) -> str:
    own = HEADS.get(name, WHOLE)
    return ", ".join(f"{t} → {h}" for t, h in sorted((WHOLE | dict(own)).items())) if own else "none"


def assert_same(found: Recorder, named: Recorder) -> None:
    """The weights after all steps are the same, and they do move."""
    assert len(found.weights) == len(named.weights) == STEPS
    for step, (one, other) in enumerate(zip(found.weights, named.weights, strict=True)):
        assert one == pytest.approx(other, rel=0, abs=TOLERANCE), f"after step {step}"
    assert max(abs(weight - 1) for weight in named.weights[-1].values()) > 1e-3


@rows({**REFUSED, **{f"reentrant: {name}": case for name, case in REENTRANT.items()}})
def test_a_graph_that_cannot_be_passed_twice_is_refused(name: str, case: Case, quiet_trainer: MakeTrainer) -> None:
    model = case.make()
    before = traces(model)
    with pytest.raises(ValueError, match=r"GradNorm: the loss of task 'seg' .* passed twice.*use_reentrant=False"):
        fit(quiet_trainer, model, GradNorm(list(model.tasks)), case.batches(STEPS))
    assert traces(model) == before
