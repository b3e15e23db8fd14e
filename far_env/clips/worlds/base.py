"""The common parts of the worlds: the grid, scenery, ruler and schedule strip, and seeding by (world, split, clip id)."""

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


def hues(num_colours: int, saturation: float = 0.9, value: float = 0.95) -> np.ndarray:
    """(num_colours, 3) float32 RGB, hues spread over three quarters of the wheel so that the ends differ."""
    hues = 0.75 * np.arange(num_colours) / max(num_colours - 1, 1)
    return np.array([hsv_to_rgb(hue, saturation, value) for hue in hues], dtype=np.float32)


def draw_scenery(rng: np.random.Generator, width: int) -> np.ndarray:
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


def schedule_strips(ring: np.ndarray, num_frames: int, colours: np.ndarray) -> np.ndarray:
    """(num_frames, 2, 16, 3): the strip of frame t holds the ring (16,) rolled so that cell 0 is the action that leads to
    frame t+1."""
    rolled = ring[(np.arange(num_frames)[:, None] + np.arange(RING)) % RING]
    return np.repeat(colours[rolled].reshape(num_frames, 2, RING // 2, 3), 2, axis=2)


def to_clip(clip_id: int, grid: np.ndarray, actions: np.ndarray) -> Clip:
    """A clip of frames (T, 3, 64, 64) from frames on the grid (T, 16, 16, 3)."""
    frames = np.repeat(np.repeat(grid.transpose(0, 3, 1, 2), GRID, axis=2), GRID, axis=3)
    return Clip(clip_id=clip_id, frames=np.ascontiguousarray(frames), actions=actions)


class World(ABC):
    """A seeded source of clips. Seeds are (world, split, clip_id), so that splits never share scenery."""

    name: str
    tag: int
    size: int = SIZE
    num_frames: int = RING

    def num_clips(self, split: str) -> int:
        """Number of clips in a split."""
        return SPLIT_SIZES[split]

    def clip(self, split: str, clip_id: int) -> Clip:
        """Draw one clip. Raises ValueError on an unknown split and ClipIdError on an id out of range."""
        check_clip_id(self, split, clip_id)
        rng = np.random.default_rng((self.tag, SPLITS.index(split), clip_id))
        grid, actions = self._draw(rng)
        return to_clip(clip_id, grid, actions)

    @abstractmethod
    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Grid frames (T, 16, 16, 3) float32 and actions (T,) int64; ``actions[i]`` leads to frame i, the first is unused."""
