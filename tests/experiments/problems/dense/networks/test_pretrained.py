"""Weights come from files with torchvision's names, and from no other files."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_names as torchvision
from harness import case
from torch import Tensor, nn

from lightning_gradnorm.experiments.problems.dense.networks import DilatedResNet50, FCNResNet50, SegNet
from lightning_gradnorm.experiments.problems.dense.networks.pretrained import load_pretrained

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
NOT_THINNED = ("conv1.", "bn1.", "layer1.", "layer2.", "layer3.")


def standardized(images: Tensor) -> Tensor:
    return (images - torch.tensor(IMAGENET_MEAN).view(3, 1, 1)) / torch.tensor(IMAGENET_STD).view(3, 1, 1)


def names_and_shapes(network: nn.Module, *beginnings: str) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(v.shape)) for name, v in network.state_dict().items() if name.startswith(beginnings)]


@pytest.mark.parametrize("batch_norm", [True, False])
def test_names_of_segnets_encoder_are_those_of_vgg16(batch_norm: bool) -> None:
    with torch.device("meta"):
        network = SegNet(batch_norm=batch_norm)
    features = [item for item in torchvision.vgg16(batch_norm).items() if item[0].startswith("features.")]
    assert len(features) == (91 if batch_norm else 26)
    assert names_and_shapes(network, "") == features + names_and_shapes(network, "decoder.")


def test_names_of_the_dilated_resnet_are_those_of_resnet50() -> None:
    with torch.device("meta"):
        network = DilatedResNet50()
    assert len(torchvision.resnet50()) == 320
    assert names_and_shapes(network, "") == [i for i in torchvision.resnet50().items() if not i[0].startswith("fc.")]


def test_names_of_the_thin_fcn_are_those_of_resnet50_and_its_shapes_up_to_the_third_stage() -> None:
    with torch.device("meta"):
        network = FCNResNet50()
    expected = [item for item in torchvision.resnet50().items() if item[0].startswith(NOT_THINNED)]
    assert names_and_shapes(network, *NOT_THINNED) == expected
    # The last stage goes from 1024 channels to 1024, without a stride: no shortcut of its own.
    names = [n for n in torchvision.resnet50() if n.startswith("layer4.") and "downsample" not in n]
    assert [name for name, _ in names_and_shapes(network, "layer4.")] == names
    assert network.layer4[2].conv3.weight.shape == (1024, 256, 1, 1)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_segnet_with_vgg16s_weights_sees_what_vgg16_sees(batch_norm: bool, tmp_path: Path) -> None:
    state = torchvision.state_dict(torchvision.vgg16(batch_norm))
    torch.save(state, tmp_path / "vgg16.pth")
    network = SegNet(batch_norm=batch_norm, pretrained=tmp_path / "vgg16.pth").eval()
    seen: list[Tensor] = []
    network.features.get_submodule("43" if batch_norm else "30").register_forward_hook(
        lambda module, args, output: seen.append(output[0])
    )
    images = torch.rand(1, 3, 64, 32)
    with torch.no_grad():
        network(images)
        expected = torchvision.vgg16_features(state, standardized(images), batch_norm)
    assert expected.std() > 0.01
    torch.testing.assert_close(seen, [expected], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("network", "strides", "dilations"),
    [
        case("stride 8", DilatedResNet50, (1, 2, 1, 1), ((1, 1), (1, 1), (1, 2), (2, 4))),
        case("stride 16", partial(DilatedResNet50, 16), (1, 2, 2, 1), ((1, 1), (1, 1), (1, 1), (1, 2))),
    ],
)
def test_dilated_resnet_with_resnet50s_weights_sees_what_a_dilated_resnet50_sees(
    network: Callable[..., nn.Module], strides: Any, dilations: Any, tmp_path: Path
) -> None:
    state = torchvision.state_dict(torchvision.resnet50(), scale=0.7)
    torch.save(state, tmp_path / "resnet50.pth")
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        found = network(pretrained=str(tmp_path / "resnet50.pth")).eval()(images)
        expected = torchvision.resnet50_features(state, standardized(images), strides, dilations)
    assert expected.std() > 0.01
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_thin_fcn_takes_stem_and_three_stages_of_resnet50_and_strides_a_stage_earlier(tmp_path: Path) -> None:
    state = torchvision.state_dict(torchvision.resnet50(), scale=0.7)
    torch.save(state, tmp_path / "resnet50.pth")
    network = FCNResNet50(pretrained=tmp_path / "resnet50.pth").eval()
    for name, value in state.items():
        if name.startswith(NOT_THINNED):
            assert torch.equal(network.state_dict()[name], value)
    features: list[Tensor] = []
    network.layer4.register_forward_hook(lambda module, args, output: features.append(output))
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        network(images)
        inside = network.state_dict()
        expected = torchvision.resnet50_features(inside, standardized(images), (2, 2, 2, 1), ((1, 1),) * 4)
    assert expected.shape == (1, 1024, 2, 3)
    torch.testing.assert_close(features, [expected], rtol=1e-3, atol=1e-4 * float(expected.max()))


def test_file_of_vgg16_without_batch_norm_is_refused_where_batch_norm_is_expected(tmp_path: Path) -> None:
    meta = {name: torch.zeros(1).expand(shape) for name, shape in torchvision.vgg16(batch_norm=False).items()}
    torch.save(meta, tmp_path / "vgg16.pth")
    with pytest.raises(
        ValueError, match=r"SegNet: pretrained .*torchvision's vgg16_bn.*vgg16.pth' lacks features\."
    ) as e:
        SegNet(pretrained=tmp_path / "vgg16.pth")
    assert "in another shape" in str(e.value)


# ---- a network of two layers, for what may be wrong with a file ------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.decoder = nn.Conv2d(4, 2, 3)


def load(network: nn.Module, path: Path) -> None:
    load_pretrained(network, path, owner="Small", model="vgg", part=("features.",), left_out=("classifier.",))


@pytest.fixture
def state() -> dict[str, Any]:
    return {n: v + 1 for n, v in Small().state_dict().items() if n.startswith("features.")}


def test_part_is_loaded_and_the_rest_stays(state: dict[str, Any], tmp_path: Path) -> None:
    torch.save({**state, "classifier.0.weight": torch.zeros(5, 5)}, tmp_path / "w.pth")
    network = Small()
    decoder = network.decoder.weight.clone()
    load(network, tmp_path / "w.pth")
    assert all(torch.equal(network.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(network.decoder.weight, decoder)
    assert all(parameter.requires_grad and parameter.is_leaf for parameter in network.parameters())


def test_older_files_of_torchvision_in_the_older_format_without_counters_are_read(
    state: dict[str, Any], tmp_path: Path
) -> None:
    del state["features.1.num_batches_tracked"]
    torch.save(state, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    network = Small()
    load(network, tmp_path / "w.pth")
    assert torch.equal(network.state_dict()["features.0.weight"], state["features.0.weight"])


def test_weights_in_half_precision_become_those_of_the_network(state: dict[str, Any], tmp_path: Path) -> None:
    torch.save({name: value.half() for name, value in state.items()}, tmp_path / "w.pth")
    network = Small()
    load(network, tmp_path / "w.pth")
    assert network.features.get_parameter("0.weight").dtype == torch.float32


def _without(name: str) -> Callable[[dict[str, Any]], Any]:
    return lambda state: {n: v for n, v in state.items() if n != name}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        case("a name is missing", _without("features.0.bias"), r"'.*w\.pth' lacks features\.0\.bias\.$"),
        case(
            "a name too many",
            lambda state: {**state, "features.7.weight": torch.zeros(1)},
            r"'.*w\.pth' has besides features\.7\.weight\.$",
        ),
        case(
            "another shape",
            lambda state: {**state, "features.0.weight": torch.zeros(8, 3, 3, 3)},
            r"has in another shape features\.0\.weight \(8, 3, 3, 3\) instead of \(4, 3, 3, 3\)\.$",
        ),
        case(
            "names as DistributedDataParallel has them",
            lambda state: {f"module.{name}": value for name, value in state.items()},
            r"lacks features\.0\.weight, .* \(6 in all\); has besides module\.features\.0\.weight, .* \(7 in all\)",
        ),
        case(
            "a whole checkpoint",
            lambda state: {"state_dict": state, "epoch": 3},
            r"holds 'state_dict' \(dict\), 'epoch' \(int\)\. If the state dict is one of these, save it alone",
        ),
        case("a list", lambda state: list(state.values()), r"holds a list"),
        case("a module", lambda state: Small(), r"could not be read \(UnpicklingError: "),
        case("nothing", lambda state: {}, r"lacks features\.0\.weight, .* \(6 in all\)"),
    ],
)
def test_file_of_other_weights_is_refused(
    change: Callable[[dict[str, Any]], Any], message: str, state: dict[str, Any], tmp_path: Path
) -> None:
    torch.save(change(state), tmp_path / "w.pth")
    network = Small()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(ValueError, match=message) as refused:
        load(network, tmp_path / "w.pth")
    assert str(refused.value).startswith("Small: pretrained should be the state dict of torchvision's vgg, ")
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("content", [b"", b"<html>404 Not Found</html>", None], ids=["empty", "a web page", "cut off"])
def test_damaged_file_is_refused(content: bytes | None, state: dict[str, Any], tmp_path: Path) -> None:
    torch.save(state, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ValueError, match=r"w\.pth' could not be read \(.+\)\. Was it downloaded to its end\?"):
        load(Small(), tmp_path / "w.pth")


def test_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"SegNet: pretrained .* there is no file '.*none\.pth'.* torch\.save\("
    ):
        SegNet(pretrained=tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match=r"DilatedResNet50: pretrained .*resnet50.* there is no file"):
        DilatedResNet50(pretrained=tmp_path)
