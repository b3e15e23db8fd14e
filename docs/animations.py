"""Draw the pictures of the shipped worlds: truth, newest frames and a learned policy on one clip.

    python docs/animations.py

One GIF per world goes to docs/images/, and the still picture of the README to docs/comparison.png. They are committed because
drawing them takes rollouts of the shipped hosts.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from far_env.envs.rendering import save_comparison
from far_env.metrics import psnr
from far_env.policies import load_policy
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.rollout.play import play
from far_env.workloads import make_workload

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
ANIMATIONS = {
    "pan": (4, "pretrained/general", 3),
    "cuts": (4, "pretrained/general", 3),
    "orbit": (8, "pretrained/general", 3),
    "maze_retrieval": (8, "pretrained/general", 2),
}
"""World → budget, a policy that is shown beside the newest frames, and the pixels of a frame's pixel, fewer where textures make
files large."""
CLIP_ID = 0
"""The first test clip of each world."""
THUMBNAILS_PER_ROW = 4
GAP = 4
MARGIN = 8
CAPTION = 16
COLOURS = 64
MAX_CONTEXT, MAX_PREDICTED = 5, 16
"""Frames in the animations: the last of the context and the first of the prediction, so that files stay small."""
MILLISECONDS = 450
BACKGROUND = (24, 24, 28)
CONTEXT = (110, 160, 245)
TEXT = (230, 230, 230)
MUTED = (150, 150, 155)


def animate(world: str, budget: int, policy: str, scale: int) -> list[Image.Image]:
    """Pictures of one test clip, one per frame: three panels, and below the two predictions the frames in the history."""
    workload = make_workload(world, device="cpu")
    clip = workload.clips.clip("test", CLIP_ID)
    truth = clip.frames[: workload.num_frames]
    panels = [("truth", truth, None)]
    for name in ("recent_fill", policy):
        rollouts, decisions = play(workload, [clip], [BENCHMARK_SEED + CLIP_ID], load_policy(name), budget)
        predicted = rollouts.decode([0])[0].float().cpu()
        score = psnr(predicted, torch.from_numpy(truth[workload.num_context :])).item()
        frames = np.concatenate([truth[: workload.num_context], predicted.numpy()])
        histories = {workload.num_context + decision.step + 1: decision.kept for decision in decisions[0]}
        panels.append((f"{name}: {score:.1f} dB", frames, histories))
    first = max(0, workload.num_context - MAX_CONTEXT)
    last = min(workload.num_frames, workload.num_context + MAX_PREDICTED)
    return [_picture(panels, frame, workload.num_context, budget, scale) for frame in range(first, last)]


def _picture(panels: list, frame: int, num_context: int, budget: int, scale: int) -> Image.Image:
    side = panels[0][1].shape[-1] * scale
    thumbnail = side // THUMBNAILS_PER_ROW - GAP
    rows = -(-budget // THUMBNAILS_PER_ROW)
    size = (len(panels) * (side + MARGIN) + MARGIN, side + 2 * CAPTION + rows * (thumbnail + GAP) + 3 * MARGIN)
    picture = Image.new("RGB", size, BACKGROUND)
    draw = ImageDraw.Draw(picture)
    is_context = frame < num_context
    for column, (caption, frames, histories) in enumerate(panels):
        left = MARGIN + column * (side + MARGIN)
        draw.text((left, 4), caption, fill=TEXT)
        picture.paste(_image(frames[frame], side), (left, CAPTION + MARGIN))
        below = CAPTION + MARGIN + side + 4
        if histories is None:
            draw.text((left, below), f"frame {frame}: " + ("given" if is_context else "to be predicted"), fill=TEXT)
            continue
        if is_context:
            draw.rectangle((left, below + 2, left + side - 1, below + 6), fill=CONTEXT)
            continue
        kept = [step for step in histories if step <= frame]
        draw.text((left, below), "frames in the history:" if kept else "nothing dropped yet", fill=MUTED)
        for place, number in enumerate(histories[max(kept)] if kept else ()):
            row, rank = divmod(place, THUMBNAILS_PER_ROW)
            corner = (left + rank * (thumbnail + GAP), below + CAPTION + row * (thumbnail + GAP))
            picture.paste(_image(frames[number], thumbnail), corner)
    return picture


def _image(frame: np.ndarray, side: int) -> Image.Image:
    """A frame (3, H, W) in [0, 1] as a square picture."""
    pixels = np.rint(frame.transpose(1, 2, 0) * 255).clip(0, 255).astype(np.uint8)
    return Image.fromarray(pixels).resize(
        (side, side), Image.Resampling.BOX if side < len(pixels) else Image.Resampling.NEAREST
    )


def main() -> None:
    """Write every picture."""
    budget, learned, _ = ANIMATIONS["pan"]
    policies = {name: load_policy(name) for name in ("recent_fill", learned)}
    save_comparison(DOCS / "comparison.png", make_workload("pan", device="cpu"), budget, policies, clip_id=CLIP_ID)
    for world, settings in ANIMATIONS.items():
        pictures = animate(world, *settings)
        # One palette for all pictures, without dithering, keeps the files small.
        palette = _stacked(pictures).quantize(COLOURS, method=Image.Quantize.MEDIANCUT)
        quantized = [picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures]
        path = IMAGES / f"{world}.gif"
        quantized[0].save(path, save_all=True, append_images=quantized[1:], duration=MILLISECONDS, loop=0, optimize=True)
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


def _stacked(pictures: list[Image.Image]) -> Image.Image:
    return Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures[:: max(1, len(pictures) // 16)]]))


if __name__ == "__main__":
    main()
