"""The task gradients read during one backward pass equal those of T separate passes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_gradnorm.gradients import ActivationGradients, WeightGradients, branch, fan_out, nodes_on_paths
from lightning_gradnorm.gradients.graph import node_of


class Pyramid(nn.Module):
    """An encoder with several feature maps in nested structures; one carries no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 7)

    def forward(self, x: Tensor) -> dict[str, object]:
        fine = self.first(x).tanh()
        coarse = self.second(fine).tanh()
        return {"maps": (fine, [coarse]), "size": x.shape, "input": x}


def _losses(z: dict[str, dict[str, object]], heads: dict[str, nn.Linear]) -> dict[str, Tensor]:
    return {
        task: head(torch.cat([z[task]["maps"][0], z[task]["maps"][1][0]], 1)).square().mean()
        for task, head in heads.items()
    }


@pytest.fixture
def pyramid() -> tuple[Pyramid, dict[str, nn.Linear], Tensor]:
    torch.manual_seed(0)
    encoder = Pyramid().double()
    heads = {task: nn.Linear(13, 2).double() for task in ("a", "b", "c")}
    return encoder, heads, torch.randn(4, 5, dtype=torch.float64)


def test_norms_at_a_weight_equal_those_of_separate_passes_for_nested_representations(pyramid) -> None:
    encoder, heads, x = pyramid
    for weight in (encoder.first.weight, encoder.second.weight):
        expected = [
            torch.autograd.grad(loss, weight)[0].norm()
            for task in heads
            for loss in [_losses({task: encoder(x)}, {task: heads[task]})[task]]
        ]
        reader = WeightGradients([weight])
        sum(_losses(fan_out(encoder(x), heads, reader.read), heads).values()).backward()
        torch.testing.assert_close(reader.norms(list(heads)), torch.stack(expected), rtol=1e-12, atol=0)


def test_norms_over_several_parameters_are_those_of_the_joined_vector(pyramid) -> None:
    encoder, heads, x = pyramid
    layer = list(encoder.second.parameters())
    reader = WeightGradients(layer)
    sum(_losses(fan_out(encoder(x), heads, reader.read), heads).values()).backward()
    for i, task in enumerate(heads):
        found = torch.autograd.grad(_losses({task: encoder(x)}, {task: heads[task]})[task], layer)
        expected = torch.cat([part.flatten() for part in found]).norm()
        torch.testing.assert_close(reader.norms(list(heads))[i], expected, rtol=1e-12, atol=0)


def test_norms_at_the_representation_equal_those_of_separate_passes(pyramid) -> None:
    encoder, heads, x = pyramid
    z = encoder(x)
    at = [z["maps"][0], z["maps"][1][0]]
    expected = []
    for task in heads:
        found = torch.autograd.grad(_losses({task: z}, {task: heads[task]})[task], at, retain_graph=True)
        expected.append(torch.cat([part.flatten() for part in found]).norm())
    reader = ActivationGradients()
    reader.forward_post(at)
    sum(_losses(fan_out(z, heads, reader.read), heads).values()).backward()
    torch.testing.assert_close(reader.norms(list(heads)), torch.stack(expected), rtol=1e-12, atol=0)


def test_a_task_at_the_representation_that_is_complete_leaves_the_others_parts_to_meet() -> None:
    """Of a comes the norm when it is complete; of b one part has come before and one comes after, as of a head called twice."""
    torch.manual_seed(0)
    z = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    of_a, first, second = torch.randn(3, 3, 4, dtype=torch.float64)
    reader = ActivationGradients()
    reader.forward_post(z)
    reader.read("b", [z], [first])
    reader.read("a", [z], [of_a])
    reader.finalize(["a"])
    assert set(reader._arrived) == {"b"}, "a's gradient at z is let go"
    reader.rescale("a", torch.tensor(0.5))
    reader.read("b", [z], [second])
    expected = torch.stack([0.5 * of_a.norm(), (first + second).norm(), z.new_zeros(())])
    torch.testing.assert_close(reader.norms(["a", "b", "c"]), expected.detach(), rtol=1e-12, atol=0)
    with pytest.raises(RuntimeError, match="read again after it was complete"):
        reader.read("a", [z], [of_a])


def test_the_network_gets_the_gradient_it_would_get_without_branches(pyramid) -> None:
    encoder, heads, x = pyramid
    sum(_losses(dict.fromkeys(heads, encoder(x)), heads).values()).backward()
    plain = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    reader = WeightGradients([encoder.second.weight])
    sum(_losses(fan_out(encoder(x), heads, reader.read), heads).values()).backward()
    for parameter, expected in zip(encoder.parameters(), plain, strict=True):
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-12, atol=1e-15)


def test_heads_and_trunk_are_traversed_once() -> None:
    traversed = {"trunk": 0, "head a": 0, "head b": 0}

    class Counted(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, name):
            ctx.name = name
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            traversed[ctx.name] += 1
            return gradient, None

    layer = nn.Linear(3, 3)
    x = torch.ones(2, 3, requires_grad=True)
    reader = WeightGradients([layer.weight])
    views = fan_out(layer(Counted.apply(x, "trunk")), ["a", "b"], reader.read)
    sum(Counted.apply(view, f"head {task}").sum() for task, view in views.items()).backward()
    assert traversed == {"trunk": 1, "head a": 1, "head b": 1}


def test_a_branch_made_before_its_head_is_reached_before_the_next_head_starts() -> None:
    order = []
    z = torch.ones(3, requires_grad=True) * 2
    outputs = []
    for task in ("a", "b", "c"):
        view, _ = branch(z, lambda tensors, gradients, task=task: order.append(f"branch {task}"))
        out = view * 3
        out.register_hook(lambda gradient, task=task: order.append(f"head {task}"))
        outputs.append(out.sum())
    sum(outputs).backward()
    assert order == ["head c", "branch c", "head b", "branch b", "head a", "branch a"]


def test_an_absent_task_has_norm_zero_and_the_others_are_unmoved(pyramid) -> None:
    encoder, heads, x = pyramid
    reader = WeightGradients([encoder.second.weight])
    losses = _losses(fan_out(encoder(x), heads, reader.read), heads)
    (losses["a"] + losses["c"]).backward()
    norms = reader.norms(["a", "b", "c"])
    assert norms[1] == 0
    assert norms[0] > 0
    assert norms[2] > 0


def test_several_passes_are_summed_before_the_norm() -> None:
    layer = nn.Linear(2, 2, bias=False)
    reader = WeightGradients([layer.weight])
    for sign in (1.0, -1.0):
        view = fan_out(layer(torch.ones(1, 2)), ["a"], reader.read)["a"]
        (sign * view.sum()).backward()
    assert reader.norms(["a"]).item() == 0.0  # opposite gradients cancel; the norms' sum would be 4


def test_without_gradients_the_representation_itself_is_passed_on() -> None:
    z = torch.ones(3, requires_grad=True) * 2
    with torch.no_grad():
        view, node = branch({"z": z}, lambda tensors, gradients: None)
    assert view["z"] is z
    assert node is None


def test_half_precision_gradients_are_summed_in_float32() -> None:
    layer = nn.Linear(2, 2, bias=False).to(torch.bfloat16)
    reader = WeightGradients([layer.weight])
    for _ in range(300):
        fan_out(layer(torch.ones(1, 2, dtype=torch.bfloat16)), ["a"], reader.read)["a"].sum().backward()
    assert reader.norms(["a"]).item() == pytest.approx(600.0)  # bfloat16 would stop counting at 256


def test_a_path_that_avoids_the_branch_is_found() -> None:
    weight = torch.ones(3, requires_grad=True)
    z = weight * 2
    view, node = branch(z, lambda tensors, gradients: None)
    through, around = view.sum(), view.sum() + z.square().sum()
    assert not nodes_on_paths([node_of(through)], [weight], stop={node})
    assert nodes_on_paths([node_of(around)], [weight], stop={node})
