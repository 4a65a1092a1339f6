"""Metrics of dense tasks: by hand on a few pixels, by brute force on random ones, and the same in parts as on the whole."""

from __future__ import annotations

import math
from collections.abc import Callable

import dense
import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics import Metric

from lightning_gradnorm.experiments.problems.dense.metrics import (
    CosineError,
    KeypointError,
    MeanAngle,
    MeanIoU,
    MedianAngle,
    PixelAccuracy,
    SegmentationError,
    WithinAngle,
)
from lightning_gradnorm.experiments.problems.dense.targets import heat_maps
from lightning_gradnorm.experiments.problems.dense.tasks import OUT_CHANNELS, nyuv2_metrics
from lightning_gradnorm.experiments.report import higher_is_better

EVERY = [(task, name) for task in OUT_CHANNELS for name in nyuv2_metrics(task)]
every_metric = pytest.mark.parametrize(("task", "name"), EVERY, ids=[name for _, name in EVERY])
WALL = dense.unit(0, 0, 1)


def labels(*values: int) -> Tensor:
    return torch.tensor(values).reshape(1, 1, -1)


def said(*values: int) -> Tensor:
    """Logits that are largest at these classes."""
    return torch.nn.functional.one_hot(labels(*values), dense.CLASSES).movedim(-1, 1).float()


def at(degrees: float) -> Tensor:
    """A normal that is turned away from the wall's by so much."""
    return dense.unit(math.sin(math.radians(degrees)), 0, math.cos(math.radians(degrees)))


def of(metric: Metric, prediction: Tensor, target: Tensor) -> float:
    metric.update(prediction, target)
    value: float = metric.compute().item()
    return value


# ---- brute force -----------------------------------------------------------------------------------------------------


def iou_of_classes(prediction: Tensor, target: Tensor) -> list[float]:
    """Of the classes that occur; `prediction` are logits."""
    pairs = [(int(np.argmax(logits)), int(true)) for logits, (true,) in dense.pixels(prediction, target) if true != -1]
    ious = []
    for kind in range(dense.CLASSES):
        union = sum(kind in pair for pair in pairs)
        if union:
            ious.append(sum(pair == (kind, kind) for pair in pairs) / union)
    return ious


def right(prediction: Tensor, target: Tensor) -> list[bool]:
    return [np.argmax(logits) == true for logits, (true,) in dense.pixels(prediction, target) if true != -1]


BRUTE_FORCE: dict[str, Callable[[Tensor, Tensor], float]] = {
    "miou": lambda p, t: float(np.mean(iou_of_classes(p, t))),
    "error": lambda p, t: 1 - float(np.mean(iou_of_classes(p, t))),
    "pixel_accuracy": lambda p, t: float(np.mean(right(p, t))),
    "rmse": lambda p, t: math.sqrt(np.mean([(found - true) ** 2 for found, true in dense.depths(p, t)])),
    "absolute_error": lambda p, t: float(np.mean([abs(found - true) for found, true in dense.depths(p, t)])),
    "relative_error": lambda p, t: float(np.mean([abs(found - true) / true for found, true in dense.depths(p, t)])),
    "cosine_error": lambda p, t: float(np.mean([1 - abs(cosine) for cosine in dense.cosines(p, t)])),
    "mean_angle": lambda p, t: float(np.mean(dense.angles(p, t))),
    "median_angle": lambda p, t: float(np.median(dense.angles(p, t))),
    "within_11": lambda p, t: float(np.mean([angle < 11.25 for angle in dense.angles(p, t)])),
    "within_22": lambda p, t: float(np.mean([angle < 22.5 for angle in dense.angles(p, t)])),
    "within_30": lambda p, t: float(np.mean([angle < 30 for angle in dense.angles(p, t)])),
    "keypoint_error": lambda p, t: 100 * float(np.mean(dense.keypoint_distances(p, t))) / math.hypot(*p.shape[2:]),
}


def near(task: str, seed: int, size: tuple[int, int] = dense.SIZE) -> tuple[Tensor, Tensor]:
    """A prediction that is partly right, so no metric is trivially 0."""
    prediction, target = dense.predictions(seed=seed, size=size)[task], dense.targets(seed=seed + 10, size=size)[task]
    if task == "segmentation":
        prediction += 3 * torch.nn.functional.one_hot(target.clamp(min=0), dense.CLASSES).movedim(-1, 1)
    if task == "normals":
        prediction = target + 0.3 * prediction
    return prediction, target


@every_metric
@pytest.mark.parametrize("seed", range(3))
def test_every_metric_is_that_of_brute_force_over_pixels(task: str, name: str, seed: int) -> None:
    metric, batches = nyuv2_metrics(task)[name], [near(task, seed=2 * seed + i) for i in range(2)]
    for batch in batches:
        metric.update(*batch)
    expected = BRUTE_FORCE[name](*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    assert expected > 0
    tolerance = 5.1e-4 if name == "median_angle" else 1e-5 * expected
    assert metric.compute().item() == pytest.approx(expected, abs=tolerance)


@every_metric
def test_two_ranks_add_up_to_one(task: str, name: str) -> None:
    prediction, target = (part[[0, 1, 2, 0]] for part in near(task, seed=5))  # both ranks have seen the first image
    whole, first, second = (nyuv2_metrics(task)[name] for _ in range(3))
    whole.update(prediction, target)
    first.update(prediction[:1], target[:1])  # one image here, two there: a mean of means would differ
    second.update(prediction[1:], target[1:])
    first.merge_state(second)
    assert first.compute().item() == pytest.approx(whole.compute().item(), rel=1e-6)
    assert first.metric_state.keys() == whole.metric_state.keys()
    for state, value in whole.metric_state.items():
        torch.testing.assert_close(first.metric_state[state], value)


@every_metric
def test_a_rank_that_knows_nothing_changes_nothing(task: str, name: str) -> None:
    prediction, target = near(task, seed=6)
    nothing = torch.full_like(target, -1) if task == "segmentation" else torch.zeros_like(target)
    plain, metric = nyuv2_metrics(task)[name], nyuv2_metrics(task)[name]
    plain.update(prediction, target)
    metric.update(prediction, nothing)
    alone = metric.compute().item()
    assert math.isnan(alone) or name == "pixel_accuracy"  # torchmetrics returns 0 for it
    metric.update(prediction, target)
    assert metric.compute().item() == plain.compute().item()


@every_metric
def test_half_precision_is_judged_in_single(task: str, name: str) -> None:
    prediction, target = near(task, seed=7, size=(40, 40))
    prediction, target = prediction.bfloat16(), target if task == "segmentation" else target.bfloat16()
    found, expected = nyuv2_metrics(task)[name], nyuv2_metrics(task)[name]
    found.update(prediction, target)
    expected.update(prediction.float(), target.float() if target.is_floating_point() else target)
    assert found.compute().item() == expected.compute().item()


@every_metric
def test_metric_and_report_agree_on_which_direction_is_better(task: str, name: str) -> None:
    assert higher_is_better(name) is not None
    assert higher_is_better(name) is nyuv2_metrics(task)[name].higher_is_better


# ---- by hand ---------------------------------------------------------------------------------------------------------


def test_mean_iou_is_over_the_classes_that_occur() -> None:
    # Class 0: one of two pixels. Class 1: one of three. Class 2: said once, never true. The other ten: nobody has them.
    found, true = said(0, 1, 1, 2, 5), labels(0, 0, 1, 1, -1)
    ious = [1 / 2, 1 / 3, 0]
    assert of(MeanIoU(num_classes=13), found, true) == pytest.approx(sum(ious) / 3)
    assert of(SegmentationError(num_classes=13), found, true) == pytest.approx(1 - sum(ious) / 3)
    assert of(PixelAccuracy(num_classes=13), found, true) == 0.5


def test_mean_iou_sums_over_images_before_it_divides() -> None:
    metric = MeanIoU(num_classes=13)
    metric.update(said(0, 0), labels(0, 0))
    metric.update(said(0, 1), labels(1, 1))
    assert metric.compute().item() == pytest.approx((2 / 3 + 1 / 2) / 2)  # of single images: 1, and (0 + 1/2) / 2


@pytest.mark.parametrize("degrees", [0.0, 0.01, 1.0, 11.0, 45.0, 89.0, 90.0, 135.0, 179.99, 180.0])
def test_angles_of_known_normals(degrees: float) -> None:
    for length in (1e-3, 1.0, 40.0):
        assert of(MeanAngle(), length * at(degrees), WALL) == pytest.approx(degrees, abs=2e-5)
        assert of(MedianAngle(), length * at(degrees), WALL) == pytest.approx(degrees, abs=5.2e-4)
        expected = 1 - abs(math.cos(math.radians(degrees)))
        assert of(CosineError(), length * at(degrees), WALL) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bound", [11.25, 22.5, 30])
def test_an_angle_is_within_a_bound_if_it_is_smaller(bound: float) -> None:
    for degrees, expected in ((bound - 0.001, 1.0), (bound + 0.001, 0.0)):
        assert of(WithinAngle(bound), at(degrees), WALL) == expected


def test_the_median_of_an_even_number_is_between_the_two_in_the_middle() -> None:
    metric = MedianAngle()
    for degrees in (80.0, 10.0, 20.0, 3.0):
        metric.update(at(degrees), WALL)
    assert metric.compute().item() == pytest.approx(15.0, abs=1e-3)


def test_a_predicted_normal_without_direction_is_at_a_right_angle() -> None:
    nowhere = torch.zeros_like(WALL)
    assert of(MeanAngle(), nowhere, WALL) == 90
    assert of(CosineError(), nowhere, WALL) == 1
    assert of(WithinAngle(30), nowhere, WALL) == 0


def test_a_network_that_has_diverged_is_not_praised() -> None:
    broken = torch.full_like(WALL, torch.nan)
    assert math.isnan(of(MeanAngle(), broken, WALL))
    assert math.isnan(of(CosineError(), broken, WALL))
    assert of(MedianAngle(), broken, WALL) == pytest.approx(180, abs=1e-3)
    assert of(WithinAngle(30), broken, WALL) == 0


def test_the_state_of_the_median_does_not_grow_with_the_set() -> None:
    metric = MedianAngle()
    before = sum(value.numel() for value in metric.metric_state.values())
    for seed in range(3):
        metric.update(*near("normals", seed))
    assert sum(value.numel() for value in metric.metric_state.values()) == before


def test_the_error_of_keypoints_by_hand() -> None:
    maps = torch.zeros(1, 3, 6, 8)  # the diagonal is 10 pixels
    maps[0, 0, 0, 0] = maps[0, 1, 5, 7] = maps[0, 2, 2, 2] = 1.0
    points = torch.tensor([[[3.5, 4.5, 1.0], [7.5, 5.5, 1.0], [0.0, 0.0, 0.0]]])  # 5 pixels off, none, cannot be seen
    assert of(KeypointError(), maps, points) == pytest.approx(25.0)
    assert of(KeypointError(), maps, heat_maps(points, (6, 8), 1.0)) == pytest.approx(25.0)


@pytest.mark.parametrize(
    ("metric", "found", "true"),
    [
        (MeanAngle(), (1, 3, 8, 8), (1, 3, 4, 4)),
        (KeypointError(), (1, 48, 8, 8), (1, 48, 4, 4)),
        (KeypointError(), (1, 1, 8, 8), (1, 48, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_named(metric: Metric, found: tuple[int, ...], true: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=type(metric).__name__) as error:
        metric.update(torch.rand(found), torch.rand(true))
    assert str(found) in str(error.value)
    assert str(true) in str(error.value)


def test_the_error_names_an_invalid_angle() -> None:
    with pytest.raises(ValueError, match="WithinAngle: degrees should be a number above 0, at most 180; got 0"):
        WithinAngle(0)
