"""Kinds of compiled encoders: a layer deep inside, many blocks, a changing depth, tied weights, dropout."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import textbook
import torch
from compiled import COMPILING, HEADS, NAMES, STEPS, T, as_a_whole, assert_same, in_place, learn, wrapped
from harness import Batches, BeforeBatch, Recorder, assert_agrees
from models import Automatic, network_sgd, vector_batches
from torch import nn
from torch._dynamo.utils import counters

from lightning_gradnorm import GradNorm

pytestmark = COMPILING


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(7, 7)
        self.norm = nn.LayerNorm(7)
        self.two = nn.Linear(7, 7)

    def forward(self, x):
        return x + self.two(self.norm(torch.tanh(self.one(x))))


class Trunk(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
        self.blocks = nn.Sequential(Residual(), nn.Tanh(), Residual())
        self.neck = nn.Linear(7, 6)

    def forward(self, x):
        return self.neck(self.blocks(self.stem(x)))


class Deep(Automatic):
    def build(self) -> None:
        super().build()
        self.encoder = Trunk()


BEFORE_THE_LAYER = ["stem", "blocks.0 and blocks.1 together", "blocks.2.one", "blocks.2.norm"]


@pytest.mark.parametrize(
    ("compiled", "graphs"),
    [
        (wrapped("encoder"), BEFORE_THE_LAYER),
        (in_place("encoder", *HEADS), [*BEFORE_THE_LAYER, *HEADS]),
        (as_a_whole, [*BEFORE_THE_LAYER, *HEADS]),
    ],
)
def test_modules_before_a_layer_deep_inside_stay_compiled_and_run_once(
    quiet_trainer, replays, compiled: Callable[[Any, str], Any], graphs: list[str]
) -> None:
    batches = vector_batches(T, STEPS)
    twin, trajectory = learn(lambda: Deep(T), "encoder.blocks.2.two", batches)
    model = Deep(T)
    given = compiled(model, "aot_eager")
    gradnorm = GradNorm(NAMES, shared_layer="encoder.blocks.2.two", heads=model.heads())
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(given, Batches(batches))
    assert_same(recorder, model, trajectory, twin)
    assert not replays
    assert counters["stats"]["unique_graphs"] == len(graphs)


class Block(nn.Module):
    """One is like another but for a number that its code is compiled for."""

    def __init__(self, power: int) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 7)
        self.power = power

    def forward(self, x):
        return x + torch.tanh(self.layer(x)) ** self.power


class Stack(nn.Module):
    """Ten blocks. torch.compile would run the ninth and tenth eagerly, or reject them with ``fullgraph``."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.blocks = nn.ModuleList(Block(1 + power) for power in range(10))
        self.last = nn.Linear(7, 6)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.last(x)


class Recurrent(nn.Module):
    """From the fifth batch on, which is larger, the first layers are called once more behind the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.before = nn.Sequential(nn.Linear(7, 7), nn.GELU(), nn.Linear(7, 7))
        self.last = nn.Linear(7, 7)
        self.end = nn.Linear(7, 6)

    def forward(self, x):
        z = self.first(x)
        for _ in range(1 if len(x) == 4 else 2):
            z = torch.tanh(self.last(torch.tanh(self.before(z))))
        return self.end(z)


class Tied(nn.Module):
    """The last layer's weight is that of another, which is called before."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        self.last.weight = self.other.weight

    def forward(self, x):
        return self.last(torch.tanh(self.other(self.first(x))))


class OfTwoNames(nn.Module):
    """A layer norm that the encoder and one of its modules both hold; a module to compile follows the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(7)
        self.first = nn.Sequential(nn.Linear(5, 7), self.norm, nn.Tanh())
        self.last = nn.Linear(7, 6)
        self.behind = nn.Linear(6, 6)

    def forward(self, x):
        return self.behind(torch.tanh(self.last(self.norm(self.first(x)))))


class Attends(nn.Module):
    """The last layer is one that torch uses without calling it; another follows."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.behind = nn.Linear(6, 6)

    def forward(self, x):
        x = self.first(x)[None]
        return torch.tanh(self.behind(x + self.attention(x, x, x, need_weights=False)[0])).squeeze(0)


def traced_alone(model: Any, backend: str) -> Any:
    """What torch.compile allows is asked while it traces; to compile the backward passes takes longer than that."""
    return wrapped("encoder", fullgraph=True)(model, "eager")


def _both(model: Any, backend: str) -> Any:
    model.encoder.compile(backend=backend)
    return wrapped("encoder")(model, backend)


ENCODERS: dict[str, tuple[type[nn.Module], str, Callable[[Any, str], Any], list[str]]] = {
    "many blocks": (Stack, "encoder.last", traced_alone, []),
    "many blocks, with their backward pass": (Stack, "encoder.last", wrapped("encoder", fullgraph=True), []),
    "a depth that changes": (Recurrent, "encoder.last", wrapped("encoder"), []),
    "tied weights": (Tied, "encoder.last", wrapped("encoder"), ["encoder"]),
    "tied weights, one compiled": (Tied, "encoder.last", wrapped("encoder.other"), ["encoder"]),
    "a module of two names": (OfTwoNames, "encoder.last", wrapped("encoder.behind"), ["encoder"]),
    "a last layer that is not called": (Attends, "encoder.attention.out_proj", wrapped("encoder"), []),
    "two kinds of compilation": (Trunk, "encoder.neck", _both, []),
}


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow) if "backward" in case else case for case in ENCODERS]
)
def test_a_compiled_encoder_may_have(quiet_trainer, replays, case: str) -> None:
    encoder, shared_layer, compiled, run_again = ENCODERS[case]

    class Model(Automatic):
        def build(self) -> None:
            super().build()
            self.encoder = encoder()

    batches = [*vector_batches(T, 4), *vector_batches(T, 4, size=6)]
    twin, trajectory = learn(lambda: Model(T), shared_layer, batches)
    model = Model(T)
    parameters = dict(model.named_parameters())
    given = compiled(model, "aot_eager")
    gradnorm = GradNorm(NAMES, shared_layer=shared_layer, heads=model.heads())
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(given, Batches(batches))
    assert_same(recorder, model, trajectory, twin)
    assert sorted(set(replays)) == run_again
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name.replace("_orig_mod.", "")]


class Copies(L.Callback):
    """Takes a copy of the model in the middle of training, as an average of weights or a teacher does."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        encoder = pl_module.encoder._orig_mod
        self.encoder = copy.deepcopy(encoder)
        self.told = {name: value.clone() for name, value in encoder.state_dict().items()}


def test_a_copy_made_in_mid_training_is_independent(quiet_trainer) -> None:
    model = wrapped("encoder")(Automatic(T), "aot_eager")
    gradnorm = GradNorm(NAMES, shared_layer="encoder.2", heads=model.heads())
    copies, batches = Copies(), vector_batches(T, 3)
    quiet_trainer(callbacks=[gradnorm, copies]).fit(model, Batches(batches))
    assert copies.encoder.forward == nn.Sequential.forward.__get__(copies.encoder)
    expected = Automatic(T).encoder
    expected.load_state_dict(copies.told)
    for parameter in model.encoder.parameters():
        parameter.data.zero_()
    torch.testing.assert_close(copies.encoder(batches[0]["x"]), expected(batches[0]["x"]))


class DropsOut(Automatic):
    def build(self) -> None:
        super().build()
        self.encoder[3] = nn.Sequential(nn.Tanh(), nn.Dropout(0.3))


@pytest.mark.slow
def test_a_compiled_dropout_whose_mask_cannot_be_drawn_again_is_refused(quiet_trainer) -> None:
    model = wrapped("encoder.3")(DropsOut(T), "inductor")
    gradnorm = GradNorm(NAMES, shared_layer="encoder.2", heads=model.heads())
    with pytest.raises(RuntimeError, match="running 'encoder' again did not return the same as in the forward pass"):
        quiet_trainer(callbacks=[gradnorm]).fit(model, Batches(vector_batches(T, 3)))


def test_the_mask_of_a_dropout_is_drawn_again_when_the_encoder_is_run_again(quiet_trainer) -> None:
    batches = vector_batches(T, STEPS)

    def seeded(index: int) -> None:
        torch.manual_seed(index)

    twin = DropsOut(T)
    trajectory = textbook.train(
        twin,
        twin.forward_for_textbook,
        batches,
        [twin.encoder[2].weight],
        network_sgd(twin.parameters()),
        before_micro_batch=seeded,
    )
    model = wrapped("encoder.3")(DropsOut(T), "eager")  # traced, but with torch's own random numbers
    gradnorm = GradNorm(NAMES, shared_layer="encoder.2", heads=model.heads())
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder, BeforeBatch(seeded)]).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin, 1e-8)
