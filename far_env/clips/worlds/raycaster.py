"""Views of a maze of textured square cells, drawn by casting one ray per column of pixels (all frames of a clip at once).

Lengths are in cells, angles in radians; x points right along the columns of the maze, y down along its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

WALL_HEIGHT = 1.0
EYE_HEIGHT = 0.5
SKY = np.array([150, 224, 255], dtype=np.float32) / 255
TEXTURE_SIZE = 64
_LEVEL_SIZES = tuple(TEXTURE_SIZE >> level for level in range(7))
_LEVEL_STARTS = np.concatenate([[0], np.cumsum(np.square(_LEVEL_SIZES))])
_TEXTURES = Path(__file__).parents[2] / "assets" / "maze_textures" / "textures.png"


@dataclass(frozen=True)
class Plan:
    """Walls and textures.

    Attributes:
        walls: bool (rows, columns); the outermost cells are walls.
        wall_textures: int (rows, columns), of the walls that are seen from a cell.
        floor_textures: int (rows, columns), of the floor of a cell.
    """

    walls: np.ndarray
    wall_textures: np.ndarray
    floor_textures: np.ndarray


def render(plan: Plan, poses: np.ndarray, size: int) -> np.ndarray:
    """Frames (T, size, size, 3) float32 in [0, 1] seen from ``poses`` (T, 3), x, y and heading; the field of view is 90°."""
    forward = np.stack([np.cos(poses[:, 2]), np.sin(poses[:, 2])], axis=1)
    right = np.stack([-forward[:, 1], forward[:, 0]], axis=1)
    offsets = (np.arange(size) + 0.5) / (size / 2) - 1
    rays = forward[:, None] + offsets[:, None] * right[:, None]
    distance, along, texture = _nearest_walls(plan, poses[:, None, :2], rays)

    frames = np.empty((len(poses), size, size, 3), dtype=np.float32)
    frames[:] = SKY
    # A pixel whose centre is s below the horizon, at depth d, looks at the height EYE_HEIGHT − s·d.
    slope = offsets[None, :, None]
    height = EYE_HEIGHT - slope * distance[:, None, :]
    frame, row, column = np.nonzero((height >= 0) & (height < WALL_HEIGHT))
    depth = distance[frame, column]
    # What one pixel covers of the wall, in texels; seen at an angle it covers more across than up.
    slant = np.abs(along[frame, column, 1])
    frames[frame, row, column] = _sample(
        texture[frame, column], along[frame, column, 0], 1 - height[frame, row, column] / WALL_HEIGHT, depth / slant**0.5, size
    )
    frame, row, column = np.nonzero(height < 0)
    depth = EYE_HEIGHT / offsets[row]
    point = poses[frame, :2] + depth[:, None] * rays[frame, column]
    cell = np.floor(point).astype(np.int64)
    texture = plan.floor_textures[cell[:, 1], cell[:, 0]]
    frames[frame, row, column] = _sample(
        texture, point[:, 0] - cell[:, 0], point[:, 1] - cell[:, 1], depth * (depth / EYE_HEIGHT) ** 0.5, size
    )
    return frames


def _nearest_walls(plan: Plan, origins: np.ndarray, rays: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The wall that each ray meets first.

    Returns:
        distance: (T, W), depth along the view direction.
        along: (T, W, 2), place of the hit on the wall, in [0, 1), and the sine of the angle between ray and wall.
        texture: int (T, W).
    """
    rows, columns = plan.walls.shape
    best = np.full(rays.shape[:2], np.inf)
    along = np.zeros((*rays.shape[:2], 2))
    texture = np.zeros(rays.shape[:2], dtype=np.int64)
    length = np.hypot(rays[..., 0], rays[..., 1])
    for axis, num_lines in ((0, columns), (1, rows)):
        direction = np.where(np.abs(rays[..., axis]) < 1e-9, 1e-9, rays[..., axis])
        lines = np.arange(1, num_lines)
        # Every crossing of a grid line into a wall; rays start outside of walls, so the nearest such crossing is the hit.
        reach = (lines - origins[..., axis : axis + 1]) / direction[..., None]
        other = origins[..., 1 - axis : 2 - axis] + reach * rays[..., 1 - axis : 2 - axis]
        beyond = np.where(direction[..., None] > 0, lines, lines - 1)
        across = np.clip(np.floor(other), 0, (rows if axis == 0 else columns) - 1).astype(np.int64)
        index = (across, beyond) if axis == 0 else (beyond, across)
        reach = np.where((reach > 0) & plan.walls[index], reach, np.inf)
        first = reach.argmin(axis=-1)[..., None]
        distance = np.take_along_axis(reach, first, axis=-1)[..., 0]
        nearer = distance < best
        hit = np.take_along_axis(other, first, axis=-1)[..., 0]
        cell = np.take_along_axis(across, first, axis=-1)[..., 0]
        line = np.take_along_axis(beyond, first, axis=-1)[..., 0] - np.sign(direction).astype(np.int64)
        seen_from = (cell, line) if axis == 0 else (line, cell)
        seen_from = tuple(np.clip(part, 0, limit - 1) for part, limit in zip(seen_from, (rows, columns), strict=True))
        best = np.where(nearer, distance, best)
        along[..., 0] = np.where(nearer, hit - np.floor(hit), along[..., 0])
        along[..., 1] = np.where(nearer, np.abs(direction) / length, along[..., 1])
        texture = np.where(nearer, plan.wall_textures[seen_from], texture)
    return best, along, texture


def _sample(texture: np.ndarray, u: np.ndarray, v: np.ndarray, depth: np.ndarray, size: int) -> np.ndarray:
    """Colours (N, 3): bilinear in the level of the texture whose texels are about as large as a pixel at that depth."""
    texels_per_pixel = TEXTURE_SIZE * depth * 2 / size
    level = np.clip(np.rint(np.log2(np.maximum(texels_per_pixel, 1e-6))), 0, len(_LEVEL_SIZES) - 1).astype(np.int64)
    side = np.asarray(_LEVEL_SIZES)[level]
    start = texture * _LEVEL_STARTS[-1] + _LEVEL_STARTS[level]
    x, y = u * side - 0.5, v * side - 0.5
    left, top = np.floor(x), np.floor(y)
    right_share, bottom_share = (x - left).astype(np.float32)[:, None], (y - top).astype(np.float32)[:, None]
    columns = [left.astype(np.int64) % side, (left.astype(np.int64) + 1) % side]
    rows = [start + side * (top.astype(np.int64) % side), start + side * ((top.astype(np.int64) + 1) % side)]
    texels = _texels()
    upper = texels[rows[0] + columns[0]] * (1 - right_share) + texels[rows[0] + columns[1]] * right_share
    lower = texels[rows[1] + columns[0]] * (1 - right_share) + texels[rows[1] + columns[1]] * right_share
    return upper * (1 - bottom_share) + lower * bottom_share


@cache
def _texels() -> np.ndarray:
    """All textures at all levels, (num_textures · 5461, 3) float32 in [0, 1]; a level averages squares of four texels."""
    picture = np.asarray(Image.open(_TEXTURES).convert("RGB"), dtype=np.float32) / 255
    level = picture.reshape(TEXTURE_SIZE, -1, TEXTURE_SIZE, 3).swapaxes(0, 1)
    levels = [level]
    while level.shape[1] > 1:
        level = level.reshape(len(level), level.shape[1] // 2, 2, level.shape[2] // 2, 2, 3).mean(axis=(2, 4))
        levels.append(level)
    return np.concatenate([level.reshape(len(level), -1, 3) for level in levels], axis=1).reshape(-1, 3)
