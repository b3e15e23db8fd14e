"""World maze: first-person walks through textured mazes, after the DMLab data of TECO (arXiv 2210.02396, appendix).

The mazes are drawn as TECO draws them; the textures are those of DeepMind Lab, from the distribution labmaze (Apache-2.0).
Lengths are in cells, angles in degrees.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from far_env.clips.clip import SPLITS as COMMON_SPLITS
from far_env.clips.worlds.base import SIZE, World
from far_env.clips.worlds.raycaster import Plan, render

LEFT, RIGHT, FORWARD, BACKWARD = range(4)
TURNS = {LEFT: -1, RIGHT: 1}
UNSEEN_STYLE = "test_unseen_style"
SPLITS = (*COMMON_SPLITS, UNSEEN_STYLE)

MAZE_SIZE = 9
OPENING_PROBABILITY = 0.15
WALKER_RADIUS = 0.2
"""The walker's centre keeps this distance from walls."""

# Of the textures in assets/maze_textures, in their order: per style of DeepMind Lab, first floors, then walls.
_NUM_FLOORS = (6, 5, 7, 6, 4)
_NUM_WALLS = (8, 7, 7, 6, 4)
_STARTS = np.concatenate([[0], np.cumsum(np.add(_NUM_FLOORS, _NUM_WALLS))])
FLOORS = [np.arange(start, start + floors) for start, floors in zip(_STARTS, _NUM_FLOORS, strict=False)]
WALLS = [
    np.arange(start + floors, start + floors + walls)
    for start, floors, walls in zip(_STARTS, _NUM_FLOORS, _NUM_WALLS, strict=False)
]


def draw_walls(rng: np.random.Generator, size: int = MAZE_SIZE, opening_probability: float = OPENING_PROBABILITY) -> np.ndarray:
    """Walls (size, size) bool of a random maze: a depth-first spanning tree of the rooms at odd coordinates, after which each
    remaining wall between two rooms is opened with ``opening_probability``."""
    walls = np.ones((size, size), dtype=bool)
    start = tuple(2 * rng.integers(size // 2, size=2) + 1)
    walls[start] = False
    stack = [start]
    steps = np.array([(0, 2), (2, 0), (0, -2), (-2, 0)])
    while stack:
        room = stack[-1]
        neighbours = [tuple(room + step) for step in steps if np.all((room + step > 0) & (room + step < size))]
        closed = [neighbour for neighbour in neighbours if walls[neighbour]]
        if not closed:
            stack.pop()
            continue
        chosen = closed[rng.integers(len(closed))]
        walls[chosen] = walls[(room[0] + chosen[0]) // 2, (room[1] + chosen[1]) // 2] = False
        stack.append(chosen)
    row, column = np.indices(walls.shape)
    between = (row % 2 != column % 2) & (row > 0) & (column > 0) & (row < size - 1) & (column < size - 1)
    return walls & ~(between & (rng.random(walls.shape) < opening_probability))


def draw_plan(rng: np.random.Generator, styles: tuple[int, ...], opening_probability: float = OPENING_PROBABILITY) -> Plan:
    """A maze whose four quadrants differ in wall and floor, each of any of the given styles of DeepMind Lab (0 … 4)."""
    walls = draw_walls(rng, opening_probability=opening_probability)
    row, column = np.indices(walls.shape)
    quadrant = 2 * (row > MAZE_SIZE // 2) + (column > MAZE_SIZE // 2)
    chosen = [rng.permutation(np.concatenate([kind[style] for style in styles]))[:4] for kind in (WALLS, FLOORS)]
    return Plan(walls, chosen[0][quadrant], chosen[1][quadrant])


class Walker:
    """Moves through a maze in fixed turns and steps and records poses and actions; ``actions[i]`` leads to ``poses[i]``."""

    def __init__(self, walls: np.ndarray, position: np.ndarray, heading: float, turn: float, step: float) -> None:
        self.walls, self.turn, self.step = walls, turn, step
        self.poses = [np.array([*position, heading])]
        self.actions = [LEFT]
        """The first action leads nowhere; it has the value that TECO's walks begin with."""

    @property
    def position(self) -> np.ndarray:
        """x and y."""
        return self.poses[-1][:2]

    @property
    def heading(self) -> float:
        """Degrees, 0 along x, 90 along y."""
        return self.poses[-1][2]

    def do(self, action: int) -> bool:
        """Carry out an action; a step that would end in a wall slides along it. Returns whether nothing was in the way."""
        x, y, heading = self.poses[-1]
        free = True
        if action in TURNS:
            heading += TURNS[action] * self.turn
        else:
            length = self.step if action == FORWARD else -self.step
            moved = x + length * np.cos(np.deg2rad(heading)), y + length * np.sin(np.deg2rad(heading))
            across, along = self._is_free(moved[0], y), self._is_free(moved[0] if self._is_free(moved[0], y) else x, moved[1])
            free = across and along
            x, y = moved[0] if across else x, moved[1] if along else y
        self.poses.append(np.array([x, y, heading]))
        self.actions.append(action)
        return free

    def _is_free(self, x: float, y: float) -> bool:
        corners = [(y + dy, x + dx) for dy in (-WALKER_RADIUS, WALKER_RADIUS) for dx in (-WALKER_RADIUS, WALKER_RADIUS)]
        return not any(self.walls[int(row), int(column)] for row, column in corners)

    def undo(self) -> None:
        """Forget the last action."""
        self.poses.pop()
        self.actions.pop()


def explore_to_the_farthest(rng: np.random.Generator, walls: np.ndarray, num_frames: int, turn: float, step: float) -> Walker:
    """TECO's walk: turn left on the spot for 20 frames, then walk to the farthest cell that was not visited, again and again.

    On its way from cell to cell the walker turns until it faces the next one within 10°, then goes forward until it is within
    0.4 cells of its centre.
    """
    cells = np.argwhere(~walls)
    cell = tuple(cells[rng.integers(len(cells))])
    walker = Walker(walls, np.array([cell[1] + 0.5, cell[0] + 0.5]), rng.uniform(0, 360), turn, step)
    for _ in range(20):
        walker.do(LEFT)
    visited = {cell}
    while len(walker.poses) < num_frames:
        way = _way_to_the_farthest(walls, cell, visited)
        for cell in way:
            target = np.array([cell[1] + 0.5, cell[0] + 0.5])
            while np.linalg.norm(target - walker.position) > 0.4 and len(walker.poses) < num_frames:
                direction = np.rad2deg(np.arctan2(*(target - walker.position)[::-1]))
                off = (direction - walker.heading + 180) % 360 - 180
                walker.do(FORWARD if abs(off) <= max(10, turn / 2) else RIGHT if off > 0 else LEFT)
            visited.add(cell)
    return walker


def _way_to_the_farthest(walls: np.ndarray, start: tuple[int, int], visited: set[tuple[int, int]]) -> list[tuple[int, int]]:
    """Shortest way, without its start, to the farthest unvisited cell; when there is none, all but the start are forgotten."""
    before: dict[tuple[int, int], tuple[int, int]] = {start: start}
    queue = deque([start])
    order = []
    while queue:
        cell = queue.popleft()
        order.append(cell)
        for row, column in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            neighbour = cell[0] + row, cell[1] + column
            if neighbour not in before and not walls[neighbour]:
                before[neighbour] = cell
                queue.append(neighbour)
    unvisited = [cell for cell in order if cell not in visited]
    if not unvisited:
        visited.intersection_update({start})
        unvisited = order[1:]
    way = [unvisited[-1]]
    while before[way[-1]] != start:
        way.append(before[way[-1]])
    return way[::-1]


def explore_and_retrace(
    rng: np.random.Generator, walls: np.ndarray, num_frames: int, num_context: int, turn: float, step: float
) -> Walker:
    """Explore within the context, then go back and forth on the same way, so that every predicted view was seen before.

    The exploration alternates wide scans (turns to one side) with a few steps forward. Its poses are then visited in reverse
    with inverted actions, from one part of the way to another: each excursion covers at least half of it.
    """
    cells = np.argwhere(~walls)
    cell = cells[rng.integers(len(cells))]
    walker = Walker(walls, np.array([cell[1] + 0.5, cell[0] + 0.5]), rng.uniform(0, 360), turn, step)
    num_poses = int(rng.integers(round(0.75 * num_context), num_context))
    while len(walker.poses) < num_poses:
        if walker.actions[-1] not in TURNS or len(walker.actions) == 1:  # else it would turn back to what it has just seen
            side = int(rng.choice((LEFT, RIGHT)))
        for _ in range(int(rng.integers(2, 8))):
            walker.do(side)
        for _ in range(int(rng.integers(1, 5))):
            if not walker.do(FORWARD):
                walker.undo()
                break
    poses, actions = walker.poses[:num_poses], walker.actions[:num_poses]
    inverse = {LEFT: RIGHT, RIGHT: LEFT, FORWARD: BACKWARD}
    walker.poses, walker.actions = list(poses), list(actions)
    here, back, half = num_poses - 1, True, num_poses // 2
    while len(walker.poses) < num_frames:
        target = int(rng.integers(0, here - half + 1) if back else rng.integers(here + half, num_poses))
        while here != target and len(walker.poses) < num_frames:
            walker.actions.append(inverse[actions[here]] if back else actions[here + 1])
            here += -1 if back else 1
            walker.poses.append(poses[here])
        back = not back
    return walker


@dataclass(frozen=True, kw_only=True)
class Maze(World):
    """Walks through mazes of 9×9 cells, after the DMLab data of TECO (arXiv 2210.02396): the camera turns left on the spot for
    20 frames, then walks to the farthest cell that it has not visited, again and again.

    The four quadrants of a maze differ in their walls and floors, which mix the textures of four styles of DeepMind Lab; the
    split ``test_unseen_style`` shows a fifth one. Actions: 0 left, 1 right, 2 forward.
    """

    name = "maze"
    tag = 4
    num_frames = 72
    splits = SPLITS

    turn: float = 8.8
    """Degrees of a turn."""
    step: float = 0.33
    """Cells of a step."""
    opening_probability: float = OPENING_PROBABILITY
    """Of a wall between two cells that are connected already."""

    def __post_init__(self) -> None:
        for name, high in (("turn", 90), ("step", 0.5), ("opening_probability", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high:
                raise ValueError(f"world {self.name}: {name} must be a number above 0 and up to {high}, got {value!r}")

    def _frames(self, split: str, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        plan = draw_plan(rng, (4,) if split == UNSEEN_STYLE else (0, 1, 2, 3), self.opening_probability)
        walker = self._walk(rng, plan.walls)
        poses = np.stack(walker.poses)
        poses[:, 2] = np.deg2rad(poses[:, 2])
        frames = render(plan, poses, SIZE).transpose(0, 3, 1, 2)
        return np.ascontiguousarray(frames), np.array(walker.actions, dtype=np.int64)

    def _walk(self, rng: np.random.Generator, walls: np.ndarray) -> Walker:
        return explore_to_the_farthest(rng, walls, self.num_frames, self.turn, self.step)


@dataclass(frozen=True, kw_only=True)
class MazeLong(Maze):
    """The same for 300 frames, of which FAR's long protocol gives 144."""

    name = "maze_long"
    tag = 5
    num_frames = 300


@dataclass(frozen=True, kw_only=True)
class MazeRetrieval(Maze):
    """Walks that explore a maze in the first frames, looking around, and then retrace their way back and forth, so that every
    predicted view was seen before (the retrieval of arXiv 2505.20171).

    Actions: 0 left, 1 right, 2 forward, 3 backward.
    """

    name = "maze_retrieval"
    tag = 6
    num_frames = 32
    num_context: ClassVar[int] = 16

    turn: float = 20.0
    step: float = 0.34

    def _walk(self, rng: np.random.Generator, walls: np.ndarray) -> Walker:
        return explore_and_retrace(rng, walls, self.num_frames, self.num_context, self.turn, self.step)


@dataclass(frozen=True, kw_only=True)
class MazeRetrievalC36P36(MazeRetrieval):
    """The same with 36 frames to explore and 36 to predict."""

    name = "maze_retrieval_c36p36"
    tag = 7
    num_frames = 72
    num_context = 36
