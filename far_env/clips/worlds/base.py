"""The common parts of the worlds: the grid, scenery, ruler and schedule strip, and seeding by (world, split, clip id)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from colorsys import hsv_to_rgb
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import numpy as np

from far_env.clips.clip import SPLITS, Clip, check_clip_id

SIZE = 64
GRID = 4
CELLS = SIZE // GRID
SCENERY_ROWS = 12
RING = 16
SPLIT_SIZES = {"train": 1_000_000, "validation": 4096, "test": 4096}


@cache
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


def to_pixels(grid: np.ndarray) -> np.ndarray:
    """Frames (T, 3, 64, 64) from frames on the grid (T, 16, 16, 3)."""
    frames = np.repeat(np.repeat(grid.transpose(0, 3, 1, 2), GRID, axis=2), GRID, axis=3)
    return np.ascontiguousarray(frames)


@dataclass(frozen=True, kw_only=True)
class World(ABC):
    """A seeded source of clips. Seeds are (world, split, clip_id), so that splits never share scenery.

    Options are what every clip draws from.

    Raises:
        ValueError: on a value out of range; the message names the option and the value.
    """

    name: ClassVar[str]
    tag: ClassVar[int]
    size: ClassVar[int] = SIZE
    num_frames: ClassVar[int]
    splits: ClassVar[tuple[str, ...]] = SPLITS

    def num_clips(self, split: str) -> int:
        """Number of clips in a split."""
        return SPLIT_SIZES.get(split, SPLIT_SIZES["test"])

    def clip(self, split: str, clip_id: int) -> Clip:
        """Draw one clip. Raises ValueError on an unknown split and ClipIdError on an id out of range."""
        check_clip_id(self, split, clip_id)
        frames, actions = self._frames(split, (self.tag, self.splits.index(split), clip_id))
        return Clip(clip_id, frames, actions)

    @abstractmethod
    def _frames(self, split: str, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Frames (T, 3, 64, 64) float32 and actions (T,) int64; ``actions[i]`` leads to frame i, the first is unused."""


@dataclass(frozen=True, kw_only=True)
class GridWorld(World):
    """A world drawn on the grid, with a ruler and a schedule strip.

    The options that all of them have do not change what else a clip shows.
    """

    num_frames: ClassVar[int] = RING
    view_rows: ClassVar[int] = (SCENERY_ROWS + 2) * GRID
    """Scenery and ruler; the schedule strip below them does not depend on what is in view."""

    objects: int = 0
    """At most so many blocks cross the scenery, 8 to 16 px a side, each in one colour, direction and speed of up to 8 px per
    frame across and down; they leave at one side and return at the other."""
    brightness_drift: float = 0.0
    """The brightness of the frames swings by up to this share, with a period of 12 to 48 frames."""
    noise: float = 0.0
    """The standard deviation of the pixels' noise is up to this, on a scale of 0 to 1."""

    def __post_init__(self) -> None:
        check_count(self, "objects", 0, 16)
        for name in ("brightness_drift", "noise"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 0.5:
                raise ValueError(f"world {self.name}: {name} must be a number from 0 to 0.5, got {value!r}")

    def _frames(self, split: str, seed: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        grid, actions = self._draw(np.random.default_rng(seed))
        # Each effect has its own generator, so that none changes the rest of the clip.
        if self.objects:
            self._draw_objects(np.random.default_rng((*seed, 1)), grid)
        frames = to_pixels(grid)
        if self.brightness_drift:
            frames *= self._draw_brightness(np.random.default_rng((*seed, 2)))[:, None, None, None]
        if self.noise:
            rng = np.random.default_rng((*seed, 3))
            frames += np.float32(rng.uniform(0, self.noise)) * rng.standard_normal(frames.shape, dtype=np.float32)
        if self.brightness_drift or self.noise:
            np.clip(frames, 0, 1, out=frames)
        return frames, actions

    @abstractmethod
    def _draw(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Grid frames (T, 16, 16, 3) float32 and actions (T,) int64; ``actions[i]`` leads to frame i, the first is unused."""

    def _draw_objects(self, rng: np.random.Generator, grid: np.ndarray) -> None:
        """Paint blocks that cross the scenery into the grid, in place."""
        times = np.arange(len(grid))[:, None]
        for _ in range(rng.integers(self.objects + 1)):
            height, width = rng.integers(2, 5, size=2)
            row, column = rng.integers(SCENERY_ROWS), rng.integers(CELLS)
            down, across = rng.integers(-2, 3, size=2)
            rows = (row + down * times + np.arange(height)) % SCENERY_ROWS
            columns = (column + across * times + np.arange(width)) % CELLS
            grid[times[..., None], rows[:, :, None], columns[:, None, :]] = rng.random(3, dtype=np.float32)

    def _draw_brightness(self, rng: np.random.Generator) -> np.ndarray:
        """Factors of the frames, float32 (T,)."""
        swing, period, phase = rng.uniform(0, self.brightness_drift), rng.uniform(12, 48), rng.uniform(0, 2 * np.pi)
        return (1 + swing * np.sin(2 * np.pi * np.arange(self.num_frames) / period + phase)).astype(np.float32)


def check_count(world: World, name: str, low: int, high: int) -> None:
    """Raise ValueError unless an option is a whole number in this range."""
    value = getattr(world, name)
    if not _is_whole(value) or not low <= value <= high:
        raise ValueError(f"world {world.name}: {name} must be a whole number from {low} to {high}, got {value!r}")


def check_flag(world: World, name: str) -> None:
    """Raise ValueError unless an option is true or false."""
    if not isinstance(getattr(world, name), bool):
        raise ValueError(f"world {world.name}: {name} must be true or false, got {getattr(world, name)!r}")


def check_range(world: World, name: str, low: int, high: int) -> None:
    """Make an option a tuple. Raise ValueError unless it is two whole numbers within these bounds, the smaller first."""
    value = getattr(world, name)
    pair = isinstance(value, tuple | list) and len(value) == 2 and all(map(_is_whole, value))
    if not pair or not low <= value[0] <= value[1] <= high:
        raise ValueError(
            f"world {world.name}: {name} must be two whole numbers from {low} to {high}, the smaller first, got {value!r}"
        )
    object.__setattr__(world, name, tuple(value))


def check_pixels(world: World, name: str, high: int) -> None:
    """Make an option a tuple. Raise ValueError unless it is a list of distinct multiples of 4 from 4 to ``high``."""
    value = getattr(world, name)
    several = isinstance(value, tuple | list) and len(value) > 0 and all(map(_is_whole, value))
    if not several or len(set(value)) < len(value) or any(length % GRID or not GRID <= length <= high for length in value):
        raise ValueError(
            f"world {world.name}: {name} must be a list of different multiples of 4 from 4 to {high}, got {value!r}"
        )
    object.__setattr__(world, name, tuple(value))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
