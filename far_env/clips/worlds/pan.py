"""World pan: a camera moves back and forth over a panorama."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from far_env.clips.worlds.base import (
    CELLS,
    GRID,
    SCENERY_ROWS,
    SIZE,
    GridWorld,
    check_count,
    check_flag,
    check_pixels,
    check_range,
    draw_scenery,
    hues,
    schedule_strips,
)

MAX_MOVES = 4
"""Moves out that fit into five context frames, so that they show everything."""
EIGHT_DIRECTIONS = ((-1, -1), (-1, 0), (-1, 1), (0, -1), (0, 1), (1, -1), (1, 0), (1, 1))
"""Across and down."""


@dataclass(frozen=True, kw_only=True)
class Pan(GridWorld):
    """A camera moves 16 or 32 px per frame over a 192 px panorama: 2–4 moves out, dwell 0–6, back, dwell 0–3, again.

    Everything it shows has appeared by frame 4, so a host with full history lacks nothing.
    Actions: 0 … 4 for −32, −16, 0, 16, 32 px; with other moves, all that there are in ascending order, by their horizontal and
    then by their vertical part.
    """

    name = "pan"
    tag = 1

    step_pixels: tuple[int, ...] = (16, 32)
    """Lengths of a move, multiples of 4."""
    moves: tuple[int, int] = (2, 4)
    """Fewest and most moves out; at most 4, so that the five context frames show everything."""
    out_dwell: tuple[int, int] = (0, 6)
    """Fewest and most frames that the camera rests at the far end."""
    back_dwell: tuple[int, int] = (0, 3)
    """The same where it started."""
    diagonal: bool = False
    """Every move out goes in one of eight directions, in place of all in one of two. The scenery is then higher than a frame,
    and the ruler's lower row encodes the height."""
    panorama_width: int = 192
    """In pixels, at least 64 and the longest way out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pixels(self, "step_pixels", SIZE)
        check_range(self, "moves", 1, MAX_MOVES)
        for name in ("out_dwell", "back_dwell"):
            check_range(self, name, 0, self.num_frames)
        check_flag(self, "diagonal")
        check_count(self, "panorama_width", SIZE + self._reach * GRID, 4096)

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        moves = self._draw_moves(rng)
        number = {move: action for action, move in enumerate(self._possible_moves())}
        actions = np.array([number[0, 0], *(number[across, down] for across, down in moves.tolist())])
        columns, rows = self._draw_path(rng, moves).T
        scenery = np.concatenate([draw_scenery(rng, self.panorama_width) for _ in range(self._storeys)])
        visible_rows, visible_columns = rows[:, None] + np.arange(SCENERY_ROWS), columns[:, None] + np.arange(CELLS)
        grid = np.empty((self.num_frames, CELLS, CELLS, 3), dtype=np.float32)
        grid[:, :12] = scenery[visible_rows[:, :, None], visible_columns[:, None]]
        grid[:, 12:14] = hues(self.panorama_width // GRID)[visible_columns][:, None]
        if self.diagonal:
            grid[:, 13] = hues(len(scenery))[rows][:, None]
        grid[:, 14:] = schedule_strips(np.append(actions[1:], 0), self.num_frames, hues(len(number)))
        return grid, actions

    def _draw_moves(self, rng: np.random.Generator) -> np.ndarray:
        """Moves in cells, across and down, to the frames after the first: int64 (T − 1, 2)."""
        num_moves = rng.integers(self.moves[0], self.moves[1] + 1)
        lengths = np.array(self.step_pixels)[rng.integers(len(self.step_pixels), size=num_moves)] // GRID
        if self.diagonal:
            out = lengths[:, None] * np.array(EIGHT_DIRECTIONS)[rng.integers(len(EIGHT_DIRECTIONS), size=num_moves)]
        else:
            out = lengths[:, None] * np.array([rng.choice((-1, 1)), 0])
        rest, moves = np.zeros((1, 2), dtype=np.int64), np.zeros((0, 2), dtype=np.int64)
        while len(moves) < self.num_frames - 1:
            dwells = [rng.integers(low, high + 1) for low, high in (self.out_dwell, self.back_dwell)]
            moves = np.concatenate([moves, out, rest.repeat(dwells[0], axis=0), -out[::-1], rest.repeat(dwells[1], axis=0)])
        return moves[: self.num_frames - 1]

    def _draw_path(self, rng: np.random.Generator, moves: np.ndarray) -> np.ndarray:
        """Column and row of the frames' upper left corner in the panorama: int64 (T, 2)."""
        path = np.concatenate([[[0, 0]], np.cumsum(moves, axis=0)])
        path -= path.min(axis=0)
        columns_left, rows_left = self.panorama_width // GRID - CELLS, SCENERY_ROWS * (self._storeys - 1)
        unit = math.gcd(*self.step_pixels) // GRID
        path[:, 0] += unit * rng.integers((columns_left - path[:, 0].max()) // unit + 1)
        path[:, 1] += rng.integers(rows_left - path[:, 1].max() + 1)
        return path

    @property
    def _reach(self) -> int:
        """Cells of the longest way out."""
        return self.moves[1] * max(self.step_pixels) // GRID

    @property
    def _storeys(self) -> int:
        """Sceneries above each other."""
        return 1 + math.ceil(self._reach / SCENERY_ROWS) if self.diagonal else 1

    def _possible_moves(self) -> list[tuple[int, int]]:
        """Moves in cells, ascending; the place of one is its action."""
        directions = EIGHT_DIRECTIONS if self.diagonal else ((-1, 0), (1, 0))
        lengths = [pixels // GRID for pixels in self.step_pixels]
        return sorted({(0, 0), *((length * across, length * down) for length in lengths for across, down in directions)})


@dataclass(frozen=True, kw_only=True)
class PanWide(Pan):
    """`Pan` with all its ranges open, for policies that should not know one generator by heart.

    Moves of 4 to 32 px in eight directions, 1–4 of them out, over a 256 px panorama, with up to two blocks that cross the
    scenery, brightness that drifts by up to 20 % and noise of up to 0.03. Context and predicted frames are as many as in `Pan`.
    """

    name = "pan_wide"

    step_pixels: tuple[int, ...] = (4, 8, 12, 16, 24, 32)
    moves: tuple[int, int] = (1, 4)
    out_dwell: tuple[int, int] = (0, 8)
    back_dwell: tuple[int, int] = (0, 8)
    diagonal: bool = True
    panorama_width: int = 256
    objects: int = 2
    brightness_drift: float = 0.2
    noise: float = 0.03
