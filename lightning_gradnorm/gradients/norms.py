"""Compares the gradients of several losses: norms, shares of their sum, conflicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_gradnorm._messages import is_number
from lightning_gradnorm.gradients.graph import is_wrapped
from lightning_gradnorm.gradients.readers import flat_row


class GradientNorms(dict[str, float]):
    """The norm of each loss's gradient, by name; also shares and cosines, from the inner products of the gradients.

    Args:
        names: the losses.
        products: inner products of their gradients, shape (T, T).

    Example:
        >>> found = GradientNorms(["a", "b"], torch.tensor([[9.0, 0.0], [0.0, 16.0]]))
        >>> dict(found)
        {'a': 3.0, 'b': 4.0}
        >>> found.shares
        {'a': 0.36, 'b': 0.64}
    """

    def __init__(self, names: Sequence[str], products: Tensor) -> None:
        self.products = products.double().cpu()
        """Inner products of the gradients, shape (T, T)."""
        norms = self.products.diagonal().clamp(min=0).sqrt()
        super().__init__(zip(names, norms.tolist(), strict=True))
        self.cosines = self.products / torch.outer(norms, norms)
        """Cosine of the angle between each pair of gradients, shape (T, T): -1 if they are opposed; nan if one is zero."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({super().__repr__()})"

    @property
    def shares(self) -> dict[str, float]:
        """Each loss's share of the sum ``G = Σ g_i``: ``<g_i, G> / <G, G>``, the length of its projection on G.

        Shares add up to 1, and the shares of several losses add up to the share of their sum. To first order, a loss's share
        is its share of what a small step along G takes off the total loss. Norms lack both properties: two large gradients
        may cancel. A loss that pulls against the others has a negative share.
        """
        return dict(zip(self, (self.products.sum(dim=1) / self.products.sum()).tolist(), strict=True))

    @property
    def imbalance(self) -> float:
        """The largest norm over the smallest, without gradients that are zero."""
        norms = [norm for norm in self.values() if norm != 0]
        return max(norms) / min(norms) if norms else 1.0

    def of(self, names: Sequence[str]) -> GradientNorms:
        """Return the norms of these losses only."""
        places = [list(self).index(name) for name in names]
        return GradientNorms(names, self.products[places][:, places])

    def cosine(self, one: str, other: str) -> float:
        """Return the cosine between the gradients of two losses."""
        names = list(self)
        return float(self.cosines[names.index(one), names.index(other)])


def gradient_norms(losses: Mapping[str, Tensor], parameters: Iterable[Tensor]) -> GradientNorms:
    """Return the norm of each loss's gradient over all of ``parameters``, its share of their sum, and the conflicts.

    Takes one first-order pass per loss. Neither ``.grad`` nor the graph changes, so ``sum(losses.values()).backward()`` may
    follow.

    Args:
        losses: the terms of a composite loss by name, scalars, with their coefficients in the sum.
        parameters: the parameters that the losses share, for example ``model.encoder.parameters()``. Frozen ones are left
            out. If a loss does not depend on a parameter, its gradient counts as zero.

    Raises:
        TypeError, ValueError: a loss is not a scalar tensor or carries no gradient, or no parameter is trained.

    Example:
        >>> layer = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> found = gradient_norms({"fit": layer(x).sum(), "other": -2 * layer(x).sum()}, layer.parameters())
        >>> dict(found)
        {'fit': 5.0, 'other': 10.0}
        >>> found.shares, found.imbalance, found.cosine("fit", "other")
        ({'fit': -1.0, 'other': 2.0}, 2.0, -1.0)
    """
    if not isinstance(losses, Mapping) or not losses:
        raise TypeError(f"gradient_norms: losses should be a mapping from name to loss; got {losses!r}")
    for name, loss in losses.items():
        check_loss(loss, caller=f"gradient_norms: the loss '{name}'")
    tensors = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if wrong := [type(one).__name__ for one in tensors if not isinstance(one, Tensor)]:
        raise TypeError(
            f"gradient_norms: parameters should be tensors, such as model.encoder.parameters(); got {wrong[0]}"
        )
    trained = [one for one in tensors if one.requires_grad]
    if not trained:
        raise ValueError("gradient_norms: parameters should have one that is trained (requires_grad=True); got none")
    rows = [
        flat_row(torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True), trained)
        for loss in losses.values()
    ]
    return GradientNorms(list(losses), inner_products(rows))


def inner_products(rows: Sequence[Tensor]) -> Tensor:
    """Return the inner product of each pair of vectors, shape (T, T), without copying them into one matrix.

    Example:
        >>> inner_products([torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])])
        tensor([[5., 2.],
                [2., 1.]])
    """
    products = rows[0].new_zeros(len(rows), len(rows))
    for i, one in enumerate(rows):
        for j, other in enumerate(rows[: i + 1]):
            products[i, j] = products[j, i] = torch.dot(one, other)
    return products


def check_loss(loss: Any, *, caller: str, otherwise: str = "", is_scalar: bool = True) -> None:
    """Raise an error unless ``loss`` is a tensor with a gradient.

    ``caller`` begins the error and names the loss; ``otherwise`` names an alternative to a loss with a gradient;
    ``is_scalar``: it should have one value.
    """
    if not isinstance(loss, Tensor):
        kind = type(loss).__name__
        is_metric = callable(getattr(loss, "update", None)) and callable(getattr(loss, "compute", None))
        found = f"{kind}, a metric, not what it returns." if is_metric else f"{kind}."
        if is_number(loss):
            found = f"{'an' if kind.startswith('i') else 'a'} {kind}; did you call .item()?"
        raise TypeError(f"{caller} should be a tensor; got {found} Give the loss itself{otherwise}. {_ways(caller)}")
    if is_scalar and loss.numel() != 1:
        raise ValueError(
            f"{caller} should be a scalar; got shape {tuple(loss.shape)}. Reduce it, for example with .mean()."
        )
    if loss.is_complex():
        raise ValueError(f"{caller} should be a real number; got {loss.dtype}, which is complex.")
    if is_wrapped(loss):
        raise ValueError(
            f"{caller} is from inside a transform of torch.func (vmap, grad, jvp, …), where it is one of many or is not "
            f"back-propagated. Show what is computed from the transform's result."
        )
    if not loss.requires_grad:
        raise ValueError(
            f"{caller} should be part of the graph, but it carries no gradient. Give the loss itself, not .detach() or "
            f".item(){otherwise}. {_ways(caller)}"
        )
    if loss.is_leaf:
        raise ValueError(
            f"{caller} is a parameter itself. All gradients arrive there, not only those of this loss. Give a tensor computed "
            f"from it, such as 1 * parameter, and add that to what is back-propagated."
        )


def _ways(caller: str) -> str:
    by_path = "" if caller.startswith("Balancer") else "name what returns it with losses_from, or "
    return f"If it is not available here, {by_path}give it to watch() where it is computed."
