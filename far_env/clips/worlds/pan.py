"""World pan: a camera moves back and forth over a panorama."""

from __future__ import annotations

import numpy as np

from far_env.clips.worlds.base import CELLS, GRID, SIZE, World, draw_scenery, hues, schedule_strips


class Pan(World):
    """A camera moves 16 or 32 px per frame over a 192 px panorama: 2–4 moves out, dwell 0–6, back, dwell 0–3, again.

    Everything it shows has appeared by frame 4, so a host with full history lacks nothing.
    Actions: 0 … 4 for −32, −16, 0, 16, 32 px.
    """

    name = "pan"
    tag = 1
    panorama_width = 192
    action_colours = hues(5)
    ruler = hues(panorama_width // GRID)

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        steps = rng.integers(1, 3, size=rng.integers(2, 5)) * rng.choice((-1, 1))
        moves = np.zeros(0, dtype=np.int64)
        while len(moves) < self.num_frames - 1:
            out_dwell, back_dwell = rng.integers(0, 7), rng.integers(0, 4)
            moves = np.concatenate([moves, steps, np.zeros(out_dwell, int), -steps[::-1], np.zeros(back_dwell, int)])
        actions = np.concatenate([[2], moves[: self.num_frames - 1] + 2])
        path = np.concatenate([[0], np.cumsum(moves[: self.num_frames - 1])])
        room = (self.panorama_width - SIZE) // 16 - (path.max() - path.min())
        offsets = 4 * (path - path.min() + rng.integers(0, room + 1))
        panorama = np.concatenate(
            [
                draw_scenery(rng, self.panorama_width),
                np.broadcast_to(self.ruler, (2, *self.ruler.shape)),
            ]
        )
        grid = np.empty((self.num_frames, CELLS, CELLS, 3), dtype=np.float32)
        grid[:, :14] = panorama[:, offsets[:, None] + np.arange(CELLS)].transpose(1, 0, 2, 3)
        grid[:, 14:] = schedule_strips(np.append(actions[1:], 0), self.num_frames, self.action_colours)
        return grid, actions
