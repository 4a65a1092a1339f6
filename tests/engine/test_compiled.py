"""A model compiled by torch.compile, or any part of it, trains as the textbook says; as a whole, it is not run twice for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import textbook
import torch
from harness import Batches, BeforeBatch, Recorder, assert_agrees, assert_clean, traces
from models import Automatic, Convolutional, Manual, image_batches, multi_task_module, network_sgd, vector_batches
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from lightning_gradnorm import GradNorm
from lightning_gradnorm.gradients import ReplayedGradients

T, STEPS = 3, 10
NAMES = ["seg", "depth", "normal"]

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # torch.compile's own
    pytest.mark.filterwarnings("ignore:`torch.jit.script"),
]
BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.fixture(autouse=True)
def _nothing_compiled_before() -> None:
    torch.compiler.reset()
    counters.clear()


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


def _own_forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    return super(type(self), self).forward(x)


def _wrap(*names: str, **options: Any) -> Callable[[Any, str], Any]:
    def compiled(model: Any, backend: str) -> Any:
        for name in names:
            parent, _, attribute = name.rpartition(".")
            owner = model.get_submodule(parent)
            setattr(owner, attribute, torch.compile(getattr(owner, attribute), backend=backend, **options))
        return model

    return compiled


def _in_place(*names: str) -> Callable[[Any, str], Any]:
    """`.compile()` does nothing for classes of torch.nn itself, which is why these get a class of their own."""

    def compiled(model: Any, backend: str) -> Any:
        for name in names:
            module = model.get_submodule(name)
            if type(module).__module__.startswith("torch."):
                module.__class__ = type("Own", (type(module),), {"forward": _own_forward})
            model.get_submodule(name).compile(backend=backend)
        return model

    return compiled


def _whole(model: Any, backend: str) -> Any:
    return torch.compile(model, backend=backend)


HEADS = [f"{task}_head" for task in NAMES]
CASES: dict[str, tuple[type[Automatic], str, Callable[[Any, str], Any]]] = {
    "encoder, torch.compile": (Automatic, "encoder.2", _wrap("encoder")),
    "encoder, .compile()": (Automatic, "encoder.2", _in_place("encoder")),
    "shared layer alone": (Automatic, "encoder.2", _wrap("encoder.2")),
    "heads, torch.compile": (Automatic, "encoder.2", _wrap(*HEADS)),
    "heads, .compile()": (Automatic, "encoder.2", _in_place(*HEADS)),
    "encoder and heads": (Automatic, "encoder.2", _in_place("encoder", *HEADS)),
    "what follows the shared layer": (Automatic, "encoder.2", _wrap("encoder.3")),
    "what precedes the shared layer": (Automatic, "encoder.2", _wrap("encoder.0")),
    "convolutions with BatchNorm": (Convolutional, "encoder.3", _wrap("encoder")),
    "a layer that is never called": (Functional, "encoder.last", _wrap("encoder")),
    "all of the encoder is shared layer": (Automatic, "encoder", _wrap("encoder")),
    "one network of encoder and heads": (Nested, "network.encoder.2", _in_place("network")),
    "one network, torch.compile": (Nested, "network.encoder.2", _wrap("network")),
    "whole module": (Automatic, "encoder.2", _whole),
    "whole module with one network": (Nested, "network.encoder.2", _whole),
    "whole module that calls itself": (Called, "encoder.2", _whole),
    "the module's own .compile()": (
        Called,
        "encoder.2",
        lambda model, backend: model.compile(backend=backend) or model,
    ),
}


REPLAYED = {"what follows the shared layer"}
"""Where the gradients of the tasks cannot be followed to the shared layer: a module around it is run again."""


@pytest.fixture
def replays(monkeypatch) -> list[str]:
    """The names of modules that were run again, each time one more."""
    names: list[str] = []
    run_again = ReplayedGradients._run_again

    def noted(reader: ReplayedGradients, *args: Any) -> None:
        names.append(reader._name)
        run_again(reader, *args)

    monkeypatch.setattr(ReplayedGradients, "_run_again", noted)
    return names


def _shared(model: Automatic, name: str) -> list[nn.Parameter]:
    module = model.get_submodule(name)
    return [module.weight] if hasattr(module, "weight") else list(module.parameters())


def _textbook(make: Callable[[], Automatic], shared_layer: str, batches: list[Any]) -> tuple[Automatic, Any]:
    twin = make()
    shared, optimizer = _shared(twin, shared_layer), network_sgd(twin.parameters())
    return twin, textbook.train(twin, twin.forward_for_textbook, batches, shared, optimizer)


def _assert_same(recorder: Recorder, model: nn.Module, trajectory: textbook.Trajectory, twin: nn.Module) -> None:
    for found, expected in zip(recorder.weights, trajectory.weights, strict=True):
        assert found == pytest.approx(expected, abs=1e-8)
    state = {name.replace("_orig_mod.", ""): value for name, value in model.state_dict().items()}
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(state[name], value, rtol=0, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_it_agrees_with_the_textbook_where_this_is_compiled(quiet_trainer, replays, case: str, backend: str) -> None:
    kind, shared_layer, compiled = CASES[case]
    batches = (image_batches if kind is Convolutional else vector_batches)(T, STEPS)
    twin, trajectory = _textbook(lambda: kind(T), shared_layer, batches)
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
        _assert_same(recorder, model, trajectory, twin)
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
    twin, trajectory = _textbook(lambda: Automatic(T), "encoder.2", batches)
    model = Logs(T)
    names = {task: f"train/{task}" for task in NAMES}
    gradnorm = GradNorm(names, shared_layer="encoder.2", heads=model.heads())
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(torch.compile(model, backend="aot_eager"), Batches(batches))
    assert_agrees(recorder, model, trajectory, twin, 1e-8)


def test_a_compiled_trunk_without_heads_is_refused_not_walked_twice(quiet_trainer) -> None:
    model = _in_place("encoder", *HEADS)(Automatic(T), "aot_eager")
    with pytest.raises(ValueError, match=r"through a module compiled with torch.compile.*Name the heads with heads="):
        quiet_trainer(callbacks=[GradNorm(NAMES, shared_layer="encoder.2")]).fit(model, Batches(vector_batches(T, 3)))


def test_a_compiled_trunk_with_plain_heads_needs_no_heads_named(quiet_trainer) -> None:
    batches = vector_batches(T, STEPS)
    twin, trajectory = _textbook(lambda: Automatic(T), "encoder.2", batches)
    model = _in_place("encoder")(Automatic(T), "aot_eager")
    gradnorm = GradNorm(NAMES, shared_layer="encoder.2")
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin, 1e-8)


def test_a_whole_module_needs_no_heads_named(quiet_trainer) -> None:
    batches = vector_batches(T, STEPS)
    twin, trajectory = _textbook(lambda: Called(T), "encoder.2", batches)
    model = Called(T)
    gradnorm = GradNorm(NAMES, shared_layer="encoder.2")
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(torch.compile(model, backend="aot_eager"), Batches(batches))
    assert_agrees(recorder, model, trajectory, twin, 1e-8)


def test_all_of_many_heads_are_compiled(quiet_trainer) -> None:
    """torch.compile keeps no more than eight versions of one function, and runs what comes then eagerly."""
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
        (_wrap("encoder"), BEFORE_THE_LAYER),
        (_in_place("encoder", *HEADS), [*BEFORE_THE_LAYER, *HEADS]),
        (_whole, [*BEFORE_THE_LAYER, *HEADS]),
    ],
)
def test_what_precedes_a_layer_deep_inside_stays_compiled_and_is_not_run_again(
    quiet_trainer, replays, compiled: Callable[[Any, str], Any], graphs: list[str]
) -> None:
    batches = vector_batches(T, STEPS)
    twin, trajectory = _textbook(lambda: Deep(T), "encoder.blocks.2.two", batches)
    model = Deep(T)
    given = compiled(model, "aot_eager")
    gradnorm = GradNorm(NAMES, shared_layer="encoder.blocks.2.two", heads=model.heads())
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(given, Batches(batches))
    _assert_same(recorder, model, trajectory, twin)
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
    """Ten blocks, of which torch.compile would run the ninth and tenth eagerly, or refuse them with ``fullgraph``."""

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
    """A layer norm, of which the encoder and one of its modules know; behind the last layer there is a module to compile."""

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


def _both(model: Any, backend: str) -> Any:
    model.encoder.compile(backend=backend)
    return _wrap("encoder")(model, backend)


ENCODERS: dict[str, tuple[type[nn.Module], str, Callable[[Any, str], Any], list[str]]] = {
    "many blocks": (Stack, "encoder.last", _wrap("encoder", fullgraph=True), []),
    "a depth that changes": (Recurrent, "encoder.last", _wrap("encoder"), []),
    "tied weights": (Tied, "encoder.last", _wrap("encoder"), ["encoder"]),
    "tied weights, one compiled": (Tied, "encoder.last", _wrap("encoder.other"), ["encoder"]),
    "a module of two names": (OfTwoNames, "encoder.last", _wrap("encoder.behind"), ["encoder"]),
    "a last layer that is not called": (Attends, "encoder.attention.out_proj", _wrap("encoder"), []),
    "two kinds of compilation": (Trunk, "encoder.neck", _both, []),
}


@pytest.mark.parametrize("case", ENCODERS)
def test_a_compiled_encoder_may_have(quiet_trainer, replays, case: str) -> None:
    encoder, shared_layer, compiled, run_again = ENCODERS[case]

    class Model(Automatic):
        def build(self) -> None:
            super().build()
            self.encoder = encoder()

    batches = [*vector_batches(T, 4), *vector_batches(T, 4, size=6)]
    twin, trajectory = _textbook(lambda: Model(T), shared_layer, batches)
    model = Model(T)
    parameters = dict(model.named_parameters())
    given = compiled(model, "aot_eager")
    gradnorm = GradNorm(NAMES, shared_layer=shared_layer, heads=model.heads())
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(given, Batches(batches))
    _assert_same(recorder, model, trajectory, twin)
    assert sorted(set(replays)) == run_again
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name.replace("_orig_mod.", "")]


class Copies(L.Callback):
    """Takes a copy of the model in the middle of training, as an average of weights or a teacher does."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        encoder = pl_module.encoder._orig_mod
        self.encoder = copy.deepcopy(encoder)
        self.told = {name: value.clone() for name, value in encoder.state_dict().items()}


def test_a_copy_made_in_mid_training_is_a_network_of_its_own(quiet_trainer) -> None:
    model = _wrap("encoder")(Automatic(T), "aot_eager")
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
    model = _wrap("encoder.3")(DropsOut(T), "inductor")
    gradnorm = GradNorm(NAMES, shared_layer="encoder.2", heads=model.heads())
    with pytest.raises(RuntimeError, match="running 'encoder' again did not give what it gave in the forward pass"):
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
    model = _wrap("encoder.3")(DropsOut(T), "eager")  # traced, but with torch's own random numbers
    gradnorm = GradNorm(NAMES, shared_layer="encoder.2", heads=model.heads())
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder, BeforeBatch(seeded)]).fit(model, Batches(batches))
    assert_agrees(recorder, model, trajectory, twin, 1e-8)
