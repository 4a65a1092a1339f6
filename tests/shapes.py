"""Shapes of networks that people train: what the shared layer is, what stands around it, how the heads are called.

A `Case` is one row of a table: the network, what its inputs look like, the name given as `shared_layer` and the parameters
that this name must stand for. All networks have three tasks, are float64 and are built from a seed, so that two calls give
the same parameters: one goes to the Trainer, one to the textbook.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import pytest
import torch
from models import FEATURES, HIDDEN, INPUTS, OUTPUTS, TASKS, Automatic, Batch
from textbook import Forward
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

SIZE = 4
WORDS = 9
Build = Callable[[], nn.Module]


def chain(**layers: nn.Module) -> nn.Sequential:
    """A Sequential whose layers have names."""
    return nn.Sequential(OrderedDict(layers))


def readout(features: int = FEATURES) -> nn.Sequential:
    """A head for a representation of any shape with so many values for each example."""
    return nn.Sequential(nn.Flatten(), nn.Linear(features, OUTPUTS))


Heads = Mapping[str, nn.Module]
Run = Callable[[nn.Module, Heads, Tensor], dict[str, Tensor]]
Loss = Callable[[Tensor, Tensor], Tensor]


def each_once(encoder: Callable[[Tensor], Any], heads: Heads, x: Tensor) -> dict[str, Tensor]:
    z = encoder(x)
    return {task: head(z) for task, head in heads.items()}


class Shape(Automatic):
    """An encoder and a head for each task, each made by a function, and how they are run."""

    def __init__(
        self, encoder: Build, head: Build = readout, run: Run = each_once, loss: Loss = F.mse_loss, seed: int = 3
    ) -> None:
        self._makes, self._run, self._loss = (encoder, head), run, loss
        super().__init__(3, seed)

    def build(self) -> None:
        encoder, head = self._makes
        self.encoder = encoder()
        for task in self.tasks:
            setattr(self, f"{task}_head", head())

    def task_losses(self, batch: Batch) -> dict[str, Tensor]:
        heads = {task: self.get_submodule(f"{task}_head") for task in self.tasks}
        outputs = self._run(self.encoder, heads, batch["x"])
        return {task: self._loss(output, batch[task]) for task, output in outputs.items()}

    def for_textbook(self) -> Shape:
        """The same network without what cannot be differentiated twice: modules have a `plain` way to say the same."""
        for module in self.modules():
            if hasattr(module, "plain"):
                module.plain = True
        return self

    def forward_for_textbook(self, batch: Batch) -> Forward:
        """The losses, and all that the encoder returned on the way to them."""
        representation: list[Tensor] = []

        def note(encoder: nn.Module, inputs: Any, output: Any) -> None:
            representation.extend(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))

        with self.encoder.register_forward_hook(note):
            return Forward(self.task_losses(batch), representation=representation)


@dataclass(frozen=True)
class Case:
    """One network, and what `shared_layer` names in it."""

    make: Callable[[], Shape]
    layer: str | None = "encoder.layer"
    """What is given as `shared_layer`."""
    W: tuple[str, ...] = ("encoder.layer.weight",)
    """The parameters which that is."""
    inputs: tuple[int, ...] = (INPUTS,)
    """Shape of one example."""
    words: bool = False
    """The inputs are indices below `WORDS`."""
    modes: tuple[bool, ...] = (False, True)
    """Without `heads=`, with `heads=`, or both: how it can be trained."""
    marks: tuple[Any, ...] = ()
    """Marks of pytest, of the case that is not as it should be, or that warns."""
    heads: Mapping[str, str] = field(default_factory=lambda: {task: f"{task}_head" for task in TASKS[:3]})

    def batches(self, count: int, seed: int = 17) -> list[Batch]:
        generator = torch.Generator().manual_seed(seed)
        batches = []
        for _ in range(count):
            shape = (SIZE, *self.inputs)
            x = (
                torch.randint(WORDS, shape, generator=generator)
                if self.words
                else torch.randn(shape, generator=generator, dtype=torch.float64)
            )
            targets = {
                task: (0.5 + 0.7 * i) * torch.randn(SIZE, OUTPUTS, generator=generator, dtype=torch.float64)
                for i, task in enumerate(TASKS[:3])
            }
            batches.append({"x": x, **targets})
        return batches


def simple(
    encoder: Build,
    inputs: tuple[int, ...] = (INPUTS,),
    features: int = FEATURES,
    head: Build | None = None,
    run: Run = each_once,
    loss: Loss = F.mse_loss,
    **options: Any,
) -> Case:
    """A case whose heads are linear in the representation, unless they are given."""
    return Case(lambda: Shape(encoder, head or (lambda: readout(features)), run, loss), inputs=inputs, **options)


# ---- what the shared layer is ----------------------------------------------------------------------------------------


def between(layer: nn.Module, stem: nn.Module | None = None) -> nn.Sequential:
    """The layer between a layer before it and a nonlinearity after it."""
    return chain(stem=stem or nn.Linear(INPUTS, HIDDEN), before=nn.Tanh(), layer=layer, after=nn.Tanh())


def plain_layer() -> nn.Sequential:
    return between(nn.Linear(HIDDEN, FEATURES))


class Functional(nn.Module):
    """Uses parameters without a module around them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, HIDDEN)
        self.mixing = nn.Parameter(0.4 * torch.randn(HIDDEN, FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(torch.tanh(self.stem(x)) @ self.mixing)


class Fourier(nn.Module):
    """Mixes the frequencies of a sequence, as Fourier neural operators do: its parameter is complex."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, HIDDEN)
        self.modes = nn.Parameter(torch.randn(HIDDEN // 2 + 1, FEATURES, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh((torch.fft.rfft(torch.tanh(self.stem(x))) @ self.modes).abs())


class SparseEmbedding(nn.Embedding):
    """Its gradient is a sparse tensor, which cannot be differentiated again."""

    plain = False

    def forward(self, x: Tensor) -> Tensor:
        return F.embedding(x, self.weight, sparse=not self.plain)


class Twosome(nn.Module):
    """A bilinear layer, which takes two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, HIDDEN)
        self.layer = nn.Bilinear(HIDDEN, INPUTS, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.tanh(self.stem(x)), x))


class Bag(nn.EmbeddingBag):
    """The mean of a bag's embeddings; the fused kernel has no second derivative, a mean of embeddings has."""

    plain = False

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return F.embedding(x, self.weight).mean(1) if self.plain else super().forward(x)


class Attention(nn.Module):
    """A sequence's attention to itself, by `nn.MultiheadAttention` or by `F.scaled_dot_product_attention`."""

    def __init__(self, width: int = 4, functional: bool = False, causal: bool = False) -> None:
        super().__init__()
        self.functional, self.causal = functional, causal
        if functional:
            self.qkv = nn.Linear(width, 3 * width)
            self.layer = nn.Linear(width, width)
        else:
            self.layer = nn.MultiheadAttention(width, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        if not self.functional:
            return self.layer(x, x, x, need_weights=False)[0]
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.layer(attended.transpose(1, 2).flatten(2))


class Recurrent(nn.Module):
    """An LSTM or a GRU, and perhaps a linear layer behind it."""

    def __init__(self, kind: type[nn.RNNBase], project: bool = False, inputs: int = INPUTS) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, 4)
        self.rnn = kind(4, FEATURES, batch_first=True)
        self.project = nn.Linear(FEATURES, FEATURES) if project else None

    def forward(self, x: Tensor) -> Tensor:
        last = self.rnn(self.stem(x))[0][:, -1]
        return last if self.project is None else torch.tanh(self.project(last))


PARAMETRIZED = "encoder.layer.parametrizations.weight"
RNN = ("encoder.rnn.weight_ih_l0", "encoder.rnn.weight_hh_l0", "encoder.rnn.bias_ih_l0", "encoder.rnn.bias_hh_l0")
parametrizations = nn.utils.parametrizations


def parametrized(make: Callable[[nn.Module], nn.Module], *originals: str, size: int = FEATURES, **options: Any) -> Case:
    return simple(
        lambda: between(make(nn.Linear(HIDDEN, size))),
        features=size,
        W=tuple(f"{PARAMETRIZED}.{original}" for original in originals),
        **options,
    )


def old_style(norm: Callable[[nn.Module], nn.Module], *parameters: str, **options: Any) -> Case:
    """`torch.nn.utils.weight_norm` and its like, which put a computed `weight` in the place of the parameter."""
    marks = (pytest.mark.filterwarnings("ignore:.*torch.nn.utils.weight_norm.*deprecated"), *options.pop("marks", ()))
    W = tuple(f"encoder.layer.{parameter}" for parameter in parameters)
    return simple(lambda: between(norm(nn.Linear(HIDDEN, FEATURES))), W=W, marks=marks, **options)


def attentive(*parameters: str, **options: Any) -> Case:
    W = tuple(f"encoder.attention.layer.{parameter}" for parameter in parameters)
    return simple(
        lambda: chain(stem=nn.Linear(INPUTS, 4), attention=Attention()),
        (3, INPUTS),
        12,
        **{"layer": W[0], "W": W, **options},
    )


LAYERS: dict[str, Case] = {
    "nn.Parameter, used functionally": simple(Functional, layer="encoder.mixing", W=("encoder.mixing",)),
    "nn.Parameter, complex": simple(Fourier, layer="encoder.modes", W=("encoder.modes",)),
    "Linear": simple(lambda: between(nn.Linear(HIDDEN, FEATURES))),
    "Bilinear": simple(Twosome),
    "Conv1d": simple(lambda: between(nn.Conv1d(3, 2, 3), nn.Conv1d(2, 3, 1)), (2, 6), 8),
    "Conv2d": simple(lambda: between(nn.Conv2d(3, 2, 3), nn.Conv2d(2, 3, 1)), (2, 4, 4), 8),
    "Conv2d, grouped and strided": simple(
        lambda: between(nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Conv2d(2, 4, 1)), (2, 5, 5), 16
    ),
    "Conv3d": simple(lambda: between(nn.Conv3d(3, 2, 2), nn.Conv3d(2, 3, 1)), (2, 3, 3, 3), 16),
    "ConvTranspose1d": simple(lambda: between(nn.ConvTranspose1d(3, 2, 2), nn.Conv1d(2, 3, 1)), (2, 3), 8),
    "ConvTranspose2d": simple(lambda: between(nn.ConvTranspose2d(3, 2, 2), nn.Conv2d(2, 3, 1)), (2, 3, 3), 32),
    "ConvTranspose3d": simple(lambda: between(nn.ConvTranspose3d(3, 2, 2), nn.Conv3d(2, 3, 1)), (2, 2, 2, 2), 54),
    "Embedding": simple(lambda: chain(layer=nn.Embedding(WORDS, 3), after=nn.Tanh()), (4,), 12, words=True),
    "Embedding, with a padding index": simple(
        lambda: chain(layer=nn.Embedding(WORDS, 3, padding_idx=0), after=nn.Tanh()), (4,), 12, words=True
    ),
    "Embedding, with sparse gradients": simple(
        lambda: chain(layer=SparseEmbedding(WORDS, 3), after=nn.Tanh()), (4,), 12, words=True
    ),
    "EmbeddingBag": simple(lambda: chain(layer=Bag(WORDS, FEATURES), after=nn.Tanh()), (4,), words=True),
    "LayerNorm, by its name": simple(lambda: between(nn.LayerNorm(HIDDEN)), features=HIDDEN),
    "GroupNorm, by its name": simple(lambda: between(nn.GroupNorm(2, 4), nn.Conv1d(2, 4, 1)), (2, 3), 12),
    "BatchNorm, by its name": simple(lambda: between(nn.BatchNorm1d(HIDDEN)), features=HIDDEN),
    "PReLU, by its name": simple(lambda: between(nn.PReLU(HIDDEN)), features=HIDDEN),
    "MultiheadAttention: in_proj_weight": attentive("in_proj_weight"),
    "MultiheadAttention: all its parameters": attentive(
        "in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias", layer="encoder.attention.layer"
    ),
    "MultiheadAttention, by default: its out_proj": attentive("out_proj.weight", layer=None),
    "weight_norm": parametrized(parametrizations.weight_norm, "original0", "original1"),
    "weight_norm, by default": parametrized(parametrizations.weight_norm, "original0", "original1", layer=None),
    "spectral_norm": parametrized(parametrizations.spectral_norm, "original"),
    "spectral_norm, by default": parametrized(parametrizations.spectral_norm, "original", layer=None),
    "weight_norm, the old one: weight_v": old_style(nn.utils.weight_norm, "weight_v", layer="encoder.layer.weight_v"),
    "weight_norm, the old one": old_style(nn.utils.weight_norm, "weight_g", "weight_v"),
    "spectral_norm, the old one": old_style(nn.utils.spectral_norm, "weight_orig"),
    "orthogonal": parametrized(parametrizations.orthogonal, "original"),
    "orthogonal, square": parametrized(parametrizations.orthogonal, "original", size=HIDDEN),
    "LSTM: weight_ih_l0": simple(lambda: Recurrent(nn.LSTM), (3, INPUTS), layer=RNN[0], W=RNN[:1]),
    "LSTM: all its parameters": simple(lambda: Recurrent(nn.LSTM), (3, INPUTS), layer="encoder.rnn", W=RNN),
    "LSTM, by default": simple(lambda: Recurrent(nn.LSTM), (3, INPUTS), layer=None, W=RNN),
    "LSTM and a Linear: the Linear, by default": simple(
        lambda: Recurrent(nn.LSTM, project=True), (3, INPUTS), layer=None, W=("encoder.project.weight",)
    ),
    "GRU: weight_ih_l0": simple(lambda: Recurrent(nn.GRU), (3, INPUTS), layer=RNN[0], W=RNN[:1]),
    "GRU: all its parameters": simple(lambda: Recurrent(nn.GRU), (3, INPUTS), layer="encoder.rnn", W=RNN),
    "GRU, by default": simple(lambda: Recurrent(nn.GRU), (3, INPUTS), layer=None, W=RNN),
}


# ---- what stands around it -------------------------------------------------------------------------------------------


class Frozen(nn.Sequential):
    """The stem is not trained, and the layers that are named stay in eval mode, as people fine-tune."""

    def __init__(self, layers: nn.Sequential, in_eval: Collection[str]) -> None:
        super().__init__(OrderedDict(layers.named_children()))
        self.in_eval = in_eval
        self.stem.requires_grad_(False)
        self.train()

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        for name in self.in_eval:
            self.get_submodule(name).eval()
        return self


def normed(stem: nn.Module | None = None, layer: nn.Module | None = None) -> nn.Sequential:
    """Batch norm in front of the shared layer and behind it."""
    return chain(
        stem=stem or nn.Linear(INPUTS, HIDDEN),
        norm_before=nn.BatchNorm1d(HIDDEN),
        before=nn.Tanh(),
        layer=layer or nn.Linear(HIDDEN, FEATURES),
        norm_after=nn.BatchNorm1d(FEATURES),
        after=nn.Tanh(),
    )


def dropped() -> nn.Sequential:
    """Dropout in front of the shared layer and behind it."""
    return chain(
        stem=nn.Linear(INPUTS, HIDDEN),
        drop_before=nn.Dropout(0.2),
        layer=nn.Linear(HIDDEN, FEATURES),
        drop_after=nn.Dropout(0.3),
        after=nn.Tanh(),
    )


def normed_readout() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Dropout(0.2), nn.Linear(FEATURES, OUTPUTS))


def attentive_readout(functional: bool) -> nn.Sequential:
    return nn.Sequential(Attention(4, functional), nn.Flatten(), nn.Linear(12, OUTPUTS))


def transformer() -> nn.TransformerEncoderLayer:
    return nn.TransformerEncoderLayer(4, 2, dim_feedforward=8, dropout=0.0, batch_first=True)


def attended(attention: Build, layer: str, *parameters: str, **options: Any) -> Case:
    return simple(
        lambda: chain(stem=nn.Linear(INPUTS, 4), attention=attention()),
        (3, INPUTS),
        12,
        layer=layer,
        W=tuple(f"{layer}.{parameter}" for parameter in parameters),
        **options,
    )


class Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return -0.5 * gradient


class Reversed(nn.Module):
    """A head as in domain adaptation: what it learns, the encoder is to unlearn."""

    def __init__(self) -> None:
        super().__init__()
        self.readout = readout()

    def forward(self, z: Tensor) -> Tensor:
        return self.readout(Reversal.apply(z))


class Hooked(nn.Module):
    """Changes gradients on their way back, by hooks on the representation and on the shared layer's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = plain_layer()
        mask = (torch.arange(HIDDEN) % 2).double()
        self.inner.layer.weight.register_hook(lambda gradient: gradient * mask)
        self.inner.layer.register_full_backward_hook(lambda module, inputs, outputs: None)

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(x)
        if z.requires_grad:
            z.register_hook(lambda gradient: 0.5 * gradient)
        return z


SURROUNDINGS: dict[str, Case] = {
    "BatchNorm before and after": simple(normed),
    "BatchNorm before and after and in the heads, with Dropout": simple(normed, head=normed_readout),
    "BatchNorm in the shared layer": simple(
        lambda: between(nn.Sequential(nn.Linear(HIDDEN, FEATURES), nn.BatchNorm1d(FEATURES))),
        W=tuple(f"encoder.layer.{p}" for p in ("0.weight", "0.bias", "1.weight", "1.bias")),
    ),
    "Dropout before and after and in the heads": simple(
        dropped, head=lambda: nn.Sequential(nn.Dropout(0.2), readout())
    ),
    "Dropout in the shared layer": simple(
        lambda: between(nn.Sequential(nn.Linear(HIDDEN, FEATURES), nn.Dropout(0.3))),
        W=("encoder.layer.0.weight", "encoder.layer.0.bias"),
    ),
    "early layers frozen": simple(lambda: Frozen(normed(), in_eval=())),
    "early layers frozen and in eval mode": simple(lambda: Frozen(normed(), in_eval=("stem", "norm_before"))),
    "the encoder in eval mode": simple(lambda: Frozen(layers := normed(), in_eval=list(dict(layers.named_children())))),
    "F.scaled_dot_product_attention in the trunk": attended(
        lambda: Attention(4, functional=True), "encoder.attention.layer", "weight"
    ),
    "F.scaled_dot_product_attention behind the shared layer": attended(
        lambda: Attention(4, functional=True), "encoder.attention.qkv", "weight"
    ),
    "F.scaled_dot_product_attention, causal": attended(
        lambda: Attention(4, functional=True, causal=True), "encoder.attention.qkv", "weight"
    ),
    "F.scaled_dot_product_attention in the heads": attended(
        lambda: nn.Linear(4, 4), "encoder.attention", "weight", head=lambda: attentive_readout(functional=True)
    ),
    "MultiheadAttention in the heads": attended(
        lambda: nn.Linear(4, 4), "encoder.attention", "weight", head=lambda: attentive_readout(functional=False)
    ),
    "TransformerEncoderLayer": attended(transformer, "encoder.attention.linear2", "weight"),
    "TransformerEncoderLayer: its attention's out_proj": attended(
        transformer, "encoder.attention.self_attn.out_proj", "weight"
    ),
    "TransformerEncoderLayer in the heads": attended(
        lambda: nn.Linear(4, 4),
        "encoder.attention",
        "weight",
        head=lambda: nn.Sequential(transformer(), nn.Flatten(), nn.Linear(12, OUTPUTS)),
    ),
    "LSTM in the heads": attended(
        lambda: nn.Linear(4, 4),
        "encoder.attention",
        "weight",
        head=lambda: nn.Sequential(Recurrent(nn.LSTM, inputs=4), nn.Linear(FEATURES, OUTPUTS)),
    ),
    "gradients reversed in the heads": simple(plain_layer, head=Reversed),
    "gradients reversed in front of the heads": simple(
        plain_layer,
        run=lambda encoder, heads, x: each_once(lambda x: Reversal.apply(encoder(x)), heads, x),
    ),
    "hooks on gradients": simple(Hooked, layer="encoder.inner.layer", W=("encoder.inner.layer.weight",)),
}


# ---- how encoder and heads are called --------------------------------------------------------------------------------


class Pair(NamedTuple):
    fine: Tensor
    coarse: Tensor


@dataclass
class Features:
    """A dataclass that torch knows as a structure of tensors."""

    fine: Tensor
    coarse: Tensor


@dataclass
class UnknownFeatures:
    """A dataclass that torch does not know as a structure of tensors."""

    fine: Tensor
    coarse: Tensor


pytree.register_dataclass(Features)


class Several(nn.Module):
    """An encoder that returns two feature maps in some structure."""

    def __init__(self, pack: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, HIDDEN)
        self.layer = nn.Linear(HIDDEN, FEATURES)
        self.pack = pack

    def forward(self, x: Tensor) -> Any:
        fine = torch.tanh(self.stem(x))
        return self.pack(fine, torch.tanh(self.layer(fine)))


class ReadsSeveral(nn.Module):
    def __init__(self, unpack: Callable[[Any], tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.unpack = unpack
        self.from_fine = nn.Linear(HIDDEN, OUTPUTS)
        self.from_coarse = nn.Linear(FEATURES, OUTPUTS)

    def forward(self, z: Any) -> Tensor:
        fine, coarse = self.unpack(z)
        return self.from_fine(fine) + self.from_coarse(coarse)


def structured(pack: Callable[[Tensor, Tensor], Any], unpack: Callable[[Any], Any], **options: Any) -> Case:
    return simple(lambda: Several(pack), head=lambda: ReadsSeveral(unpack), **options)


class Scaled(nn.Module):
    """A head with options."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(FEATURES, OUTPUTS)
        self.skip = nn.Linear(INPUTS, OUTPUTS)

    def forward(self, z: Tensor, x: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        output = scale * self.linear(z)
        return output if x is None else output + self.skip(x)


def with_keywords(encoder: nn.Module, heads: Heads, x: Tensor) -> dict[str, Tensor]:
    z = encoder(x)
    return {task: head(z=z, x=None, scale=0.5) for task, head in heads.items()}


def with_the_input(encoder: nn.Module, heads: Heads, x: Tensor) -> dict[str, Tensor]:
    z = encoder(x)
    return {task: head(z, x) for task, head in heads.items()}


def siamese(encoder: nn.Module, heads: Heads, x: Tensor) -> dict[str, Tensor]:
    z = (encoder(x) - encoder(x.roll(1, 0))).abs()
    return {task: head(z) for task, head in heads.items()}


def heads_twice(encoder: nn.Module, heads: Heads, x: Tensor) -> dict[str, Tensor]:
    z = encoder(x)
    return {task: head(z) * head(-2 * z) for task, head in heads.items()}


def two_views(encoder: nn.Module, heads: Heads, x: Tensor) -> dict[str, Tensor]:
    one, other = encoder(x), encoder(-x)
    return {task: head(one) * head(other) for task, head in heads.items()}


def interleaved(encoder: nn.Module, heads: Heads, x: Tensor) -> dict[str, Tensor]:
    """The encoder runs anew for each head."""
    return {task: head(encoder(x)) for task, head in heads.items()}


class Repeated(nn.Module):
    """The shared layer runs three times, as in a recurrent cell."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(INPUTS, FEATURES)
        self.layer = nn.Linear(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        z = self.stem(x)
        for _ in range(3):
            z = torch.tanh(self.layer(z))
        return z


def two_terms(output: Tensor, target: Tensor) -> Tensor:
    return F.mse_loss(output, target) + 0.3 * F.huber_loss(output.cos(), target)


CALLS: dict[str, Case] = {
    "the shared layer runs three times": simple(Repeated),
    "siamese: the encoder runs twice": simple(plain_layer, run=siamese),
    "the encoder and the heads run twice": simple(plain_layer, run=two_views),
    "the heads run twice": simple(plain_layer, run=heads_twice),
    "the encoder runs for each head": simple(plain_layer, run=interleaved),
    "heads called with keywords": simple(plain_layer, head=Scaled, run=with_keywords),
    "heads that also read the input": simple(plain_layer, head=Scaled, run=with_the_input),
    "a tuple": structured(lambda fine, coarse: (fine, coarse), lambda z: z),
    "a list": structured(lambda fine, coarse: [fine, coarse], lambda z: z),
    "a dict": structured(lambda fine, coarse: {"b": fine, "a": coarse}, lambda z: (z["b"], z["a"])),
    "a named tuple": structured(Pair, lambda z: (z.fine, z.coarse)),
    "a registered dataclass": structured(Features, lambda z: (z.fine, z.coarse)),
    "a dataclass": structured(UnknownFeatures, lambda z: (z.fine, z.coarse), modes=(False,)),
    "a dict of lists, with a name and a hole in it": structured(
        lambda fine, coarse: {"maps": [fine, None, coarse], "name": "two"}, lambda z: (z["maps"][0], z["maps"][2])
    ),
    "a loss of two terms": simple(plain_layer, loss=two_terms),
    "losses of shape (1,)": simple(plain_layer, loss=lambda o, t: F.mse_loss(o, t).reshape(1)),
}


# ---- activation checkpointing ----------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """Computes what is inside a second time in backward, instead of keeping it."""

    plain = False

    def __init__(self, inner: nn.Module, use_reentrant: bool) -> None:
        super().__init__()
        self.inner = inner
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) if self.plain else checkpoint(self.inner, x, use_reentrant=self.use_reentrant)


def checkpointed_encoder() -> nn.Module:
    return Checkpointed(plain_layer(), use_reentrant=False)


def checkpointed_readout(use_reentrant: bool) -> nn.Module:
    return Checkpointed(nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, OUTPUTS)), use_reentrant)


def early_block(use_reentrant: bool) -> nn.Sequential:
    """A checkpointed block with the shared layer behind it."""
    return between(
        nn.Linear(HIDDEN, FEATURES),
        chain(
            first=nn.Linear(INPUTS, 6),
            block=Checkpointed(nn.Sequential(nn.Tanh(), nn.Linear(6, HIDDEN)), use_reentrant),
        ),
    )


def last_block(use_reentrant: bool) -> nn.Sequential:
    """The shared layer is in a checkpointed block."""
    return chain(stem=nn.Linear(INPUTS, HIDDEN), block=Checkpointed(plain_tail(), use_reentrant))


def plain_tail() -> nn.Sequential:
    return chain(before=nn.Tanh(), layer=nn.Linear(HIDDEN, FEATURES), after=nn.Tanh())


INSIDE: dict[str, Any] = {"layer": "encoder.inner.layer", "W": ("encoder.inner.layer.weight",)}
IN_BLOCK: dict[str, Any] = {"layer": "encoder.block.inner.layer", "W": ("encoder.block.inner.layer.weight",)}

CHECKPOINTS: dict[str, Case] = {
    "the encoder, use_reentrant=False": simple(checkpointed_encoder, **INSIDE),
    "the heads, use_reentrant=False": simple(plain_layer, head=lambda: checkpointed_readout(use_reentrant=False)),
    "encoder and heads, use_reentrant=False": simple(
        checkpointed_encoder, head=lambda: checkpointed_readout(use_reentrant=False), **INSIDE
    ),
    "the encoder with Dropout in it, use_reentrant=False": simple(
        lambda: Checkpointed(dropped(), use_reentrant=False), **INSIDE
    ),
    "an earlier block, use_reentrant=False": simple(lambda: early_block(use_reentrant=False)),
    "an earlier block, use_reentrant=True": simple(lambda: early_block(use_reentrant=True)),
    "the shared layer's block, use_reentrant=False": simple(lambda: last_block(use_reentrant=False), **IN_BLOCK),
    "the shared layer's block, use_reentrant=True": simple(
        lambda: last_block(use_reentrant=True), **IN_BLOCK, modes=(True,)
    ),
    "the heads, use_reentrant=True": simple(
        plain_layer, head=lambda: checkpointed_readout(use_reentrant=True), modes=(True,)
    ),
    "an earlier block and the heads, use_reentrant=True": simple(
        lambda: early_block(use_reentrant=True), head=lambda: checkpointed_readout(use_reentrant=True), modes=(True,)
    ),
}


def checkpointed_calls(use_reentrant: bool) -> Run:
    """The heads themselves are what is checkpointed, so that their hooks run inside."""

    def run(encoder: nn.Module, heads: Heads, x: Tensor) -> dict[str, Tensor]:
        z = encoder(x)
        return {task: checkpoint(head, z, use_reentrant=use_reentrant) for task, head in heads.items()}

    return run


CHECKPOINTS["calls of the heads, use_reentrant=False"] = simple(plain_layer, run=checkpointed_calls(False))

REENTRANT: dict[str, Case] = {
    "the heads": replace(CHECKPOINTS["the heads, use_reentrant=True"], modes=(False,)),
    "calls of the heads": simple(plain_layer, run=checkpointed_calls(True), modes=(False,)),
    "calls of the heads, named": simple(plain_layer, run=checkpointed_calls(True), modes=(True,)),
}


# ---- weights in two places -------------------------------------------------------------------------------------------


class Transposed(nn.Module):
    """A decoder that uses the encoder's weight the other way round."""

    def __init__(self, encoder: nn.Linear) -> None:
        super().__init__()
        self.weight = encoder.weight
        self.out = nn.Linear(HIDDEN, OUTPUTS)

    def forward(self, z: Tensor) -> Tensor:
        return self.out(F.linear(z, self.weight.T))


class Autoencoder(Shape):
    """One head is tied to the shared layer."""

    def __init__(self) -> None:
        super().__init__(plain_layer)

    def build(self) -> None:
        super().build()
        self.seg_head = Transposed(self.encoder.layer)  # type: ignore[arg-type]


class LanguageModel(Shape):
    """Every head's output projection is the embedding; the tasks are losses over the words."""

    def __init__(self) -> None:
        super().__init__(
            lambda: chain(layer=nn.Embedding(WORDS, FEATURES), block=nn.Linear(FEATURES, FEATURES), after=nn.Tanh()),
            lambda: chain(own=nn.Linear(FEATURES, FEATURES), projection=nn.Linear(FEATURES, WORDS, bias=False)),
            loss=lambda output, target: F.cross_entropy(
                output.mean(1), target.softmax(1) @ torch.eye(3, WORDS).double()
            ),
        )

    def build(self) -> None:
        super().build()
        for task in self.tasks:
            self.get_submodule(f"{task}_head").projection.weight = self.encoder.layer.weight  # type: ignore[union-attr]


BEHIND = {
    "a head tied to a layer behind the shared one": Case(Autoencoder, layer="encoder.stem", W=("encoder.stem.weight",))
}
TIED: dict[str, Case] = {
    "a head tied to the encoder's weight": Case(Autoencoder),
    "an embedding tied to the output projections": Case(LanguageModel, inputs=(4,), words=True),
}


# ---- in-place operations ---------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    """Begins by overwriting what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.linear = nn.Linear(FEATURES, OUTPUTS)

    def forward(self, z: Tensor) -> Tensor:
        return self.linear(self.act(z))


class FirstInPlace(Shape):
    """Some heads begin in place; the others keep no reference to z for their backward, so that plain torch allows it."""

    def __init__(self, *tasks: str) -> None:
        self.in_place = tasks
        super().__init__(
            lambda: chain(stem=nn.Linear(INPUTS, HIDDEN), before=nn.Tanh(), layer=nn.Linear(HIDDEN, FEATURES)),
            lambda: nn.Sequential(nn.Tanh(), nn.Linear(FEATURES, OUTPUTS)),
        )

    def build(self) -> None:
        super().build()
        for task in self.in_place:
            setattr(self, f"{task}_head", InPlace())


IN_PLACE: dict[str, Case] = {
    "the last head": Case(lambda: FirstInPlace("normal")),
    "the first head": Case(lambda: FirstInPlace("seg")),
}
