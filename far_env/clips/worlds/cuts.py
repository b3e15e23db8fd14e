"""World cuts: a video cuts back and forth between a few shots."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from far_env.clips.clip import Clip
from far_env.clips.worlds.base import (
    CELLS,
    GRID,
    SCENERY_ROWS,
    SIZE,
    GridWorld,
    check_flag,
    check_pixels,
    check_range,
    draw_scenery,
    hues,
    schedule_strips,
)

NUM_CONTEXT = 5
"""Frames that show every shot."""


@dataclass(frozen=True, kw_only=True)
class Cuts(GridWorld):
    """Two to four shots, all present in the first five frames, then cuts between them every 2–8 frames (3–6 with four shots).

    A shot is a still background with a 12 px block that moves 8 px per frame of its shot (its dark side trails) and
    resumes where its shot stopped. Actions: the shot of the frame.
    """

    name = "cuts"
    tag = 2

    num_shots: tuple[int, int] = (2, 4)
    """Fewest and most shots, within 2 to 5."""
    shot_frames: tuple[int, int] | None = None
    """Fewest and most frames between cuts, after the first five; None for 2 and 8, or 3 and 6 where there are four shots."""
    block_pixels: tuple[int, ...] = (8,)
    """Lengths by which a block moves per frame, multiples of 4; one per shot."""
    diagonal: bool = False
    """A block may also move up or down by this length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "num_shots", 2, NUM_CONTEXT)
        if self.shot_frames is not None:
            check_range(self, "shot_frames", 1, self.num_frames)
        check_pixels(self, "block_pixels", SIZE)
        check_flag(self, "diagonal")

    def scenes(self, clip: Clip) -> np.ndarray:
        """The shot of each frame, int64 (T,)."""
        return clip.actions

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        fewest, most = self.num_shots
        num_shots = int(rng.integers(fewest, most + 1))
        shots = self._draw_shots(rng, num_shots)
        backgrounds = np.stack([draw_scenery(rng, SIZE) for _ in range(num_shots)])
        colours = hues(most)[rng.permutation(most)[:num_shots]]
        grid = np.empty((self.num_frames, CELLS, CELLS, 3), dtype=np.float32)
        grid[:, :12] = backgrounds[shots]
        grid[:, 12:14] = colours[shots][:, None, None]
        self._draw_blocks(rng, grid, shots)
        grid[:, 14:] = schedule_strips(np.append(shots[1:], 0), self.num_frames, colours)
        return grid, shots

    def _draw_shots(self, rng: np.random.Generator, num_shots: int) -> np.ndarray:
        """Shot of each frame (T,): the first five frames show every shot, later segments cut to another one."""
        cuts = np.sort(rng.choice(np.arange(1, NUM_CONTEXT), size=num_shots - 1, replace=False))
        shots = np.repeat(rng.permutation(num_shots), np.diff(cuts, prepend=0, append=NUM_CONTEXT))
        shortest, longest = self.shot_frames or ((3, 6) if num_shots == 4 else (2, 8))
        while len(shots) < self.num_frames:
            following = (shots[-1] + rng.integers(1, num_shots)) % num_shots
            shots = np.append(shots, np.full(rng.integers(shortest, longest + 1), following))
        return shots[: self.num_frames].astype(np.int64)

    def _draw_blocks(self, rng: np.random.Generator, grid: np.ndarray, shots: np.ndarray) -> None:
        """Paint each shot's block into the scenery of its frames, in place."""
        for shot in np.unique(shots):
            frames_of_shot = np.flatnonzero(shots == shot)[:, None]
            top, start, across = rng.integers(0, SCENERY_ROWS - 2), rng.integers(0, CELLS), rng.choice((-1, 1))
            down = rng.integers(-1, 2) if self.diagonal else 0
            way = self.block_pixels[rng.integers(len(self.block_pixels))] // GRID * np.arange(len(frames_of_shot))[:, None]
            rows, left = (top + down * way + np.arange(3)) % SCENERY_ROWS, start + across * way
            for cell in range(3):
                trailing = cell == (0 if across > 0 else 2)
                grid[frames_of_shot, rows, (left + cell) % CELLS] = np.float32(0.05 if trailing else 1.0)


@dataclass(frozen=True, kw_only=True)
class CutsWide(Cuts):
    """`Cuts` with all its ranges open, for policies that should not know one generator by heart.

    Two to five shots of 1–10 frames, blocks that move 4 to 16 px per frame in six directions, up to two more blocks that cross
    the scenery, brightness that drifts by up to 20 % and noise of up to 0.03. Context and predicted frames are as many as in
    `Cuts`.
    """

    name = "cuts_wide"

    num_shots: tuple[int, int] = (2, 5)
    shot_frames: tuple[int, int] | None = (1, 10)
    block_pixels: tuple[int, ...] = (4, 8, 12, 16)
    diagonal: bool = True
    objects: int = 2
    brightness_drift: float = 0.2
    noise: float = 0.03
