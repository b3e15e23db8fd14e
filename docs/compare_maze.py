"""Draw the world maze beside a recorded DMLab episode, and print how alike they are.

    python docs/compare_maze.py EPISODE.npz

The episode holds ``video`` uint8 (300, 64, 64, 3) and ``actions`` (300,), as in DMLab's data of TECO (arXiv 2210.02396). The
picture goes to docs/images/maze_and_dmlab.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from far_env.clips.worlds import WORLDS

PICTURE = Path(__file__).parent / "images" / "maze_and_dmlab.png"
STARTS = (36, 144, 250)
"""Frames after which a prediction begins."""
NUM_PREDICTED = 36
NUM_RECENT = 8
NUM_CLIPS = 64
BINS = 8


def psnr(pictures: np.ndarray, target: np.ndarray) -> np.ndarray:
    """PSNR (N,) in dB of pictures (N, 3, H, W) against one."""
    return -10 * np.log10(np.maximum(np.square(pictures - target).mean(axis=(1, 2, 3)), 1e-8))


def facts(frames: np.ndarray) -> dict[str, float]:
    """Decibels between successive frames, and of the best frame to copy, from the newest or from all given ones."""
    values = {"successive frames": float(np.mean([psnr(frames[t - 1 : t], frames[t])[0] for t in range(1, len(frames))]))}
    for start in STARTS:
        copies = [psnr(frames[:start], frames[t]) for t in range(start, start + NUM_PREDICTED)]
        recent = [copy[-NUM_RECENT:].max() for copy in copies]
        values[f"best copy of the last {NUM_RECENT}, from frame {start}"] = float(np.mean(recent))
        values[f"best copy of all, from frame {start}"] = float(np.mean([copy.max() for copy in copies]))
    return values


def histogram(frames: np.ndarray) -> np.ndarray:
    """Shares (BINS³,) of colours."""
    colours = np.minimum((frames * BINS).astype(int), BINS - 1).transpose(1, 0, 2, 3).reshape(3, -1)
    return np.bincount(colours[0] * BINS**2 + colours[1] * BINS + colours[2], minlength=BINS**3) / colours.shape[1]


def sheet(frames: np.ndarray, columns: int) -> np.ndarray:
    """A picture of frames (N, 3, H, W) in rows, with gaps."""
    rows = -(-len(frames) // columns)
    picture = np.full((rows * 66, columns * 66, 3), 255, dtype=np.uint8)
    for number, frame in enumerate(frames):
        top, left = 66 * (number // columns), 66 * (number % columns)
        picture[top : top + 64, left : left + 64] = np.round(255 * frame.transpose(1, 2, 0))
    return picture


def main(path: str) -> None:
    """Write the picture and print the table."""
    with np.load(path) as episode:
        real = episode["video"].transpose(0, 3, 1, 2) / np.float32(255)
    world = WORLDS["maze_long"]
    ours = [world.clip("train", clip_id).frames for clip_id in range(NUM_CLIPS)]
    measured = [facts(frames) for frames in ours]
    print(f"| dB | DMLab, one episode | maze, mean of {NUM_CLIPS} | maze, 5 % to 95 % |\n|---|---|---|---|")
    for key, value in facts(real).items():
        values = [clip[key] for clip in measured]
        low, high = np.percentile(values, (5, 95))
        print(f"| {key} | {value:.1f} | {np.mean(values):.1f} | {low:.1f} to {high:.1f} |")
    histograms = [histogram(frames) for frames in ours]
    among = [np.minimum(a, b).sum() for n, a in enumerate(histograms) for b in histograms[:n]]
    shared = [np.minimum(histogram(real), other).sum() for other in histograms]
    print(f"| shared colours of two episodes | {np.mean(shared):.2f} with a maze | {np.mean(among):.2f} | ", end="")
    print(f"{np.percentile(among, 5):.2f} to {np.percentile(among, 95):.2f} |")
    columns = np.concatenate([np.arange(0, 24, 6), np.arange(30, 246, 18)])
    rows = [sheet(frames[columns], len(columns)) for frames in (real, *ours[:3])]
    picture = Image.fromarray(np.concatenate(rows))
    picture.save(PICTURE, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1])
