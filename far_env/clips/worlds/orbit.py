"""World orbit: a camera turns around a circular panorama."""

from __future__ import annotations

import numpy as np

from far_env.clips.worlds.base import CELLS, GRID, RING, World, draw_scenery, hues, schedule_strips


class Orbit(World):
    """A camera turns 32 px per frame around a circular 384 px panorama, and turns back from time to time.

    Sixteen moves, alternately 4–9 one way and 2–4 back, repeat to the end; everything that frames 36 … 71 show has appeared
    by frame 35. Actions: 0 for −32, 1 for 32 px.
    """

    name = "orbit"
    tag = 3
    num_frames = 72
    num_context = 36
    panorama_width = 384
    stride = 32
    action_colours = hues(2)
    ruler = hues(panorama_width // GRID)

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        num_places = self.panorama_width // self.stride
        places = np.zeros(self.num_frames, dtype=np.int64)
        while True:
            ring = self._draw_ring(rng)
            moves = 2 * np.resize(ring, self.num_frames - 1) - 1
            places[1:] = np.cumsum(moves)
            # A frame shows its place and the next one.
            context, predicted = (
                {int(place) % num_places for start in part for place in (start, start + 1)}
                for part in (places[: self.num_context], places[self.num_context :])
            )
            if predicted <= context:
                break
        offsets = self.stride // GRID * (places + rng.integers(num_places))
        panorama = np.concatenate(
            [
                draw_scenery(rng, self.panorama_width),
                np.broadcast_to(self.ruler, (2, *self.ruler.shape)),
            ]
        )
        columns = (offsets[:, None] + np.arange(CELLS)) % panorama.shape[1]
        grid = np.empty((self.num_frames, CELLS, CELLS, 3), dtype=np.float32)
        grid[:, :14] = panorama[:, columns].transpose(1, 0, 2, 3)
        grid[:, 14:] = schedule_strips(ring, self.num_frames, self.action_colours)
        return grid, np.append(1, np.resize(ring, self.num_frames - 1))

    @staticmethod
    def _draw_ring(rng: np.random.Generator) -> np.ndarray:
        """Sixteen actions: long runs one way and short ones back, in a random direction, from a random point of the cycle."""
        runs: list[int] = []
        forward = int(rng.integers(2))
        while len(runs) < RING:
            runs += [forward] * int(rng.integers(4, 10)) + [1 - forward] * int(rng.integers(2, 5))
        return np.roll(runs[:RING], rng.integers(RING))
