"""Rooms: rendered indoor scenes with exact depth, normals, classes and layout keypoints.

`primitives`, `furniture` and `scene` define the contents of a room, `camera` and `layout` the view, `casting` and
`shading` compute the pixels. `render` draws one picture from a seed and a number, `module` is the data set.
"""

from lightning_gradnorm.experiments.problems.dense.rooms.layout import KEYPOINTS, LAYOUTS
from lightning_gradnorm.experiments.problems.dense.rooms.module import RoomsDataModule, RoomViews
from lightning_gradnorm.experiments.problems.dense.rooms.primitives import CLASSES
from lightning_gradnorm.experiments.problems.dense.rooms.render import View, render

__all__ = ["CLASSES", "KEYPOINTS", "LAYOUTS", "RoomViews", "RoomsDataModule", "View", "render"]
