"""The heatmap of cosines shows each number in its cell, in its color, next to its names."""

from __future__ import annotations

import torch

from lightning_gradnorm.experiments.report import heatmap


def test_the_picture_has_each_cosine_in_its_cell_and_the_names_beside() -> None:
    cosines = torch.tensor([[1.0, -0.9, torch.nan], [-0.9, 1.0, 0.0], [torch.nan, 0.0, 1.0]])
    picture = heatmap.cosine_heatmap(["a", "b", "c"], cosines)
    longer = heatmap.cosine_heatmap(["a", "b", "segmentation"], cosines)
    margin = picture.shape[1] - 3 * 72 - 9
    corners = picture[:, margin + 5 :: 72, margin + 5 :: 72][:, :3, :3].permute(1, 2, 0)  # clear of the number
    for i in range(3):
        assert tuple(corners[i, i].tolist()) == heatmap.TOGETHER
    assert torch.equal(corners, corners.transpose(0, 1))
    near_vermilion = (corners[0, 1].int() - torch.tensor(heatmap.AGAINST)).abs().max()
    assert near_vermilion <= 26  # a tenth of the way to white
    assert tuple(corners[0, 2].tolist()) == heatmap.UNKNOWN
    assert tuple(corners[1, 2].tolist()) == heatmap.NEITHER
    assert (picture[:, margin : margin + 72, :margin] < 128).any()  # the name of the row
    assert (picture[:, :margin, margin : margin + 72] < 128).any()  # and of the column
    assert longer.shape[1] > picture.shape[1]
