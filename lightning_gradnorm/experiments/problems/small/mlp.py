"""Fully connected trunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn


class MLP(nn.Module):
    """Fully connected layers, each followed by an activation. The default is the trunk of the GradNorm paper's toy problem.

    The representation is the output after the last activation, so the last linear layer is the last shared layer.

    Source: Chen et al., GradNorm, ICML 2018 (arXiv 1711.02257), section 4: four layers of 100 ReLU units.

    Args:
        in_features: Length of the input.
        hidden: Units of each layer.
        out_features: Units of an additional last layer; ``None`` for no such layer.
        activation: Creates the activation after each layer.

    Raises:
        ValueError: There is no layer, or a layer has no units.

    Shape: ``(batch, in_features)``, or ``(batch, ...)`` with that many numbers, to ``(batch, mlp.out_features)``.

    Example:
        >>> import torch
        >>> trunk = MLP(250)
        >>> trunk(torch.zeros(8, 250)).shape, trunk.out_features
        (torch.Size([8, 100]), 100)
    """

    def __init__(
        self,
        in_features: int,
        hidden: Sequence[int] = (100, 100, 100, 100),
        out_features: int | None = None,
        activation: Callable[[], nn.Module] = nn.ReLU,
    ) -> None:
        super().__init__()
        widths = [*hidden] if out_features is None else [*hidden, out_features]
        if not widths or min(in_features, *widths) < 1:
            raise ValueError(
                f"MLP: in_features, hidden and out_features should be positive and make at least one layer; got "
                f"in_features={in_features}, hidden={list(hidden)}, out_features={out_features}."
            )
        self.in_features = in_features
        self.out_features = widths[-1]
        layers: list[nn.Module] = []
        for width_in, width_out in zip([in_features, *widths], widths, strict=False):
            layers += [nn.Linear(width_in, width_out), activation()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return the representation of a batch of vectors, or of arrays, which are flattened."""
        representation: Tensor = self.layers(x.flatten(1))
        return representation
