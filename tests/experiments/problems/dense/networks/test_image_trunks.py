"""Properties of every image trunk: shapes, the last shared layer, gradients, memory, GradNorm on it."""

from __future__ import annotations

import copy
import gc
import re
import weakref
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from harness import Batches, Recorder, assert_agrees, case
from network_sizes import count_parameters
from textbook import Forward, train
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_gradnorm import Balancer, GradNorm, MultiTaskModule, Task
from lightning_gradnorm.experiments.problems.dense.networks import (
    ConvHead,
    DeepLabHead,
    DilatedResNet50,
    FCNResNet50,
    SegNet,
)
from lightning_gradnorm.strategies import GradNormRule

TRUNKS = [SegNet, partial(SegNet, batch_norm=False), FCNResNet50, DilatedResNet50]
NAMES = ["SegNet", "SegNet without batch norm", "FCNResNet50", "DilatedResNet50"]
each_trunk = pytest.mark.parametrize("trunk", TRUNKS, ids=NAMES)

SMALL = 0.125
# Slow enough for networks this deep: what grows by orders of magnitude agrees to fewer digits.
network_sgd = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)
CHANNELS = {"segmentation": 13, "depth": 1, "normals": 3}


def losses(predictions: dict[str, Tensor], targets: dict[str, Tensor]) -> dict[str, Tensor]:
    return {task: LOSSES[task](predictions[task], target) for task, target in targets.items()}


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "segmentation": F.cross_entropy,
    "depth": F.mse_loss,
    "normals": lambda prediction, target: (1 - F.cosine_similarity(prediction, target)).mean(),
}


def scenes(count: int, size: tuple[int, int], map_size: tuple[int, int]) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Batches of two images, in double precision."""
    return [
        (
            torch.rand(2, 3, *size, dtype=torch.float64),
            {
                "segmentation": torch.randint(13, (2, *map_size)),
                "depth": 5 * torch.rand(2, 1, *map_size, dtype=torch.float64),
                "normals": F.normalize(torch.randn(2, 3, *map_size, dtype=torch.float64), dim=1),
            },
        )
        for _ in range(count)
    ]


def model_on(encoder: Any, head: Callable[[int, int], nn.Module] = ConvHead) -> MultiTaskModule:
    tasks = {task: Task(head(encoder.out_channels, channels), LOSSES[task]) for task, channels in CHANNELS.items()}
    return MultiTaskModule(encoder, tasks, optimizer=network_sgd)


def found_layer(model: MultiTaskModule) -> str:
    """The name of the weight found in a model with nothing named."""
    model = copy.deepcopy(model).train()
    images = torch.rand(2, 3, 64, 64).to(next(model.parameters()))
    with Balancer(model, GradNormRule(list(model.task_heads))) as balancer:
        balancer.backward({task: prediction.square() for task, prediction in model(images).items()})
        balancer.step()
        (name,) = re.findall(r"W = (\S+) \([\d × ]+\), heads", repr(balancer))
    return name


@pytest.mark.parametrize(
    ("trunk", "parameters"),
    [
        case("SegNet: 14,723,136 of vgg16_bn, and 14,457,600 of three decoder stages", SegNet, 29_180_736),
        case(
            "SegNet without batch norm: 14,714,688 of vgg16, and three stages",
            partial(SegNet, batch_norm=False),
            29_168_832,
        ),
        case(
            "SegNet at the images' resolution: weights of vgg16 twice, but for a last layer of 64 to 64, and the biases",
            partial(SegNet, batch_norm=False, output_stride=1),
            2 * (14_714_688 - 4_224) - 3 * 64 * 9 + 64 * 64 * 9 + 4_224 + 3_776,
        ),
        case("thin FCN: 11,894,848 in the encoder, 3,506,816 in the decoder", FCNResNet50, 15_401_664),
        case("dilated ResNet-50: all of resnet50 but its classifier", DilatedResNet50, 25_557_032 - 2_049_000),
    ],
)
def test_number_of_parameters_is(trunk: Callable[[], nn.Module], parameters: int) -> None:
    with torch.device("meta"):
        assert count_parameters(trunk()) == parameters


@pytest.mark.parametrize(("trunk", "millions"), [(SegNet, 29), (FCNResNet50, 15)])
def test_number_of_parameters_with_one_layer_for_each_task_is_the_papers(
    trunk: Callable[[], nn.Module], millions: int
) -> None:
    with torch.device("meta"):
        assert round(count_parameters(model_on(trunk())) / 1e6) == millions


@each_trunk
def test_papers_images_become_80_by_80_maps_and_those_of_the_community_36_by_48(trunk: Callable[..., Any]) -> None:
    with torch.device("meta"):
        encoder = trunk()
        stride = 8 if trunk is DilatedResNet50 else 4
        channels = 2048 if trunk is DilatedResNet50 else 128
        assert encoder.out_channels == channels
        assert encoder(torch.rand(1, 3, 320, 320)).shape == (1, channels, 320 // stride, 320 // stride)
        assert encoder(torch.rand(2, 3, 288, 384)).shape == (2, channels, 288 // stride, 384 // stride)


@pytest.mark.each_value_once
@pytest.mark.parametrize("stride", [1, 2, 4, 8, 16])
@pytest.mark.parametrize(
    ("trunk", "channels"),
    [(SegNet, [64, 64, 128, 256, 512]), (FCNResNet50, [32, 64, 128, 256, 512])],
)
def test_representation_has_the_stride_that_is_asked_for(
    trunk: Callable[..., Any], channels: list[int], stride: int
) -> None:
    encoder = trunk(output_stride=stride, width=SMALL)
    found = encoder(torch.rand(2, 3, 32, 96)).shape
    assert found == (2, encoder.out_channels, 32 // stride, 96 // stride)
    assert encoder.out_channels == channels[stride.bit_length() - 1] * SMALL


def test_dilated_resnet_keeps_a_sixteenth_of_the_resolution_if_only_the_last_stage_dilates() -> None:
    encoder = DilatedResNet50(output_stride=16, width=SMALL)
    assert encoder(torch.rand(2, 3, 64, 96)).shape == (2, 256, 4, 6)


@pytest.mark.parametrize("size", [(32, 32), (45, 61), (33, 95), (63, 64)])
def test_sizes_that_no_stride_divides_are_rounded_down_by_segnet_and_up_by_the_dilated_resnet(
    size: tuple[int, int],
) -> None:
    images = torch.rand(2, 3, *size)
    assert SegNet(width=SMALL)(images).shape[-2:] == (size[0] // 4, size[1] // 4)
    assert DilatedResNet50(width=SMALL)(images).shape[-2:] == (-(-size[0] // 8), -(-size[1] // 8))


@each_trunk
def test_layer_that_gradnorm_finds_is_the_last_that_computes(trunk: Callable[..., Any]) -> None:
    model = model_on(trunk(width=SMALL))
    names = {module: name for name, module in model.named_modules()}
    computed: list[str] = []
    found = found_layer(model)
    for module in model.encoder.modules():
        if any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False)):
            module.register_forward_hook(lambda module, args, output: computed.append(f"{names[module]}.weight"))
    model.encoder(torch.rand(2, 3, 32, 64))
    assert len(set(computed)) == len(computed)
    assert found == computed[-1]


@pytest.mark.parametrize("trunk", TRUNKS[:3], ids=NAMES[:3])
def test_nothing_of_the_image_goes_past_the_last_shared_layer(trunk: Callable[..., Any]) -> None:
    model = model_on(trunk(width=SMALL)).eval()
    images = torch.rand(2, 3, 32, 64)
    seen, unseen = model.encoder(images)
    assert not torch.allclose(seen, unseen)
    model.get_parameter(found_layer(model)).data.zero_()
    assert torch.equal(*model.encoder(images))


@pytest.mark.each_value_once
@each_trunk
@pytest.mark.parametrize("head", [ConvHead, partial(ConvHead, hidden=8), partial(DeepLabHead, channels=8, dropout=0)])
def test_gradient_reaches_every_parameter_from_every_task(
    trunk: Callable[..., Any], head: Callable[[int, int], nn.Module]
) -> None:
    # In evaluation: a batch norm that sees the batch takes out whatever the bias before it adds.
    model = model_on(trunk(width=SMALL), head).eval()
    for task, prediction in model(torch.rand(1, 3, 64, 64)).items():
        model.zero_grad()
        prediction.square().sum().backward(retain_graph=True)
        without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
        others = {
            n for n, _ in model.named_parameters() if n.startswith("tasks.") and not n.startswith(f"tasks.{task}.")
        }
        assert without == others


@each_trunk
def test_nothing_of_a_batch_stays_on_the_network(trunk: Callable[..., Any]) -> None:
    encoder = trunk(width=SMALL)
    before = {name: set(vars(module)) for name, module in encoder.named_modules()}
    kept: list[weakref.ref[Tensor]] = []
    for module in encoder.modules():
        module.register_forward_hook(
            lambda module, args, output: kept.extend(
                weakref.ref(t) for t in (output if isinstance(output, tuple) else [output])
            )
        )
    encoder(torch.rand(2, 3, 32, 64)).sum().backward()
    gc.collect()
    assert kept
    assert [reference for reference in kept if reference() is not None] == []
    assert before == {name: set(vars(module)) for name, module in encoder.named_modules()}


@each_trunk
def test_little_more_than_two_maps_per_convolution_is_saved_for_the_backward_pass(
    trunk: Callable[..., Any],
) -> None:
    encoder = trunk(width=SMALL)
    maps, waiting = [0], {}
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda module, args, output: maps.append(4 * output.numel()))
    parameters = {parameter.data_ptr() for parameter in encoder.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            waiting[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        representation = encoder(torch.rand(2, 3, 64, 96))
    assert representation.requires_grad
    normalized = any(isinstance(module, nn.BatchNorm2d) for module in encoder.modules())
    # Besides: maxima and their places (8 bytes each), maps with zeros around the maxima, sums of both ways.
    assert sum(waiting.values()) <= (1.5 + normalized) * sum(maps)


@each_trunk
def test_an_image_has_the_same_result_in_any_batch_of_an_evaluation(trunk: Callable[..., Any]) -> None:
    encoder = trunk(width=SMALL).eval()
    images = torch.rand(3, 3, 32, 64)
    whole = encoder(images)
    assert (encoder(images[1:2]) - whole[1:2]).abs().max() <= 1e-5 * whole.abs().max()
    assert (whole[0] - whole[1]).abs().max() > 1e-2 * whole.abs().max()


@each_trunk
def test_half_precision_gives_nearly_the_same(trunk: Callable[..., Any]) -> None:
    encoder = trunk(width=SMALL).eval()
    images = torch.rand(2, 3, 64, 64)
    whole = encoder(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = encoder(images)
    assert half.dtype == torch.bfloat16
    assert F.cosine_similarity(half.float().flatten(), whole.flatten(), dim=0) > 0.95
    half.float().sum().backward()


@pytest.mark.each_value_once
@each_trunk
@pytest.mark.parametrize(
    ("size", "head"),
    [case("one layer for each task", None, ConvHead), case("DeepLab heads", (16, 24), DeepLabHead)],
)
def test_gradnorm_on_it_agrees_with_the_textbook(
    trunk: Callable[..., Any],
    size: tuple[int, int] | None,
    head: Callable[..., nn.Module],
    quiet_trainer: Callable[..., L.Trainer],
) -> None:
    options = {} if size is None else {"channels": 8, "dropout": 0, "size": size}
    torch.manual_seed(1)
    model = model_on(trunk(width=SMALL), partial(head, **options)).double()
    torch.manual_seed(1)
    twin = model_on(trunk(width=SMALL), partial(head, **options)).double()
    map_size = size or tuple(twin.eval().encoder(torch.zeros(1, 3, 64, 96, dtype=torch.float64)).shape[-2:])
    batches = scenes(2, (64, 96), map_size)

    gradnorm = GradNorm()
    recorder = Recorder(gradnorm)
    quiet_trainer(callbacks=[gradnorm, recorder]).fit(model, Batches(batches))

    def forward(batch: tuple[Tensor, dict[str, Tensor]]) -> Forward:
        images, targets = batch
        return Forward(losses(twin(images), targets))

    shared = [twin.get_parameter(found_layer(twin))]
    expected = train(twin, forward, batches, shared, network_sgd(twin.parameters()))
    assert len(expected.weights) == 2
    assert_agrees(recorder, model, expected, twin)


@each_trunk
def test_network_in_a_checkpoint_predicts_as_before(
    trunk: Callable[..., Any], quiet_trainer: Callable[..., L.Trainer], tmp_path: Path
) -> None:
    encoder = trunk(width=SMALL)
    heads = {"one_layer": ConvHead(encoder.out_channels, 2), "deep": DeepLabHead(encoder.out_channels, 2, channels=4)}
    model = MultiTaskModule(encoder, {task: Task(head, nn.MSELoss()) for task, head in heads.items()}).double()
    trainer = quiet_trainer(limit_train_batches=0)
    trainer.fit(model, Batches(scenes(1, (32, 32), (8, 8))))
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    again = MultiTaskModule.load_from_checkpoint(tmp_path / "it.ckpt").double().eval()
    images = torch.rand(2, 3, 32, 64, dtype=torch.float64)
    for task, prediction in model.eval()(images).items():
        assert torch.equal(again(images)[task], prediction)


@each_trunk
def test_images_are_standardized_as_imagenets_are_unless_told_otherwise(trunk: Callable[..., Any]) -> None:
    encoder = trunk(width=SMALL).eval()
    images = torch.rand(2, 3, 32, 64)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(1, 3, 1, 1)
    without = trunk(width=SMALL, standardize=False).eval()
    without.load_state_dict(encoder.state_dict())
    torch.testing.assert_close(encoder(images), without((images - mean) / std))


@each_trunk
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 0.3}, "width should be a positive multiple of 1/16; got 0.3"),
        ({"width": 0}, "width should be a positive multiple of 1/16; got 0"),
        ({"width": True}, "width should be a positive multiple of 1/16; got True"),
        ({"width": 0.5, "pretrained": "weights.pth"}, "width should be 1 for pretrained weights; got 0.5"),
        ({"output_stride": 3}, "output_stride should be .*; got 3"),
        ({"output_stride": 32}, "output_stride should be .*; got 32"),
    ],
)
def test_argument_out_of_range_is_refused(trunk: Callable[..., Any], wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^\w+: {message}"):
        trunk(**wrong)


@pytest.mark.parametrize(
    ("trunk", "images", "message"),
    [
        case("no batch", SegNet, torch.rand(3, 64, 64), r"SegNet: images should be .*\(batch, 3, height, width\); got"),
        case(
            "gray images", FCNResNet50, torch.rand(1, 1, 64, 64), r"FCNResNet50: images should .*got .*\(1, 1, 64, 64"
        ),
        case("bytes", DilatedResNet50, torch.zeros(1, 3, 64, 64, dtype=torch.uint8), r"DilatedResNet50: .*torch.uint8"),
        case("nothing would be left", SegNet, torch.rand(1, 3, 31, 64), r"SegNet: .* 32 or more.*; got 31 × 64"),
        case("no multiple", FCNResNet50, torch.rand(1, 3, 64, 90), r"multiples of 32.*; got 64 × 90.* 64 × 96"),
    ],
)
def test_images_that_do_not_fit_are_refused(trunk: Callable[..., Any], images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trunk(width=SMALL)(images)
