"""NYUv2 experiments with rooms in place of NYUv2, and with its files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from configurations import QUICK, compose_run, options, tiny
from indoor import frames
from nyuv2_writers import write_mtan
from omegaconf import OmegaConf

from lightning_gradnorm.experiments.cli import train

Call = Callable[..., str]
SMALL = [*QUICK, *tiny("nyuv2_seg_small"), "callbacks=none", "logger=none"]
COUNTS = ("data.train_size", "data.val_size", "data.test_size")  # which files have of their own


def test_a_run_reports_that_it_uses_rooms_instead_of_nyuv2(call: Call) -> None:
    told = call(train.main, "experiment=nyuv2_seg_small", *SMALL)
    assert "Rendered rooms stand in for NYUv2. With its files: data=nyuv2 data.root=FOLDER" in told
    assert "stand in" not in call(train.main, "data=rooms", *SMALL)


def test_with_the_real_files_the_run_reports_their_format(
    call: Call, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_mtan(tmp_path / "files", frames(20), frames(3, first=20))
    options = [option for option in SMALL if not option.startswith(COUNTS)]
    told = call(train.main, "experiment=nyuv2_seg_small", "data=nyuv2", "data.root=files", *options)
    assert "stand in" not in told
    assert "files is in the MTAN folder format: 20 train and 3 test images" in told + caplog.text


def test_without_a_folder_it_is_asked_for(call: Call) -> None:
    told = call(train.main, "experiment=nyuv2_seg_small", "data=nyuv2", status=1)
    assert "data.root should be set" in told


@pytest.mark.parametrize("experiment", [one for one in options("experiment") if one.startswith("nyuv2")])
@pytest.mark.parametrize("data", ["rooms", "nyuv2"])
def test_predictions_have_the_size_of_the_targets(experiment: str, data: str, tmp_path: Path) -> None:
    config = compose_run(tmp_path, f"experiment={experiment}", f"data={data}")
    found: Any = OmegaConf.to_container(config, resolve=True)
    assert found["model"]["tasks"]["head"]["size"] == found["data"]["output_size"]
    if experiment != "nyuv2_mtan":  # which interpolates
        stride = found["model"]["encoder"]["output_stride"]
        assert [side // stride for side in found["data"]["input_size"]] == found["data"]["output_size"]


def test_the_channels_of_the_heads_follow_from_the_network(tmp_path: Path) -> None:
    for width, stride, channels in ((1.0, 4, 128), (0.25, 4, 32), (0.5, 8, 128)):
        network = [f"model.encoder.width={width}", f"model.encoder.output_stride={stride}"]
        config = compose_run(tmp_path, "data=rooms", *network, "model.encoder.pretrained=not_needed.pth")
        assert config.model.tasks.in_channels == channels


@pytest.mark.slow
def test_the_communitys_setup_leaves_an_incomplete_last_batch_out(call: Call) -> None:
    options = [*QUICK, *tiny("nyuv2_mtan"), "callbacks=none", "logger=none", "test=false"]
    nine = ["data.train_size=9", "trainer.limit_train_batches=1.0"]  # batches of 4
    call(train.main, "experiment=nyuv2_mtan", *options, *nine)
    told = call(train.main, "experiment=nyuv2_mtan", *options, *nine, "data.drop_last=false", status=1)
    assert "DeepLabHead: a training batch should have 2 images or more" in told
