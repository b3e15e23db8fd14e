"""World orbit: a camera turns around a circular panorama."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from far_env.clips.worlds.base import (
    CELLS,
    GRID,
    RING,
    SIZE,
    GridWorld,
    check_count,
    check_pixels,
    check_range,
    draw_scenery,
    hues,
    schedule_strips,
)

NUM_CONTEXT = 36
"""Frames that show everything."""
MAX_WALKS = 2_000
"""Walks that are drawn until one shows everything in the context."""


@dataclass(frozen=True, kw_only=True)
class Orbit(GridWorld):
    """A camera turns 32 px per frame around a circular 384 px panorama, and turns back from time to time.

    Sixteen moves, alternately 4–9 one way and 2–4 back, repeat to the end; everything that frames 36 … 71 show has appeared
    by frame 35. Actions: 0 for −32, 1 for 32 px.
    """

    name = "orbit"
    tag = 3
    num_frames = 72

    turn_pixels: tuple[int, ...] = (32,)
    """Lengths of a move, multiples of 4; one per clip."""
    long_runs: tuple[int, int] = (4, 9)
    """Fewest and most moves one way."""
    short_runs: tuple[int, int] = (2, 4)
    """Fewest and most moves back."""
    panorama_width: int = 384
    """In pixels, a multiple of 4 of at least 64."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_pixels(self, "turn_pixels", SIZE)
        check_range(self, "long_runs", 1, RING)
        check_range(self, "short_runs", 1, RING)
        check_count(self, "panorama_width", SIZE, 4096)
        if self.panorama_width % GRID:
            raise ValueError(f"world {self.name}: panorama_width must be a multiple of 4, got {self.panorama_width}")

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        turn = self.turn_pixels[rng.integers(len(self.turn_pixels))]
        num_columns = self.panorama_width // GRID
        for _ in range(MAX_WALKS):
            ring = self._draw_ring(rng)
            actions = np.append(1, np.resize(ring, self.num_frames - 1))
            offsets = turn // GRID * (np.cumsum(2 * actions - 1) - 1)
            columns = (offsets[:, None] + np.arange(CELLS)) % num_columns
            if np.isin(columns[NUM_CONTEXT:], columns[:NUM_CONTEXT]).all():
                break
        else:
            raise ValueError(
                f"world {self.name}: in none of {MAX_WALKS} walks by {turn} px did the first {NUM_CONTEXT} frames show "
                "everything; use a narrower panorama, or long_runs and short_runs that are more alike"
            )
        columns = (columns + turn // GRID * rng.integers(self.panorama_width // turn)) % num_columns
        grid = np.empty((self.num_frames, CELLS, CELLS, 3), dtype=np.float32)
        grid[:, :12] = draw_scenery(rng, self.panorama_width)[:, columns].transpose(1, 0, 2, 3)
        grid[:, 12:14] = hues(num_columns)[columns][:, None]
        grid[:, 14:] = schedule_strips(ring, self.num_frames, hues(2))
        return grid, actions

    def _draw_ring(self, rng: np.random.Generator) -> np.ndarray:
        """Sixteen actions: long runs one way and short ones back, in a random direction, from a random point of the cycle."""
        runs: list[int] = []
        forward = int(rng.integers(2))
        while len(runs) < RING:
            for action, (shortest, longest) in ((forward, self.long_runs), (1 - forward, self.short_runs)):
                runs += [action] * int(rng.integers(shortest, longest + 1))
        return np.roll(runs[:RING], rng.integers(RING))


@dataclass(frozen=True, kw_only=True)
class OrbitWide(Orbit):
    """`Orbit` with all its ranges open, for policies that should not know one generator by heart.

    Turns of 8 to 48 px, 2–10 one way and 1–8 back, around a 512 px panorama, with up to two blocks that cross the scenery,
    brightness that drifts by up to 20 % and noise of up to 0.03. Context and predicted frames are as many as in `Orbit`.
    """

    name = "orbit_wide"

    turn_pixels: tuple[int, ...] = (8, 12, 16, 24, 32, 40, 48)
    long_runs: tuple[int, int] = (2, 10)
    short_runs: tuple[int, int] = (1, 8)
    panorama_width: int = 512
    objects: int = 2
    brightness_drift: float = 0.2
    noise: float = 0.03
