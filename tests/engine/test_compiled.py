"""A model that torch.compile compiled, in part or as a whole, agrees with the textbook, and does not run twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import textbook
import torch
from compiled import COMPILING, HEADS, NAMES, STEPS, T, as_a_whole, assert_same, in_place, learn, wrapped
from harness import Batches, Recorder, assert_agrees, assert_clean, traces
from models import Automatic, Convolutional, Manual, image_batches, multi_task_module, network_sgd, vector_batches
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from lightning_gradnorm import GradNorm

pytestmark = COMPILING


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


class Nested(Automatic):
    """Encoder and heads are parts of one network, which is called as a whole."""

    def build(self) -> None:
        class Network(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.encoder = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 6), nn.Tanh())
                self.heads = nn.ModuleDict({task: nn.Linear(6, 3) for task in NAMES})

            def forward(self, x):
                z = self.encoder(x)
                return {task: head(z) for task, head in self.heads.items()}

        self.network = Network()

    def heads(self) -> dict[str, str]:
        return {task: f"network.heads.{task}" for task in NAMES}

    def task_losses(self, batch):
        outputs = self.network(batch["x"])
        return {task: F.mse_loss(outputs[task], batch[task]) for task in NAMES}

    def forward_for_textbook(self, batch):
        return textbook.Forward(self.task_losses(batch))


class Called(Automatic):
    """`training_step` calls the module itself."""

    def forward(self, x):
        z = self.encoder(x)
        return {task: getattr(self, f"{task}_head")(z) for task in NAMES}

    def task_losses(self, batch):
        outputs = self(batch["x"])
        return {task: F.mse_loss(outputs[task], batch[task]) for task in NAMES}


class Functional(Automatic):
    """The encoder uses its last layer's weight without calling the layer."""

    def build(self) -> None:
        class Encoder(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Linear(5, 7)
                self.last = nn.Linear(7, 6)

            def forward(self, x):
                return torch.tanh(F.linear(torch.tanh(self.first(x)), self.last.weight, self.last.bias))

        super().build()
        self.encoder = Encoder()


CASES: dict[str, tuple[type[Automatic], str, Callable[[Any, str], Any]]] = {
    "encoder, torch.compile": (Automatic, "encoder.2", wrapped("encoder")),
    "encoder, .compile()": (Automatic, "encoder.2", in_place("encoder")),
    "shared layer alone": (Automatic, "encoder.2", wrapped("encoder.2")),
    "heads, torch.compile": (Automatic, "encoder.2", wrapped(*HEADS)),
    "heads, .compile()": (Automatic, "encoder.2", in_place(*HEADS)),
    "encoder and heads": (Automatic, "encoder.2", in_place("encoder", *HEADS)),
    "what follows the shared layer": (Automatic, "encoder.2", wrapped("encoder.3")),
    "what precedes the shared layer": (Automatic, "encoder.2", wrapped("encoder.0")),
    "convolutions with BatchNorm": (Convolutional, "encoder.3", wrapped("encoder")),
    "a layer that is never called": (Functional, "encoder.last", wrapped("encoder")),
    "the encoder by its name": (Automatic, "encoder", wrapped("encoder")),  # its last weight, encoder.2
    "one network of encoder and heads": (Nested, "network.encoder.2", in_place("network")),
    "one network, torch.compile": (Nested, "network.encoder.2", wrapped("network")),
    "whole module": (Automatic, "encoder.2", as_a_whole),
    "whole module with one network": (Nested, "network.encoder.2", as_a_whole),
    "whole module that calls itself": (Called, "encoder.2", as_a_whole),
    "the module's own .compile()": (
        Called,
        "encoder.2",
        lambda model, backend: model.compile(backend=backend) or model,
    ),
}


FAST = {
    "encoder, torch.compile",
    "heads, .compile()",
    "what follows the shared layer",
    "convolutions with BatchNorm",
    "a layer that is never called",
    "one network of encoder and heads",
    "whole module",
    "the module's own .compile()",
}
"""One of each kind: what is compiled, in which way, and how it is read; the others are slow."""
REPLAYED = {"what follows the shared layer"}
"""Where the gradients of the tasks cannot be followed to the shared layer: a module around it is run again."""


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_it_agrees_with_the_textbook_where_this_is_compiled(quiet_trainer, replays, case: str, backend: str) -> None:
    kind, shared_layer, compiled = CASES[case]
    batches = (image_batches if kind is Convolutional else vector_batches)(T, STEPS)
    twin, trajectory = learn(lambda: kind(T), "encoder.2" if shared_layer == "encoder" else shared_layer, batches)
    model = kind(T)
    heads = model.heads()
    given = compiled(model, backend)
    quiet_trainer(callbacks=[]).fit(
        given, Batches(batches[:1])
    )  # Lightning leaves traces of its own on a compiled module
    before, graphs = traces(model), counters["stats"]["unique_graphs"]
    assert graphs >= 1, "nothing was compiled"
    for _ in range(2):  # hooks of the first must not live on in the compiled code of the second
        gradnorm = GradNorm(NAMES, shared_layer=shared_layer, heads=heads)
        recorder = Recorder(gradnorm)
        model.load_state_dict(dict(zip(model.state_dict(), kind(T).state_dict().values(), strict=True)))
        quiet_trainer(callbacks=[gradnorm, recorder]).fit(given, Batches(batches))
        assert_same(recorder, model, trajectory, twin)
    assert traces(model) == before
    assert bool(replays) == (case in REPLAYED)
    if "whole" in case or "one network" in case:
        assert counters["stats"]["unique_graphs"] >= graphs + 2, "encoder and heads should be compiled one by one"


@pytest.mark.parametrize("how", ["manual", "MultiTaskModule", "logged", "activation"])
def test_a_compiled_encoder_agrees_with_the_textbook_in_every_kind_of_module(quiet_trainer, how: str) -> None:
    batches: Any = vector_batches(T, STEPS)
    norm_of: Any = "activation" if how == "activation" else "weight"
    twin = Automatic(T)
    trajectory = textbook.train(
        twin,
        twin.forward_for_textbook,
        batches,
        [twin.encoder[2].weight],
        network_sgd(twin.parameters()),
        norm_of=norm_of,
    )
    model: L.LightningModule
    options: dict[str, Any] = {"tasks": NAMES, "heads": Automatic(T).heads(), "norm_of": norm_of}
    if how == "manual":
        model = Manual(T)
    elif how == "MultiTaskModule":
        model, options = multi_task_module(T), {}
        batches = [(batch["x"], {name: batch[name] for name in NAMES}) for batch in batches]
    elif how == "logged":
        model = Logs(T)
        options["tasks"] = {task: f"train/{task}" for task in NAMES}
    else:
        model = Automatic(T)
    model.get_submodule("encoder").compile(backend="aot_eager")
    gradnorm = GradNorm(shared_layer="encoder.2", **options)
    recorder = Recorder(gradnorm)
    if isinstance(model, Manual):
        model.gradnorm = [gradnorm]
    before = traces(model)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin, 1e-8)
    assert_clean(model, before)


class Logs(Automatic):
    def training_step(self, batch, batch_idx):
        losses = self.task_losses(batch)
        for task, loss in losses.items():
            self.log(f"train/{task}", loss)
        return sum(losses.values())


def test_a_whole_module_that_logs_its_losses_agrees_with_the_textbook(quiet_trainer) -> None:
    batches = vector_batches(T, STEPS)
    twin, trajectory = learn(lambda: Automatic(T), "encoder.2", batches)
    model = Logs(T)
    names = {task: f"train/{task}" for task in NAMES}
    gradnorm = GradNorm(names, shared_layer="encoder.2", heads=model.heads())
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(torch.compile(model, backend="aot_eager"), Batches(batches))
    assert_agrees(recorder, model, trajectory, twin, 1e-8)


def test_a_compiled_trunk_without_heads_is_refused_not_walked_twice(quiet_trainer) -> None:
    model = in_place("encoder", *HEADS)(Automatic(T), "aot_eager")
    with pytest.raises(ValueError, match=r"through a module compiled with torch.compile.*Name the heads with heads="):
        quiet_trainer(callbacks=[GradNorm(NAMES, shared_layer="encoder.2")]).fit(model, Batches(vector_batches(T, 3)))


def test_a_compiled_trunk_with_plain_heads_needs_no_heads_named(quiet_trainer) -> None:
    batches = vector_batches(T, STEPS)
    twin, trajectory = learn(lambda: Automatic(T), "encoder.2", batches)
    model = in_place("encoder")(Automatic(T), "aot_eager")
    gradnorm = GradNorm(NAMES, shared_layer="encoder.2")
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin, 1e-8)


def test_a_whole_module_needs_no_heads_named(quiet_trainer) -> None:
    batches = vector_batches(T, STEPS)
    twin, trajectory = learn(lambda: Called(T), "encoder.2", batches)
    model = Called(T)
    gradnorm = GradNorm(NAMES, shared_layer="encoder.2")
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(torch.compile(model, backend="aot_eager"), Batches(batches))
    assert_agrees(recorder, model, trajectory, twin, 1e-8)


def test_all_of_many_heads_are_compiled(quiet_trainer) -> None:
    """torch.compile keeps at most eight versions of one function, and then runs eagerly."""
    names = [f"task{i}" for i in range(12)]

    class Many(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(5, 6)
            self.heads = nn.ModuleDict({name: nn.Linear(6, 2 + i) for i, name in enumerate(names)})

        def training_step(self, batch, batch_idx):
            z = self.encoder(batch)
            losses = {name: head(z).square().mean() for name, head in self.heads.items()}
            return {"loss": sum(losses.values()), **losses}

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    gradnorm = GradNorm(names, shared_layer="encoder", heads={name: f"heads.{name}" for name in names})
    model = torch.compile(Many(), backend="eager")
    quiet_trainer(callbacks=[gradnorm]).fit(model, Batches([torch.randn(4, 5)] * 2))
    assert counters["stats"]["unique_graphs"] == len(names), "the heads, each by itself"
