"""An image's targets agree with a ray traced through each pixel."""

from __future__ import annotations

import hashlib
import itertools
import math
import subprocess
import sys

import numpy as np
import pytest
from raytracing import SURFACES, ray, room, trace

from lightning_gradnorm.experiments.problems.dense.rooms import CLASSES, KEYPOINTS, View, render
from lightning_gradnorm.experiments.problems.dense.rooms.camera import Camera, pixel_rays, rotations
from lightning_gradnorm.experiments.problems.dense.rooms.casting import cast, faces_of
from lightning_gradnorm.experiments.problems.dense.rooms.primitives import Material, Primitive
from lightning_gradnorm.experiments.problems.dense.rooms.scene import Scene
from lightning_gradnorm.experiments.problems.dense.rooms.shading import shade
from lightning_gradnorm.experiments.problems.dense.rooms.viewpoint import CLEARANCE, draw_camera

NAMES = ("image", "segmentation", "depth", "normals", "keypoints")


@pytest.fixture(scope="module")
def views() -> list[View]:
    return [render(0, scene, (24, 32)) for scene in range(200)]


def digest(view: View) -> str:
    return hashlib.sha256(b"".join(getattr(view, name).tobytes() for name in NAMES)).hexdigest()


def compare_with_rays(scenes: range, height: int, width: int) -> int:
    """Compare every pixel's depth, normal and class with its ray's; return how many rays met a cylinder."""
    curved = 0
    for number in scenes:
        scene, camera, _ = room(5, number)
        view = render(5, number, (height, width))
        for row, column in itertools.product(range(height), range(width)):
            hit = trace(scene, camera, ray(camera, column + 0.5, row + 0.5, width, height))
            where = f"room {number}, row {row}, column {column}, {hit}"
            assert abs(view.depth[0, row, column] - hit.depth) < 1e-4, where
            assert np.abs(view.normals[:, row, column] - hit.normal).max() < 1e-4, where
            assert CLASSES[view.segmentation[row, column]] == hit.label, where
            curved += hit.surface not in SURFACES and scene.primitives[int(hit.surface)].round
    return curved


def test_depth_normals_and_classes_match_single_rays() -> None:
    assert compare_with_rays(range(30), 12, 16) > 20


@pytest.mark.slow
def test_depth_normals_and_classes_match_single_rays_in_many_rooms() -> None:
    assert compare_with_rays(range(1000, 1060), 24, 32) > 500


def one_box(part: Primitive) -> tuple[Scene, Camera]:
    gray = Material((0.5, 0.5, 0.5))
    scene = Scene(
        np.array([6.0, 4.0, 8.0]), (gray,) * 6, (part,), np.array([3.0, 3.5, 4.0]), np.ones(3), power=1.0, ambient=0.2
    )
    return scene, Camera(np.array([3.0, 2.0, 6.0]), rotations(*np.zeros((3, 1)))[0])


def test_a_wall_and_a_box_that_face_the_camera_have_one_depth_each_and_face_it() -> None:
    """Depth is along the optical axis: not longer at the image's edge."""
    box = Primitive("tv", Material((1, 1, 1)), center=(3.0, 2.0, 3.5), half=(0.5, 0.25, 0.5))
    scene, camera = one_box(box)
    faces = faces_of(scene, camera)
    hits = cast(faces, 48, 64)
    labels, depth = faces.label[hits.face], hits.depth
    front = labels == CLASSES.index("tv")
    assert np.allclose(depth[front], 2.0, rtol=0, atol=1e-12)
    wall = (labels == CLASSES.index("wall")) & np.isclose(depth, 6.0, rtol=0, atol=1e-9)
    assert np.allclose(faces.normal[hits.face[front | wall]], [0, 0, 1], rtol=0, atol=1e-12)
    # One meter wide and half a meter high at two meters.
    assert front.sum() == pytest.approx((518.86 / 640 * 64 / 2) * (519.47 / 480 * 48 / 4), rel=0.1)
    assert front.any(axis=0).sum() == pytest.approx(518.86 / 640 * 64 / 2, abs=1)


@pytest.mark.parametrize("round", [False, True], ids=["box", "cylinder"])
@pytest.mark.parametrize("beyond", [(0.0, 0.0, 4.0), (-8.0, 0.0, 0.0)], ids=["behind", "beside"])
def test_objects_behind_the_camera_are_not_in_the_image(round: bool, beyond: tuple[float, ...]) -> None:
    center = tuple(place + shift for place, shift in zip((3.0, 2.0, 3.5), beyond, strict=True))
    scene, camera = one_box(Primitive("tv", Material((1, 1, 1)), center, half=(0.4, 0.25, 0.4), round=round))
    faces = faces_of(scene, camera)
    assert CLASSES.index("tv") not in faces.label[cast(faces, 24, 32).face]


@pytest.mark.parametrize("round", [False, True], ids=["box", "cylinder"])
def test_objects_that_reach_from_behind_the_camera_into_the_image_are_visible(round: bool) -> None:
    shelf = Primitive("table", Material((1, 1, 1)), center=(3.0, 1.0, 6.0), half=(2.0, 0.5, 2.0), round=round)
    scene, camera = one_box(shelf)
    hits = cast(faces_of(scene, camera), 24, 32)
    for row, column in itertools.product(range(24), range(32)):
        hit = trace(scene, camera, ray(camera, column + 0.5, row + 0.5, 32, 24))
        assert hits.depth[row, column] == pytest.approx(hit.depth, abs=1e-9)


def test_labels_do_not_depend_on_the_images_size_and_are_exact_at_their_own_pixels() -> None:
    for scene in range(10):
        small, other = render(2, scene, (20, 28)), render(2, scene, (10, 11), (20, 28))
        fine = render(2, scene, (60, 84))
        assert other.image.shape == (3, 10, 11)
        for name in NAMES[1:]:
            assert np.array_equal(getattr(small, name), getattr(other, name)), name
        # The middle of three by three pixels has the same ray as the one that covers all nine.
        assert np.array_equal(small.segmentation, fine.segmentation[1::3, 1::3])
        assert np.abs(small.depth - fine.depth[:, 1::3, 1::3]).max() < 1e-5
        assert np.abs(small.normals - fine.normals[:, 1::3, 1::3]).max() < 1e-5


def test_arrays_are_as_promised(views: list[View]) -> None:
    for view in views:
        shapes = [(getattr(view, name).dtype.name, getattr(view, name).shape) for name in NAMES]
        assert shapes == [
            ("uint8", (3, 24, 32)),
            ("uint8", (24, 32)),
            ("float32", (1, 24, 32)),
            ("float32", (3, 24, 32)),
            ("float32", (48, 3)),
        ]
        assert np.abs(np.linalg.norm(view.normals, axis=0) - 1).max() < 1e-6
        visible = view.keypoints[:, 2] == 1
        assert (view.keypoints[~visible] == 0).all()
        assert (view.keypoints >= -1e-6).all()
        assert (view.keypoints[:, :2] <= [32 + 1e-5, 24 + 1e-5]).all()


def test_depths_are_plausible_for_a_room(views: list[View]) -> None:
    depth = np.stack([view.depth for view in views])
    assert depth.min() > 0.3
    assert depth.max() < 12
    assert 1.5 < np.median(depth) < 4


def test_normals_face_the_camera(views: list[View]) -> None:
    x, y = pixel_rays(24, 32)
    for view in views:
        towards = view.normals[0] * x + view.normals[1] * y[:, None] - view.normals[2]
        assert (towards < 0).all()


def test_every_class_is_in_some_of_the_pictures(views: list[View]) -> None:
    shares = np.array([np.bincount(view.segmentation.ravel(), minlength=13) for view in views]) / (24 * 32)
    assert ((shares > 0.01).mean(axis=0) > 0.03).all(), dict(zip(CLASSES, shares.mean(axis=0), strict=True))
    assert shares.mean(axis=0).max() < 0.6


def test_pictures_are_neither_dark_nor_washed_out(views: list[View]) -> None:
    means = np.array([view.image.mean() for view in views])
    assert means.min() > 40
    assert means.max() < 230
    assert np.mean([view.image.std() for view in views]) > 25


def test_no_camera_is_in_or_at_anything_and_everything_is_in_the_room() -> None:
    for number in range(150):
        scene, camera, _ = room(1, number)
        px, py, pz = camera.position
        assert 1.1 <= py <= 1.8
        for name, place, extent in (("x", px, scene.size[0]), ("z", pz, scene.size[2])):
            assert CLEARANCE <= place <= extent - CLEARANCE, name
        for part in scene.primitives:
            cx, cy, cz = part.center
            cos, sin = math.cos(part.yaw), math.sin(part.yaw)
            dx, dz = px - cx, pz - cz
            own = (cos * dx - sin * dz, py - cy, sin * dx + cos * dz)
            distance = math.hypot(*(max(abs(o) - h, 0.0) for o, h in zip(own, part.half, strict=True)))
            assert distance >= CLEARANCE - 1e-9, (number, part)
            reach_x = abs(cos) * part.half[0] + abs(sin) * part.half[2]
            reach_z = abs(sin) * part.half[0] + abs(cos) * part.half[2]
            for center, reach, extent in zip((cx, cy, cz), (reach_x, part.half[1], reach_z), scene.size, strict=True):
                assert center - reach >= -1e-9, (number, part)
                assert center + reach <= extent + 1e-9, (number, part)


def test_a_room_without_a_place_to_stand_is_not_searched_forever() -> None:
    full = Primitive("furniture", Material((1, 1, 1)), center=(3.0, 2.0, 4.0), half=(2.9, 1.9, 3.9))
    scene, _ = one_box(full)
    assert draw_camera(np.random.default_rng(0), scene) is None


def test_the_same_numbers_give_the_same_bytes_and_others_do_not() -> None:
    first = [digest(render(3, scene, (24, 32))) for scene in range(8)]
    assert first == [digest(render(3, scene, (24, 32))) for scene in range(8)]
    assert first[::-1] == [digest(render(3, scene, (24, 32))) for scene in reversed(range(8))]
    assert len({*first, *(digest(render(4, scene, (24, 32))) for scene in range(8))}) == 16


@pytest.mark.slow
def test_another_process_gives_the_same_bytes() -> None:
    code = "import hashlib; from lightning_gradnorm.experiments.problems.dense.rooms import render; "
    code += "v = render(3, 5, (24, 32)); "
    code += f"print(hashlib.sha256(b''.join(getattr(v, n).tobytes() for n in {NAMES})).hexdigest())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == digest(render(3, 5, (24, 32)))


@pytest.mark.parametrize("pattern", ["plain", "checker", "stripes"])
def test_colors_are_lamberts_law_on_the_pattern(pattern: str) -> None:
    material = Material((0.5, 0.3, 0.2), (0.1, 0.2, 0.4), pattern, scale=0.7)
    scene, camera = one_box(Primitive("tv", Material((1, 1, 1)), (0.5, 0.5, 7.5), (0.1, 0.1, 0.1)))
    light, size = [2.0, 3.0, 3.0], scene.size
    scene = Scene(size, (material,) * 6, scene.primitives, np.array(light), np.array([1.0, 0.9, 0.8]), 1.5, 0.25)
    faces = faces_of(scene, camera)
    image = shade(scene, camera, faces, cast(faces, 24, 32), np.random.default_rng(0))
    colors = set()
    for row, column in itertools.product(range(24), range(32)):
        direction = ray(camera, column + 0.5, row + 0.5, 32, 24)
        hit = trace(scene, camera, direction)
        point = camera.position + hit.depth * np.array(direction)
        to_light = np.array(light) - point
        distance = np.linalg.norm(to_light)
        normal = camera.rotation.T @ np.array(hit.normal)
        lamp = 1.5 * max(0.0, normal @ to_light) / distance / (1 + 0.25 * distance**2)
        # The patterns begin at the middle of each surface.
        axis = SURFACES.index(hit.surface) // 2
        first, second = ((2, 1), (0, 2), (0, 1))[axis]
        u, v = ((point - size / 2)[along] / 0.7 for along in (first, second))
        near_edge = min(abs(u - round(u)), abs(v - round(v))) < 1e-9
        odd = {"plain": 0, "checker": math.floor(u) + math.floor(v), "stripes": math.floor(u)}[pattern] % 2
        linear = np.array(material.second if odd else material.color) * (0.25 + lamp * np.array([1.0, 0.9, 0.8]))
        expected = np.clip(255 * np.sqrt(linear), 0, 255)
        colors.add(odd)
        assert near_edge or np.abs(image[:, row, column] - expected).max() <= 6, (row, column)
    assert colors == ({0} if pattern == "plain" else {0, 1})


# Keypoints. The walls are named as they stand in the image, from left to right, which no keypoint has a part in.

WALLS_IN_VIEW = (3, 3, 3, 2, 2, 2, 1, 3, 1, 1, 2)
FLOOR_IN_VIEW = (1, 1, 0, 0, 1, 1, 1, 0, 0, 1, 0)
CEILING_IN_VIEW = (1, 0, 1, 1, 0, 1, 1, 0, 1, 0, 0)


def surfaces_in_view(scene: Scene, camera: Camera) -> tuple[list[str], bool, bool]:
    """The walls in view of the empty room from left to right, and whether floor and ceiling are."""
    seen: dict[str, list[float]] = {}
    # The border closely, for what is narrow there, and the inside coarsely.
    places = [(x, y) for x in np.linspace(0, 1, 161) for y in (0.0, 1.0)]
    places += [(x, y) for y in np.linspace(0, 1, 121) for x in (0.0, 1.0)]
    places += itertools.product(np.linspace(0.05, 0.95, 9), repeat=2)
    for x, y in places:
        surface = trace(scene, camera, ray(camera, x, y, 1, 1), with_primitives=False).surface
        seen.setdefault(surface, []).append(x)
    walls = sorted((name for name in seen if name[-1] in "xz"), key=lambda name: np.mean(seen[name]))
    return walls, "floor" in seen, "ceiling" in seen


def check_keypoints(scenes: range) -> set[int]:
    """Check the keypoints of some rooms; return which layouts there were."""
    found = set()
    for number in scenes:
        scene, camera, shares = room(8, number)
        visible = [row for row in range(48) if shares[row, 2]]
        (layout,) = {KEYPOINTS[row][0] for row in visible}
        assert visible == [row for row in range(48) if KEYPOINTS[row][0] == layout]
        found.add(layout)
        walls, floor, ceiling = surfaces_in_view(scene, camera)
        where = f"room {number}, layout {layout}: {walls}, floor {floor}, ceiling {ceiling}"
        assert (len(walls), floor, ceiling) == (
            WALLS_IN_VIEW[layout],
            FLOOR_IN_VIEW[layout],
            CEILING_IN_VIEW[layout],
        ), where
        names = {3: "lfr", 2: "fr", 1: "f"}[len(walls)]
        planes = {**dict(zip(names, walls, strict=True)), "d": "floor", "u": "ceiling"}
        for row in visible:
            x, y, _ = shares[row]
            start, _, towards = KEYPOINTS[row][1].partition(">")
            shared = [letter for letter in start if letter in (towards or start)]
            direction = ray(camera, x, y, 1, 1)
            depth = trace(scene, camera, direction, with_primitives=False).depth
            point = camera.position + depth * np.array(direction)
            for letter in shared:
                side = SURFACES.index(planes[letter])
                expected = scene.size[side // 2] if side % 2 else 0.0
                assert abs(point[side // 2] - expected) < 1e-4, f"{where}, keypoint {KEYPOINTS[row]}"
            at_border = min(x, y, 1 - x, 1 - y)
            assert abs(at_border) < 1e-9 if towards else at_border > 0, f"{where}, keypoint {KEYPOINTS[row]}"
        for one, other in itertools.combinations(visible, 2):
            first, second = KEYPOINTS[one][1], KEYPOINTS[other][1]
            if first == ">".join(reversed(second.split(">"))):  # both ends of one edge, left or upper first
                assert shares[one][0 if layout in (6, 8, 9) else 1] < shares[other][0 if layout in (6, 8, 9) else 1]
    return found


def test_keypoints_are_where_the_rooms_surfaces_meet() -> None:
    assert len(check_keypoints(range(60))) >= 7


@pytest.mark.slow
def test_keypoints_are_where_the_rooms_surfaces_meet_in_all_eleven_layouts() -> None:
    assert check_keypoints(range(1000)) == set(range(11))


def test_keypoint_types_are_those_of_the_eleven_layouts() -> None:
    assert np.bincount([layout for layout, _ in KEYPOINTS]).tolist() == [8, 6, 6, 4, 4, 6, 4, 4, 2, 2, 2]
    assert len(set(KEYPOINTS)) == 48
