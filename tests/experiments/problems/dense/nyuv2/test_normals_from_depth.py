"""Normals of surfaces whose normals are known."""

from __future__ import annotations

import numpy as np
import pytest
from indoor import inside, rays, room

from lightning_gradnorm.experiments.problems.dense.nyuv2 import KINECT, Intrinsics, normals_from_depth
from lightning_gradnorm.experiments.problems.dense.nyuv2.normals_from_depth import RADIUS_AT_640

SIZE = (60, 80)
CAMERA = KINECT.scaled(SIZE[1] / 640, SIZE[0] / 480)


def plane(normal: np.ndarray, distance: float, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Depth of the plane whose points p have normal . p = -distance (the camera is in front of it); inf where not seen."""
    x, y = rays(size)
    towards = normal[0] * x - normal[1] * y - normal[2]  # the ray (x, -y, -1) in the frame x right, y up, z towards us
    with np.errstate(divide="ignore"):
        depth = -distance / towards
    return np.where(depth > 0, depth, np.inf)


def degrees(normals: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return np.degrees(np.arcsin(np.clip(np.linalg.norm(np.cross(normals, wanted, axis=0), axis=0), 0, 1)))


@pytest.mark.parametrize(
    "normal", [(0, 0, 1), (0, 0.6, 0.8), (0.6, 0, 0.8), (-0.5, 0.3, 0.7), (0.1, -0.8, 0.4), (-0.7, -0.7, 0.6)]
)
@pytest.mark.parametrize("radius", [1, 3])
def test_planes_are_exact(normal: tuple[float, float, float], radius: int) -> None:
    wanted = np.array(normal) / np.linalg.norm(normal)
    depth = plane(wanted, 1.5)
    seen = depth < 50
    depth = np.where(seen, depth, 0)
    normals = normals_from_depth(depth, CAMERA, radius=radius)
    assert (normals[:, ~seen] == 0).all()
    everywhere = np.broadcast_to(wanted[:, None, None], normals.shape)
    assert seen.mean() > 0.5
    assert (normals[2][seen] > 0).any()
    # A plane is exact wherever it is not at more than 80 degrees to the image: beyond, it may be cut, and so left unknown.
    inner = seen & (np.abs(np.gradient(np.where(seen, depth, np.nan))) * 100 < 400 * depth).all(axis=0)
    known = (normals != 0).any(axis=0)
    assert known[inner].mean() > 0.95
    assert degrees(normals, everywhere)[known].max() < 1e-3
    assert (normals * everywhere).sum(axis=0)[known].min() > 0.999  # and not the opposite


def test_the_frame_is_right_up_and_towards_the_camera() -> None:
    depth, _, surface = room(SIZE, 2.0, 1.4, 1.2, 4.0)
    normals = normals_from_depth(depth, CAMERA)
    for number, direction in enumerate([(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1)]):
        where = inside(surface) & (surface == number)
        assert where.sum() > 50
        assert np.abs(normals[:, where] - np.array(direction)[:, None]).max() < 1e-4


def test_a_spheres_error_is_its_curvature_and_falls_with_the_square_of_the_window() -> None:
    size, radius, distance = (240, 320), 0.8, 2.5
    x, y = rays(size)
    a, b = x**2 + y**2 + 1, -2 * distance
    root = b**2 - 4 * a * (distance**2 - radius**2)
    hit = root > 0
    depth = np.where(hit, (-b - np.sqrt(np.where(hit, root, 0))) / (2 * a), 0)
    points = np.stack([x * depth, -y * depth, -depth])
    wanted = (points - np.array([0, 0, -distance])[:, None, None]) / radius
    slanted = (wanted * -points).sum(axis=0) / np.maximum(np.linalg.norm(points, axis=0), 1e-9)
    facing = hit & (slanted > np.cos(np.radians(70)))
    assert facing.sum() > 15_000
    errors = {}
    for window in (2, 4):  # 4 is the default at this width
        normals = normals_from_depth(depth, KINECT.scaled(0.5, 0.5), radius=window)
        assert (normals[:, facing] != 0).any(axis=0).all()
        assert (normals * wanted).sum(axis=0)[facing].min() > 0.99
        errors[window] = degrees(normals, wanted)[facing].mean()
    assert errors[4] < 0.2
    assert errors[4] / errors[2] == pytest.approx(4, rel=0.25)
    assert np.array_equal(normals, normals_from_depth(depth, KINECT.scaled(0.5, 0.5)))


def test_nothing_is_averaged_over_a_step() -> None:
    """A slanted board half a meter before a slanted wall: each keeps its own normal up to the very edge."""
    board, wall = (np.array(n) / np.linalg.norm(n) for n in ((0.4, 0.0, 1.0), (-0.4, 0.2, 1.0)))
    is_board = np.zeros(SIZE, dtype=bool)
    is_board[15:45, 20:55] = True
    depth = np.where(is_board, plane(board, 1.2), plane(wall, 2.5))
    assert (np.abs(plane(board, 1.2) - plane(wall, 2.5))[is_board] > 0.5).all()
    wanted = np.where(is_board, board[:, None, None], wall[:, None, None])
    assert degrees(normals_from_depth(depth, CAMERA, radius=2), wanted).max() < 1e-3


def test_unknown_depth_is_an_unknown_normal_and_spoils_no_other() -> None:
    wanted = np.array([0.3, 0.5, 0.8]) / np.linalg.norm([0.3, 0.5, 0.8])
    depth = np.minimum(plane(wanted, 1.5), 20)
    depth[plane(wanted, 1.5) > 20] = 0
    holes = np.random.default_rng(0).uniform(size=SIZE) < 0.3
    depth[holes] = 0
    normals = normals_from_depth(depth, CAMERA, radius=2)
    assert (normals[:, depth == 0] == 0).all()
    known = (normals != 0).any(axis=0)
    assert known[depth > 0].mean() > 0.95
    assert degrees(normals, np.broadcast_to(wanted[:, None, None], normals.shape))[known].max() < 1e-3


def test_a_pixel_whose_neighbors_are_in_a_line_has_no_normal() -> None:
    depth = np.zeros((5, 5))
    depth[2] = 1.0
    assert (normals_from_depth(depth, Intrinsics(5, 5, 2.5, 2.5)) == 0).all()
    depth[1, 0] = 1.0
    assert (normals_from_depth(depth, Intrinsics(5, 5, 2.5, 2.5))[:, 2, 1] != 0).any()


def test_selected_pixels_match_the_whole_image() -> None:
    depth, _, _ = room(SIZE, 2.0, 1.4, 1.2, 4.0)
    rows, columns = np.array([0, 13, 59]), np.array([1, 2, 40, 79])
    whole = normals_from_depth(depth, CAMERA)
    assert np.array_equal(normals_from_depth(depth, CAMERA, rows, columns), whole[:, rows[:, None], columns])


def test_the_sensors_steps_do_not_bend_a_surface() -> None:
    """A wall 6 m away, slanted by 37 degrees, in the sensor's steps of 2.85 mm per squared meter: 10 cm there."""
    wanted = np.array([0.6, 0.0, 0.8])
    camera = Intrinsics(KINECT.fx, KINECT.fy, 60, 20)
    x, _ = camera.rays(np.arange(40)[:, None], np.arange(120))
    inverse = np.broadcast_to((wanted[2] - wanted[0] * x) / 4.8, (40, 120))
    depth = 1 / (np.round(inverse / 2.85e-3) * 2.85e-3)
    assert 0.09 < np.diff(np.unique(depth)).mean() < 0.12
    normals = normals_from_depth(depth, camera, radius=RADIUS_AT_640)
    assert (normals != 0).any(axis=0).all()
    mean = normals.mean(axis=(1, 2), dtype=np.float64)
    assert mean / np.linalg.norm(mean) == pytest.approx(wanted, abs=0.02)
