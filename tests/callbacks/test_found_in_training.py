"""Networks without named layers or heads, in the ways people train, against the double-backward textbook."""

from __future__ import annotations

from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import textbook
import torch
from found import (
    NAMES,
    NETWORKS,
    STEPS,
    TOLERANCE,
    ByHand,
    EachAlone,
    EachShownAlone,
    Found,
    MakeTrainer,
    ZeroAtFirst,
    assert_follows_textbook,
    train_unnamed,
)
from harness import Batches, Recorder, state_by_part
from lightning.pytorch.callbacks import ModelCheckpoint
from models import Manual, network_sgd, vector_batches
from ranks import NO_TASK, PRESENCE, MayLack, Presence, Run, Told, lacking, train_each, when

from lightning_gradnorm import GradNorm


@pytest.mark.both_packages
@pytest.mark.parametrize("network", NETWORKS)
def test_a_network_with_nothing_named_agrees_with_the_textbook(
    network: str, quiet_trainer: MakeTrainer, package: ModuleType
) -> None:
    make = NETWORKS[network]
    assert make(3).heads_found in assert_follows_textbook(quiet_trainer, lambda: make(3))


OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "update_every=3": {"update_every": 3},
    "initial_losses=2": {"initial_losses": 2},
    "priorities": {"priorities": {"seg": 2.0, "depth": 1.0, "normal": 0.5}},
}


@pytest.mark.each_value_once
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", [Found, ByHand, EachAlone], ids=["automatic", "manual", "a pass for each task"])
def test_layer_and_heads_are_found_in_every_way_of_training(
    kind: type[Found], accumulate: int, options: str, quiet_trainer: MakeTrainer
) -> None:
    make = partial(kind, 3, **({"accumulate": accumulate} if issubclass(kind, Manual) else {}))
    assert_follows_textbook(quiet_trainer, make, accumulate=accumulate, **OPTIONS[options])


def test_losses_shown_one_by_one_are_balanced_from_the_second_step_on(quiet_trainer: MakeTrainer) -> None:
    """In the first, the layer is known only when two losses have gone back already."""
    assert_follows_textbook(quiet_trainer, lambda: EachShownAlone(3), oracle={"skip_steps": [0]})


def test_a_head_of_zeros_moves_nothing_at_first_and_decides_nothing(quiet_trainer: MakeTrainer) -> None:
    batches, found = vector_batches(3, STEPS), []
    for options in ({}, {"shared_layer": "trunk.2", "heads": None}):
        gradnorm, recorder = train_unnamed(quiet_trainer, ZeroAtFirst(3), batches, **options)
        found.append(recorder.weights)
        assert "W = trunk.2.weight (" in repr(gradnorm)
    for one, named in zip(*found, strict=True):
        assert one == pytest.approx(named, rel=0, abs=TOLERANCE)
    assert found[1][-1] != found[1][0]


@pytest.mark.filterwarnings(
    "ignore:.*pre-optimization state.*",  # a checkpoint in a step of manual optimization is on purpose
    "ignore:.*manual optimization.*",
    "ignore:Be aware that when using .ckpt_path., callbacks used to create the checkpoint",
)
@pytest.mark.parametrize("kind", [Found, ByHand])
def test_a_training_resumed_in_the_middle_finds_them_again(
    kind: type[Found], quiet_trainer: MakeTrainer, tmp_path: Path
) -> None:
    batches = vector_batches(3, 6)
    _, whole = train_unnamed(quiet_trainer, kind(3), batches)
    gradnorm, model = GradNorm(NAMES), kind(3)
    model.gradnorm = [gradnorm]
    saves = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=3, save_top_k=-1)
    trainer = quiet_trainer(callbacks=[gradnorm, saves], max_steps=3, enable_checkpointing=True)
    trainer.fit(model, Batches(batches))

    again, other = GradNorm(NAMES), kind(3)
    other.gradnorm = [again]
    recorder = Recorder(again)
    quiet_trainer(callbacks=[again, recorder]).fit(other, Batches(batches), ckpt_path=tmp_path / "step=3.ckpt")
    assert recorder.weights == whole.weights[3:]
    assert "W = trunk.2.weight (" in repr(again)


# ---- several ranks -----------------------------------------------------------------------------------------------------

RANK_STEPS = 6
RANKED = {
    "all tasks everywhere": Presence(lambda s, r, m: set()),
    "a task never on one rank": PRESENCE["a task never on one rank"],
    "a task absent in the first batch": Presence(lambda s, r, m: when(s == 0, "depth")),
    "a task absent in the first batch of one rank": Presence(lambda s, r, m: when(s == 0 and r == 0, "depth")),
    "no task on one rank in the first batch": NO_TASK["no task on one rank in the first batch"],
    "two batches to a step": Presence(lambda s, r, m: when(m == 0 and s == 0, "depth"), accumulate=2),
    "no rank sees all tasks": PRESENCE["no task on two ranks"],
}
weight_sgd = partial(torch.optim.SGD, lr=0.05)


class OfAnotherName(MayLack):
    """Its trunk is no submodule called `encoder`, whose last layer could serve until two tasks have been seen."""

    def build(self) -> None:
        super().build()
        self.trunk = self.encoder
        del self.encoder

    @property
    def encoder(self) -> Any:
        return self.trunk


KINDS = {"encoder": MayLack, "trunk": OfAnotherName}


def ranked(name: str) -> tuple[Presence, list[Any]]:
    presence = RANKED[name]
    return presence, lacking(vector_batches(3, RANK_STEPS, size=12), presence)


@cache
def told_by(ranks: int) -> dict[str, list[Told] | str]:
    """What all trainings with so many ranks tell, in the same processes."""
    runs = {}
    for name, presence in RANKED.items():
        for kind, make in KINDS.items() if presence.ranks == ranks else ():
            balancing = GradNorm(NAMES, optimizer=weight_sgd)
            runs[f"{name}, {kind}"] = Run(make(3), balancing, ranked(name)[1], ddp={"find_unused_parameters": True})
    return train_each(runs)


@pytest.mark.xdist_group("found on ranks")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RANKED)
def test_ranks_find_the_same_and_follow_the_textbook(name: str, kind: str) -> None:
    presence, steps = ranked(name)
    told = told_by(presence.ranks)[f"{name}, {kind}"]
    assert not isinstance(told, str), told
    twin = MayLack(3)
    trajectory = textbook.train(
        twin,
        twin.forward_for_textbook,
        [batch for step in steps for of_rank in step for batch in of_rank],
        twin.shared_parameters(),
        network_sgd(twin.parameters()),
        weight_optimizer=weight_sgd,
        accumulate=presence.ranks * presence.accumulate,
        tasks=NAMES,
    )
    assert max(abs(weight - 1) for weight in trajectory.weights[-1].values()) > 1e-3
    for of_rank in told:
        for weights, expected in zip(of_rank.weights, trajectory.weights, strict=True):
            assert weights == pytest.approx(expected, rel=0, abs=TOLERANCE)
        own = state_by_part(twin)
        for part, value in of_rank.network.items():
            torch.testing.assert_close(value, own[part], rtol=0, atol=TOLERANCE, msg=part)
