"""Reads torchvision's pretrained weights without torchvision."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

_UNTRAINED = "num_batches_tracked"  # a counter that torchvision's older files lack


def load_pretrained(
    network: nn.Module, path: str | Path, *, owner: str, model: str, part: tuple[str, ...], left_out: tuple[str, ...]
) -> None:
    """Load the weights of a part of ``network`` from a file with a state dict in torchvision's names.

    The file must contain all weights of that part in their shapes, and nothing else except the names left out.

    Args:
        network: Receives the weights. Its names with a prefix in ``part`` must match torchvision's.
        path: File from ``torch.save(model.state_dict(), path)``, or torchvision's own download.
        owner: Name of the network, for error messages.
        model: torchvision's name of the model, ``"vgg16_bn"``.
        part: Prefixes of the names to load.
        left_out: Prefixes of names in the file that this network does not need.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a state dict, or belongs to another network.
    """
    given = _read(path, owner, model)
    wanted = {name: value for name, value in network.state_dict().items() if name.startswith(part)}
    found = {name: value for name, value in given.items() if not name.startswith(left_out)}
    missing = [name for name in wanted if name not in found and not name.endswith(_UNTRAINED)]
    unexpected = [name for name in found if name not in wanted]
    misshapen = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in found and found[name].shape != value.shape
    ]
    wrong = {"lacks": missing, "has besides": unexpected, "has in another shape": misshapen}
    if any(wrong.values()):
        raise ValueError(
            f"{_expected(owner, model)}; '{path}' "
            + "; ".join(f"{how} {_some(n)}" for how, n in wrong.items() if n)
            + "."
        )
    network.load_state_dict(found, strict=False)


def _read(path: str | Path, owner: str, model: str) -> dict[str, Tensor]:
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(
            f"{_expected(owner, model)}; there is no file '{path}'. With torchvision installed: "
            f"torch.save(torchvision.models.{model}(weights='DEFAULT').state_dict(), 'weights.pth')."
        )
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as reason:  # a truncated archive, a web page, a pickle of something else
        summary = str(reason).split("\n", 1)[0]
        raise ValueError(
            f"{_expected(owner, model)}; '{path}' could not be read ({type(reason).__name__}: {summary}). Was it "
            f"downloaded to its end?"
        ) from reason
    if not isinstance(content, dict) or not all(isinstance(name, str) for name in content):
        raise ValueError(f"{_expected(owner, model)}; '{path}' holds a {type(content).__name__}.")
    others = [f"'{name}' ({type(value).__name__})" for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise ValueError(
            f"{_expected(owner, model)}; '{path}' holds {_some(others)}. If the state dict is one of these, save it alone."
        )
    return content


def _expected(owner: str, model: str) -> str:
    return f"{owner}: pretrained should be the state dict of torchvision's {model}, in names and shapes"


def _some(names: Sequence[str], shown: int = 3) -> str:
    return ", ".join(names[:shown]) + (f", … ({len(names)} in all)" if len(names) > shown else "")
