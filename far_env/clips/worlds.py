"""Procedural worlds: (split, clip_id) in, a 64×64 RGB clip out, in which memory decides what can be predicted.

Every frame lives on a grid of 4-pixel cells: rows 0–47 scenery, rows 48–55 a ruler whose hue tells the absolute position
(or the shot), rows 56–63 a schedule strip, a ring of 16 action colours that rolls one cell per frame, cell 0 being the
action that leads to the next frame. So motion can be read off any single kept frame, and what a dropped frame takes with
it is content.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from colorsys import hsv_to_rgb

import numpy as np

from far_env.clips.clip import SPLITS, Clip, check_clip_id

SIZE = 64
GRID = 4
CELLS = SIZE // GRID
SCENERY_ROWS = 12
RING = 16
SPLIT_SIZES = {"train": 1_000_000, "validation": 4096, "test": 4096}


def _hues(num_colours: int, saturation: float = 0.9, value: float = 0.95) -> np.ndarray:
    """(num_colours, 3) float32 RGB, hues spread over three quarters of the wheel so that the ends differ."""
    hues = 0.75 * np.arange(num_colours) / max(num_colours - 1, 1)
    return np.array([hsv_to_rgb(hue, saturation, value) for hue in hues], dtype=np.float32)


def _scenery(rng: np.random.Generator, width: int) -> np.ndarray:
    """A random panorama (12, width/4, 3): vertical bands 16–40 px wide under width/14 rectangles and ellipses."""
    columns = width // GRID
    band_widths = rng.integers(4, 11, size=columns // 4 + 1)
    bands = np.repeat(np.arange(len(band_widths)), band_widths)[:columns]
    picture = np.broadcast_to(rng.random((len(band_widths), 3), dtype=np.float32)[bands], (SCENERY_ROWS, columns, 3)).copy()
    num_shapes = width // 14
    centres = rng.random((num_shapes, 2)) * (SCENERY_ROWS, columns)
    radii = rng.uniform(5, 14, size=(num_shapes, 2)) / GRID
    round_shapes = rng.random(num_shapes) < 0.5
    colours = rng.random((num_shapes, 3), dtype=np.float32)
    rows = np.arange(SCENERY_ROWS)[None, :, None] + 0.5
    cells = np.arange(columns)[None, None, :] + 0.5
    down = np.abs(rows - centres[:, 0, None, None]) / radii[:, 0, None, None]
    across = np.abs(cells - centres[:, 1, None, None]) / radii[:, 1, None, None]
    covered = np.where(round_shapes[:, None, None], down**2 + across**2, np.maximum(down, across)) <= 1.0
    for mask, colour in zip(covered, colours, strict=True):
        picture[mask] = colour
    return picture


def _schedule_strips(ring: np.ndarray, num_frames: int, colours: np.ndarray) -> np.ndarray:
    """(num_frames, 2, 16, 3): the strip of frame t holds the ring (16,) rolled so that cell 0 is the action that leads to
    frame t+1."""
    rolled = ring[(np.arange(num_frames)[:, None] + np.arange(RING)) % RING]
    return np.repeat(colours[rolled].reshape(num_frames, 2, RING // 2, 3), 2, axis=2)


def _to_clip(clip_id: int, grid: np.ndarray, actions: np.ndarray) -> Clip:
    """Grid frames (T, 16, 16, 3) to a clip of (T, 3, 64, 64)."""
    frames = np.repeat(np.repeat(grid.transpose(0, 3, 1, 2), GRID, axis=2), GRID, axis=3)
    return Clip(clip_id=clip_id, frames=np.ascontiguousarray(frames), actions=actions)


class World(ABC):
    """A seeded source of clips. Scenery seeds come from (world, split, clip_id), so splits never share one."""

    name: str
    tag: int
    size: int = SIZE
    num_frames: int = RING

    def num_clips(self, split: str) -> int:
        """Clips in a split."""
        return SPLIT_SIZES[split]

    def clip(self, split: str, clip_id: int) -> Clip:
        """Draw one clip. Raises ValueError on an unknown split and ClipIdError on an id out of range."""
        check_clip_id(self, split, clip_id)
        rng = np.random.default_rng((self.tag, SPLITS.index(split), clip_id))
        grid, actions = self._draw(rng)
        return _to_clip(clip_id, grid, actions)

    @abstractmethod
    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Grid frames (T, 16, 16, 3) float32 and actions (T,) int64; ``actions[i]`` led to frame i, the first to nothing."""


class Pan(World):
    """A camera moves 16 or 32 px per frame over a 192 px panorama: 2–4 moves out, dwell 0–6, back, dwell 0–3, again.

    Everything it will ever show has been seen by frame 4, so a host with full history loses nothing.
    Actions: 0 … 4 for −32, −16, 0, 16, 32 px.
    """

    name = "pan"
    tag = 1
    panorama_width = 192
    action_colours = _hues(5)
    ruler = _hues(panorama_width // GRID)

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
                _scenery(rng, self.panorama_width),
                np.broadcast_to(self.ruler, (2, *self.ruler.shape)),
            ]
        )
        grid = np.empty((self.num_frames, CELLS, CELLS, 3), dtype=np.float32)
        grid[:, :14] = panorama[:, offsets[:, None] + np.arange(CELLS)].transpose(1, 0, 2, 3)
        grid[:, 14:] = _schedule_strips(np.append(actions[1:], 0), self.num_frames, self.action_colours)
        return grid, actions


class Cuts(World):
    """Two to four shots, all seen in the first five frames, then cuts between them every 2–8 frames (3–6 with four shots).

    A shot is a still background with a 12 px block that moves 8 px per shown frame (its dark side trails) and resumes where
    its shot stopped. Actions: the shot of the frame.
    """

    name = "cuts"
    tag = 2
    max_shots = 4
    num_context = 5
    shot_colours = _hues(max_shots)

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        num_shots = int(rng.integers(2, self.max_shots + 1))
        shots = self._draw_shots(rng, num_shots)
        backgrounds = np.stack([_scenery(rng, SIZE) for _ in range(num_shots)])
        colours = self.shot_colours[rng.permutation(self.max_shots)[:num_shots]]
        grid = np.empty((self.num_frames, CELLS, CELLS, 3), dtype=np.float32)
        grid[:, :12] = backgrounds[shots]
        grid[:, 12:14] = colours[shots][:, None, None]
        self._draw_blocks(rng, grid, shots)
        grid[:, 14:] = _schedule_strips(np.append(shots[1:], 0), self.num_frames, colours)
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
            shown = np.flatnonzero(shots == shot)
            row, start, direction = rng.integers(0, SCENERY_ROWS - 2), rng.integers(0, CELLS), rng.choice((-1, 1))
            left = start + 2 * direction * np.arange(len(shown))
            for cell in range(3):
                trailing = cell == (0 if direction > 0 else 2)
                grid[shown, row : row + 3, (left + cell) % CELLS] = np.float32(0.05 if trailing else 1.0)


class Orbit(World):
    """A camera turns 32 px per frame around a circular 384 px panorama, and now and then turns back for a while.

    Sixteen moves, 4–9 one way and 2–4 back in turn, repeat to the end; everything frames 36 … 71 will show has been seen
    by frame 35. Actions: 0 for −32, 1 for 32 px.
    """

    name = "orbit"
    tag = 3
    num_frames = 72
    num_context = 36
    panorama_width = 384
    stride = 32
    action_colours = _hues(2)
    ruler = _hues(panorama_width // GRID)

    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        num_places = self.panorama_width // self.stride
        places = np.zeros(self.num_frames, dtype=np.int64)
        while True:
            ring = self._draw_ring(rng)
            moves = 2 * np.resize(ring, self.num_frames - 1) - 1
            places[1:] = np.cumsum(moves)
            # A frame shows its place and the next one.
            seen, shown = (
                {int(place) % num_places for start in part for place in (start, start + 1)}
                for part in (places[: self.num_context], places[self.num_context :])
            )
            if shown <= seen:
                break
        offsets = self.stride // GRID * (places + rng.integers(num_places))
        panorama = np.concatenate(
            [
                _scenery(rng, self.panorama_width),
                np.broadcast_to(self.ruler, (2, *self.ruler.shape)),
            ]
        )
        columns = (offsets[:, None] + np.arange(CELLS)) % panorama.shape[1]
        grid = np.empty((self.num_frames, CELLS, CELLS, 3), dtype=np.float32)
        grid[:, :14] = panorama[:, columns].transpose(1, 0, 2, 3)
        grid[:, 14:] = _schedule_strips(ring, self.num_frames, self.action_colours)
        return grid, np.append(1, np.resize(ring, self.num_frames - 1))

    @staticmethod
    def _draw_ring(rng: np.random.Generator) -> np.ndarray:
        """Sixteen actions: long runs one way and short ones back, either way around, begun anywhere."""
        runs: list[int] = []
        forward = int(rng.integers(2))
        while len(runs) < RING:
            runs += [forward] * int(rng.integers(4, 10)) + [1 - forward] * int(rng.integers(2, 5))
        return np.roll(runs[:RING], rng.integers(RING))


WORLDS: dict[str, World] = {world.name: world for world in (Pan(), Cuts(), Orbit())}
