"""The maze: its walls, its walks, and its views against a slow renderer of one ray at a time."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import map_coordinates
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from far_env.clips.worlds import WORLDS, raycaster
from far_env.clips.worlds.maze import (
    BACKWARD,
    FLOORS,
    FORWARD,
    LEFT,
    MAZE_SIZE,
    RIGHT,
    UNSEEN_STYLE,
    WALKER_RADIUS,
    WALLS,
    draw_plan,
    draw_walls,
    explore_and_retrace,
    explore_to_the_farthest,
)
from far_env.clips.worlds.raycaster import EYE_HEIGHT, SKY, TEXTURE_SIZE, WALL_HEIGHT, render

ROOMS = [(row, column) for row in range(1, MAZE_SIZE, 2) for column in range(1, MAZE_SIZE, 2)]


def psnr(pictures: np.ndarray, target: np.ndarray) -> np.ndarray:
    return -10 * np.log10(np.maximum(np.square(pictures - target).mean(axis=(-3, -2, -1)), 1e-8))


def passages(walls: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of numbers of rooms without a wall between them."""
    numbers = {room: number for number, room in enumerate(ROOMS)}
    pairs = []
    for row, column in ROOMS:
        for down, right in ((0, 2), (2, 0)):
            other = row + down, column + right
            if other in numbers and not walls[row + down // 2, column + right // 2]:
                pairs.append((numbers[row, column], numbers[other]))
    return pairs


def test_without_openings_a_maze_is_a_spanning_tree_of_its_rooms():
    for seed in range(30):
        walls = draw_walls(np.random.default_rng(seed), opening_probability=0)
        pairs = np.array(passages(walls))
        assert len(pairs) == len(ROOMS) - 1
        graph = coo_array((np.ones(len(pairs)), pairs.T), shape=(len(ROOMS), len(ROOMS)))
        assert connected_components(graph, directed=False)[0] == 1
        assert (~walls).sum() == 2 * len(ROOMS) - 1, "nothing is open but rooms and passages"


def test_each_remaining_wall_between_two_rooms_is_opened_with_the_given_probability():
    opened = [len(passages(draw_walls(np.random.default_rng(seed)))) - len(ROOMS) + 1 for seed in range(500)]
    remaining = 2 * 4 * 3 - (len(ROOMS) - 1)
    assert abs(np.mean(opened) - 0.15 * remaining) < 4 * math.sqrt(remaining * 0.15 * 0.85 / 500)


def cast(walls: np.ndarray, x: float, y: float, dx: float, dy: float) -> tuple[float, int, tuple[int, int]]:
    """Distance to the first wall in units of the direction, the axis that the ray crosses there, and the cell before it
    (Amanatides and Woo 1987)."""
    column, row = math.floor(x), math.floor(y)
    step_x, step_y = (1 if dx > 0 else -1), (1 if dy > 0 else -1)
    next_x = ((column + (dx > 0)) - x) / dx if dx else math.inf
    next_y = ((row + (dy > 0)) - y) / dy if dy else math.inf
    while True:
        before = row, column
        if next_x < next_y:
            distance, axis = next_x, 0
            column, next_x = column + step_x, next_x + abs(1 / dx)
        else:
            distance, axis = next_y, 1
            row, next_y = row + step_y, next_y + abs(1 / dy)
        if walls[row, column]:
            return distance, axis, before


@cache
def texture_level(texture: int, level: int) -> np.ndarray:
    picture = np.asarray(Image.open(raycaster._TEXTURES).convert("RGB"), dtype=np.float64) / 255
    picture = picture[:, TEXTURE_SIZE * texture : TEXTURE_SIZE * (texture + 1)]
    side = TEXTURE_SIZE >> level
    return picture.reshape(side, 2**level, side, 2**level, 3).mean(axis=(1, 3))


def texel(texture: int, u: float, v: float, pixel: float) -> np.ndarray:
    """Colour of a texture where a pixel covers ``pixel`` of its side."""
    picture = texture_level(texture, min(max(round(math.log2(pixel * TEXTURE_SIZE)), 0), 6))
    side = len(picture)
    place = [[v * side - 0.5], [u * side - 0.5]]
    return np.array([map_coordinates(picture[..., c], place, order=1, mode="grid-wrap")[0] for c in range(3)])


def test_views_equal_those_of_a_renderer_of_single_rays():
    size = 16
    rng = np.random.default_rng(0)
    plan = draw_plan(rng, (0, 1, 2, 3, 4))
    cells = np.argwhere(~plan.walls)[::5]
    poses = np.stack([np.array([c + 0.5, r + 0.4, rng.uniform(0, 7)]) for r, c in cells])
    frames = render(plan, poses, size)
    kinds = set()
    for (x, y, heading), frame in zip(poses, frames, strict=True):
        for column in range(size):
            across = 2 * (column + 0.5) / size - 1
            dx = math.cos(heading) - across * math.sin(heading)
            dy = math.sin(heading) + across * math.cos(heading)
            distance, axis, (cell_row, cell_column) = cast(plan.walls, x, y, dx, dy)
            for row in range(size):
                down = 2 * (row + 0.5) / size - 1
                height = EYE_HEIGHT - down * distance
                if height >= WALL_HEIGHT:
                    kind, expected = "sky", SKY
                elif height >= 0:
                    kind = "wall"
                    u = (y + distance * dy) % 1 if axis == 0 else (x + distance * dx) % 1
                    slant = abs((dx, dy)[axis]) / math.hypot(dx, dy)
                    texture = plan.wall_textures[cell_row, cell_column]
                    expected = texel(texture, u, 1 - height / WALL_HEIGHT, 2 / size * distance / math.sqrt(slant))
                else:
                    kind, depth = "floor", EYE_HEIGHT / down
                    place = x + depth * dx, y + depth * dy
                    texture = plan.floor_textures[math.floor(place[1]), math.floor(place[0])]
                    expected = texel(texture, place[0] % 1, place[1] % 1, 2 / size * depth * math.sqrt(depth / EYE_HEIGHT))
                np.testing.assert_allclose(frame[row, column], expected, atol=1e-5)
                kinds.add(kind)
    assert kinds == {"sky", "wall", "floor"}


@pytest.mark.filterwarnings("ignore:Palette images")
def test_textures_are_those_of_deepmind_lab():
    assets = pytest.importorskip("labmaze.assets", reason="labmaze is not installed")
    folder = Path(assets.__file__).parent
    picture = np.asarray(Image.open(raycaster._TEXTURES).convert("RGB"))
    files = [
        sorted((folder / f"style_0{style + 1}").glob(f"{kind}_*_d.png")) for style in range(5) for kind in ("floor", "wall")
    ]
    assert [len(group) for group in files] == [len(g) for pair in zip(FLOORS, WALLS, strict=True) for g in pair]
    for number, path in enumerate(path for group in files for path in group):
        texture = Image.open(path).convert("RGB").resize((TEXTURE_SIZE, TEXTURE_SIZE), Image.Resampling.BOX)
        np.testing.assert_array_equal(picture[:, number * TEXTURE_SIZE : (number + 1) * TEXTURE_SIZE], np.asarray(texture))


def walk_again(poses: np.ndarray, actions: np.ndarray, turn: float, step: float) -> None:
    """Assert that every action changes the pose by one turn or one step, shorter where a wall is slid along."""
    for before, now, action in zip(poses[:-1], poses[1:], actions[1:], strict=True):
        moved = now[:2] - before[:2]
        if action in (LEFT, RIGHT):
            assert moved.tolist() == [0, 0]
            assert now[2] - before[2] == pytest.approx(turn if action == RIGHT else -turn)
        else:
            heading = np.deg2rad(before[2])
            expected = (step if action == FORWARD else -step) * np.array([np.cos(heading), np.sin(heading)])
            assert now[2] == before[2]
            assert all(m == pytest.approx(e) or m == 0 for m, e in zip(moved, expected, strict=True))


def assert_outside_of_walls(walls: np.ndarray, poses: np.ndarray) -> None:
    for x, y, _ in poses:
        for dx in (-WALKER_RADIUS, WALKER_RADIUS):
            for dy in (-WALKER_RADIUS, WALKER_RADIUS):
                assert not walls[math.floor(y + dy), math.floor(x + dx)]


def test_the_walk_to_the_farthest_cell_turns_on_the_spot_first_and_then_sees_the_whole_maze():
    for seed in range(8):
        rng = np.random.default_rng(seed)
        walls = draw_walls(rng)
        walker = explore_to_the_farthest(rng, walls, 700, 8.8, 0.33)
        poses, actions = np.stack(walker.poses), np.array(walker.actions)
        assert len(poses) == len(actions) == 700
        assert (actions[:21] == LEFT).all() and (poses[:21, :2] == poses[0, :2]).all()
        assert set(actions) == {LEFT, RIGHT, FORWARD}
        walk_again(poses, actions, 8.8, 0.33)
        assert_outside_of_walls(walls, poses)
        visited = {(int(y), int(x)) for x, y, _ in poses}
        assert len(visited) >= 0.9 * (~walls).sum()


@pytest.mark.parametrize(("num_frames", "num_context"), [(32, 16), (72, 36)])
def test_what_is_retraced_was_seen_in_the_context(num_frames, num_context):
    actions_seen = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        walls = draw_walls(rng)
        walker = explore_and_retrace(rng, walls, num_frames, num_context, 20, 0.34)
        poses, actions = np.stack(walker.poses), np.array(walker.actions)
        assert len(poses) == len(actions) == num_frames
        explored = {tuple(pose) for pose in poses[:num_context]}
        assert {tuple(pose) for pose in poses[num_context:]} <= explored
        walk_again(poses, actions, 20, 0.34)
        assert_outside_of_walls(walls, poses)
        actions_seen |= set(actions)
    assert actions_seen == {LEFT, RIGHT, FORWARD, BACKWARD}


@pytest.mark.parametrize(("name", "num_context"), [("maze_retrieval", 16), ("maze_retrieval_c36p36", 36)])
def test_half_of_the_retraced_frames_look_like_nothing_recent(name, num_context):
    """The best copy of all earlier frames is 3 dB better than that of the newest 8."""
    old = []
    for clip_id in range(24):
        frames = WORLDS[name].clip("test", clip_id).frames
        for t in range(num_context, len(frames)):
            copies = psnr(frames[:t], frames[t])
            old.append(copies.max() >= copies[-8:].max() + 3)
    assert np.mean(old) >= 0.5


def test_splits_share_neither_mazes_nor_the_unseen_style():
    world = WORLDS["maze_retrieval"]
    splits = ("train", "validation", "test", UNSEEN_STYLE)
    first = [world.clip(split, clip_id).frames[0].tobytes() for split in splits for clip_id in range(10)]
    assert len(set(first)) == len(first)
    styles = np.concatenate([*WALLS[:4], *FLOORS[:4]]), np.concatenate([WALLS[4], FLOORS[4]])
    assert not set(styles[0]) & set(styles[1])
    with pytest.raises(ValueError, match="unknown split 'test_unseen'; did you mean 'test_unseen_style'"):
        world.clip("test_unseen", 0)
    with pytest.raises(ValueError, match="unknown split 'test_unseen_style'"):
        WORLDS["pan"].clip(UNSEEN_STYLE, 0)


def test_successive_frames_differ_as_those_of_the_real_data(samples):
    episode = np.load(samples / "dmlab_episode_5.npz")
    video = episode["video"].transpose(0, 3, 1, 2) / np.float32(255)
    clips = [WORLDS["maze"].clip("train", clip_id) for clip_id in range(24)]

    def facts(frames: np.ndarray, actions: np.ndarray) -> list[float]:
        change = psnr(frames[1:], frames[:-1])
        return [change[actions[1:] == kind].mean() for kind in (LEFT, FORWARD)] + [np.mean(actions[25:] == FORWARD)]

    ours = np.nanmean([facts(clip.frames, clip.actions) for clip in clips], axis=0)
    real = facts(video, episode["actions"])
    assert np.abs(ours[:2] - real[:2]).max() < 1.5, "decibels between successive frames, turning and walking"
    assert abs(ours[2] - real[2]) < 0.15, "share of steps forward"
