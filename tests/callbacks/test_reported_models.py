"""Models that cause trouble in other libraries: each trains with nothing named, and agrees with the textbook."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from found import NAMES, Found, MakeTrainer, assert_follows_textbook
from harness import Batches
from models import FEATURES, HIDDEN, INPUTS, OUTPUTS, Batch, vector_batches, vector_encoder
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint_sequential

from lightning_gradnorm import GradNorm


class Experts(Found):
    """Multi-gate mixture of experts: each task mixes the experts' outputs with its own gate."""

    W = ("experts.1.weight",)
    heads_found = "heads: "

    def build(self) -> None:
        super().build()
        self.trunk = nn.Linear(INPUTS, HIDDEN)
        self.experts = nn.ModuleList([nn.Linear(HIDDEN, FEATURES) for _ in range(2)])
        self.gates = nn.ModuleDict({task: nn.Linear(INPUTS, 2) for task in self.tasks})

    def represent(self, x: Tensor) -> Any:
        h = torch.tanh(self.trunk(x))
        return x, torch.stack([torch.tanh(expert(h)) for expert in self.experts], dim=1)

    def predict(self, task: str, z: Any) -> Tensor:
        x, of_experts = z
        mixture = (self.gates[task](x).softmax(-1).unsqueeze(-1) * of_experts).sum(1)
        return self.get_submodule(f"{task}_head")(mixture)


class CrossStitch(Found):
    """A trunk for each task, whose activations are mixed by a matrix that all tasks share."""

    W = ("mixing",)
    heads_found = "heads: "

    def build(self) -> None:
        super().build()
        del self.trunk
        self.trunks = nn.ModuleDict({task: nn.Linear(INPUTS, FEATURES) for task in self.tasks})
        T = len(self.tasks)
        self.mixing = nn.Parameter(0.8 * torch.eye(T) + 0.1)

    def represent(self, x: Tensor) -> Tensor:
        apart = torch.stack([torch.tanh(trunk(x)) for trunk in self.trunks.values()])
        return torch.tanh(torch.einsum("st,tbf->sbf", self.mixing @ self.mixing, apart))

    def predict(self, task: str, z: Tensor) -> Tensor:
        return self.get_submodule(f"{task}_head")(z[self.tasks.index(task)])


class Conditioned(Found):
    """One decoder for all tasks; an embedding selects the task."""

    W = ("decoder.2.weight",)
    heads_found = "heads: none"

    def build(self) -> None:
        self.trunk = vector_encoder()
        self.embedding = nn.Embedding(len(self.tasks), FEATURES)
        self.decoder = nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS))

    def predict(self, task: str, z: Tensor) -> Tensor:
        return self.decoder(z + self.embedding(torch.tensor(self.tasks.index(task))))


class UNet(Found):
    """Skip connections around the bottleneck, where one task has its own head."""

    W = ("bottleneck.weight",)

    def build(self) -> None:
        super().build()
        del self.trunk
        self.down, self.bottleneck = nn.Linear(INPUTS, HIDDEN), nn.Linear(HIDDEN, FEATURES)
        self.up = nn.Linear(FEATURES + HIDDEN, FEATURES)

    def represent(self, x: Tensor) -> Any:
        skip = torch.tanh(self.down(x))
        deep = torch.tanh(self.bottleneck(skip))
        return deep, torch.tanh(self.up(torch.cat([deep, skip], dim=1)))

    def predict(self, task: str, z: Any) -> Tensor:
        return self.get_submodule(f"{task}_head")(z[0 if task == "depth" else 1])


class ByMethod(Found):
    """The trunk's forward classifies; its features come from another method, as in timm."""

    class Trunk(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.classifier = vector_encoder(), nn.Linear(FEATURES, 2)

        def forward_features(self, x: Tensor) -> Tensor:
            return self.layers(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.forward_features(x))

    W = ("trunk.layers.2.weight",)

    def build(self) -> None:
        super().build()
        self.trunk = self.Trunk()

    def represent(self, x: Tensor) -> Tensor:
        return self.trunk.forward_features(x)


class OneModuleOfHeads(Found):
    """All predictions come out of one call of one module."""

    class Heads(nn.Module):
        def __init__(self, tasks: tuple[str, ...]) -> None:
            super().__init__()
            self.of = nn.ModuleDict({task: nn.Linear(FEATURES, OUTPUTS) for task in tasks})

        def forward(self, z: Tensor) -> dict[str, Tensor]:
            return {task: head(z) for task, head in self.of.items()}

    heads_found = "heads: depth → predictions.of.depth"

    def build(self) -> None:
        self.trunk, self.predictions = vector_encoder(), self.Heads(self.tasks)

    def represent(self, x: Tensor) -> dict[str, Tensor]:
        return self.predictions(self.trunk(x))

    def predict(self, task: str, z: Any) -> Tensor:
        return z[task]


class Pruned(Found):
    """A pruned layer: its weight is made of a parameter and a mask before each call."""

    W = ("trunk.2.weight_orig",)
    can_be_copied = False

    def build(self) -> None:
        super().build()
        prune.random_unstructured(self.trunk[2], "weight", amount=0.3)


class SpectralNorm(Found):
    """The old spectral norm, a hook that makes the weight in each call."""

    W = ("trunk.2.weight_orig",)
    can_be_copied = False

    def build(self) -> None:
        super().build()
        nn.utils.spectral_norm(self.trunk[2])


class Bayesian(Found):
    """Weights drawn in each forward pass from learned means and widths."""

    W = ("mean",)

    def build(self) -> None:
        super().build()
        self.trunk = nn.Linear(INPUTS, HIDDEN)
        self.batches = 0
        self.mean = nn.Parameter(0.3 * torch.randn(FEATURES, HIDDEN))
        self.width = nn.Parameter(torch.full((FEATURES, HIDDEN), -3.0))

    def represent(self, x: Tensor) -> Tensor:
        self.batches += 1
        noise = torch.randn(
            self.mean.shape, dtype=self.mean.dtype, generator=torch.Generator().manual_seed(self.batches)
        )
        weight = self.mean + F.softplus(self.width) * noise
        return torch.tanh(F.linear(torch.tanh(self.trunk(x)), weight))


class Soup(Found):
    """The mean of several equally deep weights: all ranks choose the model's first."""

    W = ("several.0",)

    def build(self) -> None:
        super().build()
        self.trunk = nn.Linear(INPUTS, HIDDEN)
        self.several = nn.ParameterList([torch.randn(FEATURES, HIDDEN) for _ in range(6)])

    def represent(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(torch.tanh(self.trunk(x)), torch.stack(list(self.several)).mean(0)))


class HyperNetwork(Found):
    """A small network makes the weights of the last shared layer. The layer before it is deeper."""

    W = ("trunk.weight",)

    def build(self) -> None:
        super().build()
        self.trunk = nn.Linear(INPUTS, HIDDEN)
        self.code, self.maker = nn.Parameter(torch.randn(4)), nn.Linear(4, FEATURES * HIDDEN)

    def represent(self, x: Tensor) -> Tensor:
        layer = {"weight": 0.3 * self.maker(self.code).view(FEATURES, HIDDEN)}
        template = nn.Linear(HIDDEN, FEATURES, bias=False, device="meta")
        return torch.tanh(torch.func.functional_call(template, layer, (torch.tanh(self.trunk(x)),)))


class Averaged(Found):
    """Keeps a moving average of its trunk, and a frozen teacher for one task."""

    heads_found = "heads: depth → depth_head, seg → seg_head"

    def build(self) -> None:
        super().build()
        self.average = AveragedModel(self.trunk, multi_avg_fn=None)
        self.teacher = copy.deepcopy(self.trunk).requires_grad_(False)

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        losses = super().task_losses(batch)
        self.average.update_parameters(self.trunk)
        consistency = F.mse_loss(self.trunk(batch["x"]), self.teacher(batch["x"] + 0.1))
        return losses | {"normal": losses["normal"] + consistency}


class Reversal(torch.autograd.Function):
    """Turns the gradient around."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, strength: float) -> Tensor:
        ctx.strength = strength
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return -ctx.strength * gradient, None


class Adversarial(Found):
    """One head's gradient is turned around, as in domain-adversarial training."""

    def predict(self, task: str, z: Tensor) -> Tensor:
        return super().predict(task, Reversal.apply(z, 0.3) if task == "depth" else z)  # type: ignore[no-untyped-call]


class Sequentially(Found):
    """The trunk is checkpointed in pieces."""

    def represent(self, x: Tensor) -> Tensor:
        return checkpoint_sequential(self.trunk, 2, x, use_reentrant=False)


class WithItsHook(Found):
    """A hook of the user's own replaces the trunk's output."""

    can_be_copied = False

    def build(self) -> None:
        super().build()
        self.trunk.register_forward_hook(lambda module, args, output: 1.5 * output)


class PartlyInEvaluation(Found):
    """A batch norm of the trunk stays in evaluation mode, as in fine-tuning."""

    W = ("trunk.3.weight",)

    def build(self) -> None:
        super().build()
        self.trunk = nn.Sequential(
            nn.Linear(INPUTS, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, FEATURES), nn.Tanh()
        )

    def represent(self, x: Tensor) -> Tensor:
        self.trunk[1].eval()
        return self.trunk(x)


class Attention(Found):
    """A token for each task, all of them attending to the same image tokens; each head reads its own token."""

    W = ("trunk.linear2.weight",)

    def build(self) -> None:
        super().build()
        self.embed, self.tokens = nn.Linear(1, FEATURES), nn.Parameter(torch.randn(len(self.tasks), FEATURES))
        self.trunk = nn.TransformerEncoderLayer(FEATURES, 2, 64, dropout=0.0, batch_first=True)

    def represent(self, x: Tensor) -> Tensor:
        tokens = torch.cat([self.tokens.expand(len(x), -1, -1), self.embed(x.unsqueeze(-1))], dim=1)
        return self.trunk(tokens)

    def predict(self, task: str, z: Tensor) -> Tensor:
        return super().predict(task, z[:, self.tasks.index(task)])


class MessagePassing(Found):
    """Two rounds of sums over a graph's edges with the same layer."""

    W = ("trunk.weight",)

    def build(self) -> None:
        super().build()
        self.embed, self.trunk = nn.Linear(INPUTS, FEATURES), nn.Linear(FEATURES, FEATURES)

    def represent(self, x: Tensor) -> Tensor:
        h, source, target = self.embed(x), torch.tensor([0, 1, 2, 3, 0]), torch.tensor([1, 2, 3, 0, 2])
        for _ in range(2):
            h = torch.tanh(h + torch.zeros_like(h).index_add(0, target, self.trunk(h)[source]))
        return h


class DropPath(Found):
    """The last shared block is left out of some batches."""

    def build(self) -> None:
        super().build()
        self.block, self.batches = nn.Linear(FEATURES, FEATURES), 0

    W = ("block.weight",)

    def represent(self, x: Tensor) -> Tensor:
        z, self.batches = self.trunk(x), self.batches + 1
        return torch.tanh(z + self.block(z)) if self.batches != 3 else z

    def oracle_options(self, batches: Any) -> dict[str, Any]:
        return {"skip_steps": [2]}  # all gradients at the block are 0, so that no task takes part


MODELS: dict[str, type[Found]] = {
    "a mixture of experts": Experts,
    "cross-stitch units": CrossStitch,
    "a decoder conditioned on the task": Conditioned,
    "a U-Net": UNet,
    "features from another method": ByMethod,
    "all heads in one module": OneModuleOfHeads,
    "a pruned layer": Pruned,
    "an old spectral norm": SpectralNorm,
    "Bayesian weights": Bayesian,
    "a soup of weights": Soup,
    "a hypernetwork": HyperNetwork,
    "an average of the weights beside them": Averaged,
    "gradient reversal": Adversarial,
    "a trunk checkpointed in pieces": Sequentially,
    "a hook of the user's own": WithItsHook,
    "a batch norm in evaluation mode": PartlyInEvaluation,
    "a token for each task": Attention,
    "message passing": MessagePassing,
    "a block that is left out at times": DropPath,
}


@pytest.mark.each_value_once
@pytest.mark.parametrize("heads", ["auto", None])
@pytest.mark.parametrize("name", MODELS)
def test_trained_with_nothing_named(name: str, heads: Any, quiet_trainer: MakeTrainer) -> None:
    make = MODELS[name]
    found = assert_follows_textbook(quiet_trainer, lambda: make(3), heads=heads)
    if heads == "auto":
        assert make(3).heads_found in found


# the same network, wrapped or built in other ways --------------------------------------------------------------------


class Inside(Found):
    """A LightningModule inside another."""

    def build(self) -> None:
        self.inner = Found(len(self.tasks))

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        return self.inner.task_losses(batch)


class InParallel(Found):
    """`nn.DataParallel` around the trunk."""

    def build(self) -> None:
        super().build()
        self.trunk = nn.DataParallel(self.trunk)


class Traced(Found):
    """A trunk that `torch.jit.trace` has made."""

    def __init__(self, T: int) -> None:
        super().__init__(T)
        self.trunk = torch.jit.trace(self.trunk, torch.randn(4, INPUTS, dtype=torch.float64))  # type: ignore[no-untyped-call]


class CompiledFunction(Found):
    """The losses come from a compiled function, not from a module."""

    def __init__(self, T: int) -> None:
        super().__init__(T)
        self.__dict__["compiled"] = torch.compile(super().task_losses, backend="eager")

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        return self.compiled(batch)


class Late(Found):
    """Its layers are made in `setup`, or in `configure_model`."""

    where = "setup"

    def build(self) -> None:
        pass

    def make(self) -> None:
        like = Found(len(self.tasks))
        for name, child in like.named_children():
            setattr(self, name, child)

    def setup(self, stage: str) -> None:
        if self.where == "setup":
            self.make()

    def configure_model(self) -> None:
        if self.where == "configure_model" and not hasattr(self, "trunk"):
            self.make()


class InConfigureModel(Late):
    """Its layers are made in `configure_model`."""

    where = "configure_model"


class Behind(Found):
    """The trunk is a property; the modules have another name."""

    def build(self) -> None:
        super().build()
        self.parts = nn.ModuleDict({"first": self.trunk})
        del self.trunk

    def represent(self, x: Tensor) -> Tensor:
        return self.features(x)

    @property
    def features(self) -> nn.Module:
        return self.parts["first"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("make", [Inside, InParallel, Traced, CompiledFunction, Late, InConfigureModel, Behind])
def test_wrapped_or_built_in_another_way_it_gets_the_same_weights(
    make: type[Found], quiet_trainer: MakeTrainer
) -> None:
    batches = vector_batches(3, 4)
    weights = []
    for one in (Found, make):
        gradnorm = GradNorm(NAMES)
        quiet_trainer(callbacks=[gradnorm]).fit(one(3), Batches(batches))
        weights.append(gradnorm.weights)
    assert weights[0] == pytest.approx(weights[1], rel=1e-9)
    assert max(abs(weight - 1) for weight in weights[0].values()) > 1e-3
