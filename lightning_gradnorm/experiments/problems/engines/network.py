"""A shared encoder of convolutions, LSTMs and attention over an engine's last cycles, and two heads.

Source: a book on predictive maintenance (book-ai.org), second edition, chapter 11. Its sizes are the defaults.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_gradnorm._messages import check, is_integer, is_number
from lightning_gradnorm.experiments.problems.small.mlp import MLP

HEADS = 8
KERNEL = 3


class EngineEncoder(nn.Module):
    """Maps a window of cycles to a vector: convolutions, two bidirectional LSTMs, self-attention, a funnel of linear layers.

    The output of attention is added to its input and normalized over features. The last cycle then passes the funnel, whose
    last linear layer is the last shared layer. Only the last cycle is used after attention, so it is the only query; all
    cycles are keys.

    Args:
        in_features: values per cycle.
        channels: channels of the convolutions over three cycles each, with batch normalization, ReLU and dropout.
        hidden: units of each LSTM in each direction; a multiple of 4, so eight attention heads can share both directions.
        funnel: units of the linear layers, each followed by a ReLU; the last number is the length of the representation.
        dropout: dropout rate after each convolution, between the LSTMs, in the attention and between the layers of the
            funnel.

    Raises:
        ValueError: a number is out of range, or there is no convolution or linear layer.

    Shape: ``(batch, window, in_features)``, the oldest cycle first, to ``(batch, encoder.out_features)``.

    Example:
        >>> import torch
        >>> EngineEncoder()(torch.zeros(4, 30, 14)).shape
        torch.Size([4, 32])
    """

    def __init__(
        self,
        in_features: int = 14,
        channels: Sequence[int] = (64, 128, 64),
        hidden: int = 256,
        funnel: Sequence[int] = (256, 64, 32),
        dropout: float = 0.2,
    ) -> None:
        super().__init__()
        _check_positive("in_features", [in_features])
        _check_positive("channels", channels)
        _check_positive("funnel", funnel)
        is_shared = is_integer(hidden) and hidden > 0 and 2 * hidden % HEADS == 0
        check("EngineEncoder", is_shared, "hidden", f"a positive multiple of {HEADS // 2}", hidden)
        check("EngineEncoder", is_number(dropout) and 0 <= dropout < 1, "dropout", "in [0, 1)", dropout)
        self.in_features = in_features
        self.out_features = funnel[-1]
        stages: list[nn.Module] = []
        for here, there in zip([in_features, *channels], channels, strict=False):
            convolution = nn.Conv1d(here, there, KERNEL, padding=KERNEL // 2)
            stages += [convolution, nn.BatchNorm1d(there), nn.ReLU(), nn.Dropout(dropout)]
        self.convolutions = nn.Sequential(*stages)
        self.lstm = nn.LSTM(channels[-1], hidden, num_layers=2, bidirectional=True, batch_first=True, dropout=dropout)
        self.attention = nn.MultiheadAttention(2 * hidden, HEADS, dropout=dropout, batch_first=True)
        self.norm = nn.LayerNorm(2 * hidden)
        layers: list[nn.Module] = []
        for here, there in zip([2 * hidden, *funnel], funnel, strict=False):
            layers += [nn.Linear(here, there), nn.ReLU(), nn.Dropout(dropout)]
        self.funnel = nn.Sequential(*layers[:-1])  # no dropout on the representation

    def forward(self, windows: Tensor) -> Tensor:
        """Return the representation of a batch of windows."""
        if windows.ndim != 3 or windows.shape[-1] != self.in_features:
            raise ValueError(
                f"EngineEncoder: windows should be of shape (batch, window, {self.in_features}); got "
                f"{tuple(windows.shape)}. Set in_features to the number of features of the data."
            )
        cycles = self.convolutions(windows.transpose(1, 2)).transpose(1, 2)
        cycles, _ = self.lstm(cycles)
        last = cycles[:, -1:]
        found, _ = self.attention(last, cycles, cycles, need_weights=False)
        representation: Tensor = self.funnel(self.norm(last + found).squeeze(1))
        return representation


def rul_head(in_features: int = 32, initial: float = 62.5) -> nn.Module:
    """Return the head of the remaining useful life: 64, 32, 16 and 1 units, each with a ReLU, so no life is negative.

    Args:
        in_features: length of the representation.
        initial: bias of the last unit, about the prediction of the untrained head, in cycles. Without it, half of all seeds
            start below zero for every window, where the last ReLU has no gradient, and never learn.

    Raises:
        ValueError: ``initial`` is not positive.

    Shape: ``(batch, in_features)`` to ``(batch, 1)``, cycles.

    Example:
        >>> import torch
        >>> rul_head()(torch.zeros(4, 32)).shape
        torch.Size([4, 1])
    """
    check("rul_head", is_number(initial) and initial > 0, "initial", "a positive number of cycles", initial)
    head = MLP(in_features, hidden=(64, 32, 16, 1))
    last = [layer for layer in head.modules() if isinstance(layer, nn.Linear)][-1]
    nn.init.constant_(last.bias, initial)
    return head


def health_head(in_features: int = 32, classes: int = 3) -> nn.Module:
    """Return the head of the health class: 32 and 16 units, each with a ReLU, and a linear layer.

    Shape: ``(batch, in_features)`` to logits ``(batch, classes)``.

    Example:
        >>> import torch
        >>> health_head()(torch.zeros(4, 32)).shape
        torch.Size([4, 3])
    """
    return nn.Sequential(MLP(in_features, hidden=(32, 16)), nn.Linear(16, classes))


def _check_positive(parameter: str, counts: Sequence[int]) -> None:
    are_positive = len(counts) > 0 and all(is_integer(count) and count > 0 for count in counts)
    check("EngineEncoder", are_positive, parameter, "positive integers, at least one", list(counts))
