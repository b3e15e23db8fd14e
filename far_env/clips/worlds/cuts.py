"""World cuts: a video cuts back and forth between a few shots."""

from __future__ import annotations

import numpy as np

from far_env.clips.worlds.base import CELLS, SCENERY_ROWS, SIZE, World, draw_scenery, hues, schedule_strips


class Cuts(World):
    """Two to four shots, all present in the first five frames, then cuts between them every 2–8 frames (3–6 with four shots).

    A shot is a still background with a 12 px block that moves 8 px per frame of its shot (its dark side trails) and
    resumes where its shot stopped. Actions: the shot of the frame.
    """

    name = "cuts"
    tag = 2
    max_shots = 4
    num_context = 5
    shot_colours = hues(max_shots)

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        num_shots = int(rng.integers(2, self.max_shots + 1))
        shots = self._draw_shots(rng, num_shots)
        backgrounds = np.stack([draw_scenery(rng, SIZE) for _ in range(num_shots)])
        colours = self.shot_colours[rng.permutation(self.max_shots)[:num_shots]]
        grid = np.empty((self.num_frames, CELLS, CELLS, 3), dtype=np.float32)
        grid[:, :12] = backgrounds[shots]
        grid[:, 12:14] = colours[shots][:, None, None]
        self._draw_blocks(rng, grid, shots)
        grid[:, 14:] = schedule_strips(np.append(shots[1:], 0), self.num_frames, colours)
        return grid, shots

    def _draw_shots(self, rng: np.random.Generator, num_shots: int) -> np.ndarray:
        """Shot of each frame (T,): the first five frames show every shot, later segments cut to another one."""
        cuts = np.sort(rng.choice(np.arange(1, self.num_context), size=num_shots - 1, replace=False))
        shots = np.repeat(rng.permutation(num_shots), np.diff(cuts, prepend=0, append=self.num_context))
        shortest, longest = (3, 6) if num_shots == 4 else (2, 8)
        while len(shots) < self.num_frames:
            following = (shots[-1] + rng.integers(1, num_shots)) % num_shots
            shots = np.append(shots, np.full(rng.integers(shortest, longest + 1), following))
        return shots[: self.num_frames].astype(np.int64)

    @staticmethod
    def _draw_blocks(rng: np.random.Generator, grid: np.ndarray, shots: np.ndarray) -> None:
        """Paint each shot's block into the scenery of its frames, in place."""
        for shot in np.unique(shots):
            frames_of_shot = np.flatnonzero(shots == shot)
            row, start, direction = rng.integers(0, SCENERY_ROWS - 2), rng.integers(0, CELLS), rng.choice((-1, 1))
            left = start + 2 * direction * np.arange(len(frames_of_shot))
            for cell in range(3):
                trailing = cell == (0 if direction > 0 else 2)
                grid[frames_of_shot, row : row + 3, (left + cell) % CELLS] = np.float32(0.05 if trailing else 1.0)
