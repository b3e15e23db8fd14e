"""An episode as a picture: true frames above predicted ones, and below them which frames every decision kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from far_env.contract import RetentionPolicy
from far_env.metrics import psnr
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.rollout.play import play
from far_env.workloads import Workload

GAP = 4
MARK = 6
BACKGROUND = 24
KEPT = (80, 200, 120)
DROPPED = (70, 70, 70)
CONTEXT = (90, 140, 230)


def frame_row(frames: np.ndarray, num_columns: int) -> np.ndarray:
    """Frames (T, 3, H, W) in [0, 1] side by side, left-aligned in ``num_columns`` columns, uint8 (H, width, 3)."""
    size = frames.shape[-1]
    row = np.full((frames.shape[-2], num_columns * (size + GAP) - GAP, 3), BACKGROUND, dtype=np.uint8)
    for column, frame in enumerate(frames):
        left = column * (size + GAP)
        row[:, left : left + size] = np.rint(frame.transpose(1, 2, 0) * 255).clip(0, 255).astype(np.uint8)
    return row


def kept_rows(history: Sequence[tuple[int, Sequence[int]]], num_context: int, num_columns: int, size: int) -> np.ndarray:
    """One line of marks per decision: green under frames that stayed, grey under frames that existed and did not."""
    lines = []
    for step, kept in history:
        line = np.full((MARK, num_columns * (size + GAP) - GAP, 3), BACKGROUND, dtype=np.uint8)
        for column in range(num_context + step + 1):
            left = column * (size + GAP)
            line[1 : MARK - 1, left : left + size] = KEPT if column in kept else DROPPED
        lines.append(line)
    return np.concatenate(lines) if lines else np.zeros((0, num_columns * (size + GAP) - GAP, 3), dtype=np.uint8)


def render_episode(
    clip: np.ndarray, predicted: np.ndarray, history: Sequence[tuple[int, Sequence[int]]], num_context: int
) -> np.ndarray:
    """The picture (height, width, 3) uint8: truth, context and prediction, one line of marks per decision.

    Args:
        clip: true frames (T, 3, H, W), context first.
        predicted: frames generated so far (S, 3, H, W).
        history: (step, kept true frame numbers) per decision.
        num_context: frames that were given; a blue bar marks them.
    """
    num_columns, size = len(clip), clip.shape[-1]
    spacer = np.full((GAP, num_columns * (size + GAP) - GAP, 3), BACKGROUND, dtype=np.uint8)
    shown = np.concatenate([clip[:num_context], predicted])
    context_line = spacer.copy()
    context_line[:, : num_context * (size + GAP) - GAP] = CONTEXT
    parts = [frame_row(clip, num_columns), context_line, frame_row(shown, num_columns), spacer]
    return np.concatenate([*parts, kept_rows(history, num_context, num_columns, size)])


def save_comparison(
    path: Path,
    workload: Workload,
    max_frames: int,
    policies: Mapping[str, RetentionPolicy | None],
    *,
    clip_id: int = 0,
    split: str = "test",
) -> None:
    """Write a PNG of one clip: the truth, then per policy its frames, and under each a line per decision of what it kept.

    Green marks a frame that stayed, grey one that did not; the blue bar marks the frames that were given.
    """
    clip = workload.clips.clip(split, clip_id)
    truth = clip.frames[: workload.num_frames]
    width = len(truth) * (truth.shape[-1] + GAP) - GAP
    parts = [_caption(f"{workload.name}, {split} clip {clip_id}: truth", width), frame_row(truth, len(truth))]
    for name, policy in policies.items():
        rollouts, decisions = play(workload, [clip], [BENCHMARK_SEED + clip_id], policy, max_frames)
        predicted = rollouts.decode([0])[0].float().cpu()
        score = psnr(predicted, torch.from_numpy(truth[workload.num_context :])).item()
        history = [(decision.step, decision.kept) for decision in decisions[0]]
        picture = render_episode(truth, predicted.numpy(), history, workload.num_context)
        parts += [_caption(f"{name}, budget {max_frames}: {score:.1f} dB", width), picture[truth.shape[-2] :]]
    temporary = path.with_suffix(".part.png")
    Image.fromarray(np.concatenate(parts)).save(temporary)
    temporary.replace(path)


def _caption(text: str, width: int) -> np.ndarray:
    """A line of text, uint8 (18, width, 3)."""
    image = Image.new("RGB", (width, 18), (BACKGROUND,) * 3)
    ImageDraw.Draw(image).text((2, 3), text, fill=(230, 230, 230))
    return np.asarray(image)
