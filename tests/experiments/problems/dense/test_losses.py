"""The losses of dense tasks against brute force over pixels, and with holes, empty batches and half precision."""

from __future__ import annotations

import math

import dense
import pytest
import torch
from harness import assert_says, case
from torch import Tensor, nn

from lightning_gradnorm.experiments.problems.dense.losses import (
    AbsoluteDepthLoss,
    KeypointLoss,
    NormalsLoss,
    SegmentationLoss,
    SquaredDepthLoss,
)
from lightning_gradnorm.experiments.problems.dense.targets import heat_maps, keypoints_of

LOSSES: list[tuple[str, nn.Module]] = [
    ("segmentation", SegmentationLoss()),
    ("depth", SquaredDepthLoss()),
    ("depth", AbsoluteDepthLoss()),
    ("normals", NormalsLoss()),
    ("keypoints", KeypointLoss()),
]
every_loss = pytest.mark.parametrize(("task", "loss"), LOSSES, ids=[type(loss).__name__ for _, loss in LOSSES])


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def nothing_known(task: str) -> Tensor:
    target = torch.zeros_like(dense.targets()[task])
    return target - 1 if task == "segmentation" else target


@pytest.mark.parametrize("seed", range(3))
def test_cross_entropy_is_that_of_each_pixel_with_a_label(seed: int) -> None:
    prediction, target = dense.predictions(seed=seed)["segmentation"], dense.targets(seed=seed + 10)["segmentation"]
    expected = mean(
        [
            math.log(math.fsum(math.exp(logit) for logit in logits)) - logits[int(label)]
            for logits, (label,) in dense.pixels(prediction, target)
            if label != -1
        ]
    )
    assert SegmentationLoss()(prediction, target).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_depth_losses_count_each_pixel_of_known_depth(seed: int) -> None:
    prediction, target = dense.predictions(seed=seed)["depth"], dense.targets(seed=seed + 10)["depth"]
    errors = [found - true for found, true in dense.depths(prediction, target)]
    assert SquaredDepthLoss()(prediction, target).item() == pytest.approx(mean([e**2 for e in errors]), rel=1e-5)
    assert AbsoluteDepthLoss()(prediction, target).item() == pytest.approx(mean([abs(e) for e in errors]), rel=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_the_loss_of_normals_is_one_minus_the_cosine_of_each_pixel(seed: int) -> None:
    prediction, target = dense.predictions(seed=seed)["normals"], dense.targets(seed=seed + 10)["normals"]
    expected = mean([1 - cosine for cosine in dense.cosines(prediction, target)])
    assert NormalsLoss()(prediction, target).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("degrees", [0, 30, 60, 90, 120, 180])
def test_the_loss_of_normals_at_a_known_angle(degrees: int) -> None:
    angle = math.radians(degrees)
    found, wall = dense.unit(math.sin(angle), 0, math.cos(angle)), dense.unit(0, 0, 1)
    assert NormalsLoss()(7 * found, wall).item() == pytest.approx(1 - math.cos(angle), abs=1e-6)


def test_a_normal_whose_components_sum_to_zero_is_a_normal() -> None:
    assert NormalsLoss()(dense.unit(0, 1, 0), dense.unit(0, -1, 1)).item() == pytest.approx(1 + math.sqrt(0.5))


@pytest.mark.parametrize("invisible", ["ignore", "empty"])
@pytest.mark.parametrize("as_maps", [False, True], ids=["points", "maps"])
def test_the_loss_of_keypoints_is_that_of_each_pixel_of_each_map(invisible: str, as_maps: bool) -> None:
    prediction, points, sigma = dense.predictions()["keypoints"], dense.targets()["keypoints"], 0.8
    squares = []
    for image, of_image in enumerate(points.tolist()):
        for kind, (x, y, visible) in enumerate(of_image):
            for row, line in enumerate(prediction[image, kind].tolist()):
                for column, found in enumerate(line):
                    height = (
                        math.exp(-((row + 0.5 - y) ** 2 + (column + 0.5 - x) ** 2) / (2 * sigma**2)) if visible else 0.0
                    )
                    if visible or invisible == "empty":
                        squares.append((found - height) ** 2)
    target = heat_maps(points, dense.SIZE, sigma) if as_maps else points
    loss = KeypointLoss(invisible, sigma=0.1 if as_maps else sigma)  # maps have their own sigma
    assert loss(prediction, target).item() == pytest.approx(mean(squares), rel=1e-5)


def test_points_and_their_heat_maps_say_the_same() -> None:
    points = torch.tensor([[[2.5, 3.5, 1.0], [0.0, 0.0, 0.0], [5.5, 0.5, 1.0]]])
    for target in (points, heat_maps(points, dense.SIZE, 1.0)):
        positions, visible = keypoints_of(target)
        assert visible.tolist() == [[True, False, True]]
        assert positions[visible].tolist() == [[2.5, 3.5], [5.5, 0.5]]


@every_loss
def test_nothing_reaches_the_prediction_where_the_target_is_not_known(task: str, loss: nn.Module) -> None:
    target = dense.targets()[task]
    prediction = dense.predictions()[task].requires_grad_()
    loss(prediction, target).backward()
    assert prediction.grad is not None
    if task == "keypoints":
        known = (target[..., 2] > 0)[..., None, None].expand_as(prediction)
    else:
        known = (target != (-1 if task == "segmentation" else 0)).reshape(len(target), -1, *dense.SIZE).any(1, True)
        known = known.expand_as(prediction)
    assert known.any()
    assert (~known).any()
    assert (prediction.grad[~known] == 0).all()
    assert (prediction.grad[known] != 0).all()


@every_loss
def test_the_gradient_is_that_of_finite_differences(task: str, loss: nn.Module) -> None:
    target = dense.targets(batch=1)[task]
    target = target if task == "segmentation" else target.double()
    prediction = dense.predictions(batch=1)[task].double().requires_grad_()
    assert torch.autograd.gradcheck(lambda p: loss(p, target), [prediction])


@every_loss
def test_a_batch_without_known_targets_has_zero_loss_and_zero_gradient(task: str, loss: nn.Module) -> None:
    prediction = dense.predictions()[task].requires_grad_()
    value = loss(prediction, nothing_known(task))
    assert value.item() == 0
    value.backward()
    assert prediction.grad is not None
    assert (prediction.grad == 0).all()


@pytest.mark.parametrize("hole", [torch.nan, torch.inf, -torch.inf, 0.0])
@pytest.mark.parametrize(
    ("task", "loss"), [("depth", SquaredDepthLoss()), ("depth", AbsoluteDepthLoss()), ("normals", NormalsLoss())]
)
def test_a_hole_may_hold_any_number_that_is_not_finite(task: str, loss: nn.Module, hole: float) -> None:
    target = dense.targets()[task]
    with_holes = target.masked_fill((target == 0).all(dim=1, keepdim=True), hole)
    one, other = (dense.predictions()[task].requires_grad_() for _ in range(2))
    loss(one, target).backward()
    loss(other, with_holes).backward()
    assert torch.equal(one.grad, other.grad)  # type: ignore[arg-type]


def test_a_predicted_normal_of_length_zero_still_learns_with_a_bounded_gradient() -> None:
    prediction = torch.zeros(1, 3, 1, 1, requires_grad=True)
    loss = NormalsLoss(shortest=0.01)(prediction, dense.unit(0, 0, 1))
    assert loss.item() == 1
    loss.backward()
    assert prediction.grad is not None
    assert prediction.grad.flatten().tolist() == pytest.approx([0, 0, -100])


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_does_not_overflow_in_the_sum(task: str, loss: nn.Module, dtype: torch.dtype) -> None:
    size = (160, 160)  # squared depths of 25,600 pixels sum up to more than float16 can hold
    prediction, target = (5 * dense.predictions(size=size)[task]).to(dtype), dense.targets(size=size)[task]
    if task == "segmentation":
        expected = loss(prediction.double(), target)
    else:  # Lightning's precision "16-true" converts the batch too
        target = target.to(dtype)
        expected = loss(prediction.double(), target.double())
    assert loss(prediction, target).item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "found", "true"),
    [
        case("labels with a channel", SegmentationLoss(), (2, 13, 4, 5), (2, 1, 4, 5)),
        case("logits of another size", SegmentationLoss(), (2, 13, 8, 10), (2, 4, 5)),
        case("depth without a channel would be broadcast", SquaredDepthLoss(), (2, 1, 4, 5), (2, 4, 5)),
        case("normals of another size", NormalsLoss(), (2, 3, 8, 10), (2, 3, 4, 5)),
        case("maps of fewer types", KeypointLoss(), (2, 1, 4, 5), (2, 48, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_named(loss: nn.Module, found: tuple[int, ...], true: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="needs a prediction of") as error:
        loss(torch.zeros(found), torch.zeros(true))
    assert_says(error.value, type(loss).__name__, f"shape {true}", f"got {found}")


def test_a_target_of_keypoints_that_is_neither_points_nor_maps_is_named() -> None:
    with pytest.raises(ValueError, match=r"points \(batch, K, 3\).*got shape \(2, 48, 2\)"):
        KeypointLoss()(torch.zeros(2, 48, 4, 5), torch.zeros(2, 48, 2))


def test_wrong_options_are_named() -> None:
    with pytest.raises(ValueError, match="did you mean 'ignore'"):
        KeypointLoss("ignored")
    with pytest.raises(ValueError, match="KeypointLoss: sigma should be a positive number of pixels; got 0"):
        KeypointLoss(sigma=0)
    with pytest.raises(ValueError, match="NormalsLoss: shortest should be a number between 0 and 1; got 2"):
        NormalsLoss(shortest=2)
