"""The network of C-MAPSS: its sizes match the book, and the parts of a window that it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from harness import Batches, case
from network_sizes import count_parameters
from torch import nn

from lightning_gradnorm import GradNorm, MultiTaskModule
from lightning_gradnorm.experiments.problems.engines.network import EngineEncoder, health_head, rul_head
from lightning_gradnorm.experiments.problems.engines.tasks import engine_tasks

SMALL: dict[str, Any] = {"channels": (8, 16, 8), "hidden": 8, "funnel": (16, 32)}


def windows(batch: int = 4, window: int = 30, features: int = 14) -> torch.Tensor:
    return torch.randn(batch, window, features)


@pytest.mark.parametrize("window", [1, 7, 30])
@pytest.mark.parametrize("features", [3, 14])
def test_windows_of_any_length_become_vectors(window: int, features: int) -> None:
    encoder = EngineEncoder(features, **SMALL)
    representation = encoder(windows(5, window, features))
    assert representation.shape == (5, encoder.out_features) == (5, 32)
    assert (representation >= 0).all()


def test_parameters_are_as_many_as_the_book_says() -> None:
    with torch.device("meta"):
        encoder, heads = EngineEncoder(17), [rul_head(), health_head()]
    every = count_parameters(encoder) + sum(map(count_parameters, heads))
    assert count_parameters(encoder.convolutions) == 53_184  # published
    assert [count_parameters(head) for head in heads] == [4_737, 1_635]
    lstm, attention, norm = 2_236_416, 4 * 512 * (512 + 1), 2 * 512
    funnel = 513 * 256 + 257 * 64 + 65 * 32
    assert (
        every == 53_184 + lstm + attention + norm + funnel + 4_737 + 1_635 == 3_497_476
    )  # published: about 3.5 million
    assert round(count_parameters(encoder.lstm) / every, 2) == 0.64  # published
    assert sum(map(count_parameters, heads)) / every < 0.002  # published


def test_attention_from_the_last_cycle_alone_matches_full_attention() -> None:
    encoder = EngineEncoder(**SMALL).eval()
    x = windows()
    cycles, _ = encoder.lstm(encoder.convolutions(x.mT).mT)
    everyone, _ = encoder.attention(cycles, cycles, cycles)
    expected = encoder.funnel(encoder.norm(cycles + everyone)[:, -1])
    torch.testing.assert_close(encoder(x), expected)


@pytest.mark.parametrize("cycle", [0, 14, 29])
def test_every_cycle_of_the_window_and_no_other_window_is_seen(cycle: int) -> None:
    encoder = EngineEncoder(**SMALL).eval()
    x = windows().requires_grad_()
    encoder(x)[1].square().sum().backward()
    assert x.grad is not None
    assert x.grad[1, cycle].abs().min() > 0
    assert x.grad[[0, 2, 3]].abs().max() == 0


def test_order_of_the_cycles_matters() -> None:
    encoder, x = EngineEncoder(**SMALL).eval(), windows()
    assert not torch.allclose(encoder(x), encoder(x.flip(1)), atol=1e-3)


def test_every_parameter_gets_a_gradient() -> None:
    encoder = EngineEncoder(**SMALL)
    encoder(windows(32)).square().sum().backward()
    without = [name for name, parameter in encoder.named_parameters() if not parameter.grad.abs().sum() > 0]
    assert without == []


def test_dropout_is_for_training_only() -> None:
    encoder, x = EngineEncoder(**SMALL), windows()
    assert not torch.equal(encoder(x), encoder(x))
    encoder.eval()
    assert torch.equal(encoder(x), encoder(x))
    without = EngineEncoder(**SMALL, dropout=0.0)
    assert torch.equal(without(x), without(x))


def test_the_last_shared_layer_is_the_last_of_the_funnel(quiet_trainer: Any) -> None:
    model = MultiTaskModule(EngineEncoder(**SMALL, dropout=0.0), engine_tasks())
    batch = (windows(8), {"rul": 125 * torch.rand(8, 1), "health": torch.randint(3, (8,))})
    expected = {}
    for task, loss in model.task_losses(batch).items():
        (gradient,) = torch.autograd.grad(loss, [model.encoder.funnel[-2].weight], retain_graph=True)
        expected[task] = gradient.norm().item()
    trainer = quiet_trainer(callbacks=[GradNorm()])
    trainer.fit(model, Batches([batch]))
    found = {task: trainer.callback_metrics[f"gradnorm/grad_norm/{task}"].item() for task in expected}
    assert found == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_the_untrained_head_predicts_half_of_the_longest_life_and_learns(seed: int) -> None:
    torch.manual_seed(seed)
    encoder, head = EngineEncoder(**SMALL), rul_head()
    life = head(encoder(windows(64)))
    assert (life - 62.5).abs().max() < 2
    life.sum().backward()
    assert next(head.parameters()).grad.abs().max() > 0


def test_no_life_is_negative() -> None:
    head = rul_head(initial=0.5)
    assert (head(10 * torch.randn(1000, 32)) >= 0).all()
    (last,) = [layer for layer in head.modules() if isinstance(layer, nn.Linear) and layer.out_features == 1]
    nn.init.constant_(last.bias, -100.0)
    assert torch.equal(head(torch.randn(4, 32)), torch.zeros(4, 1))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        case("no feature", {"in_features": 0}, r"in_features should be positive integers, at least one; got \[0\]"),
        case("no convolution", {"channels": ()}, r"channels should be positive integers, at least one; got \[\]"),
        case(
            "half a unit", {"funnel": (64, 0.5)}, r"funnel should be positive integers, at least one; got \[64, 0\.5\]"
        ),
        case("heads that cannot share", {"hidden": 10}, r"hidden should be a positive multiple of 4; got 10"),
        case("all left out", {"dropout": 1.0}, r"dropout should be in \[0, 1\); got 1\.0"),
    ],
)
def test_number_out_of_range_is_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"EngineEncoder: {message}"):
        EngineEncoder(**wrong)


def test_windows_of_another_shape_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"windows should be of shape \(batch, window, 14\); got \(4, 14, 30\)\. Set in_features"
    ):
        EngineEncoder(**SMALL)(windows().mT)
    with pytest.raises(ValueError, match="initial should be a positive number of cycles; got 0"):
        rul_head(initial=0)
