"""An episode as a picture: true frames above predicted ones, and below them which frames every decision kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from far_env.contract import RetentionPolicy
from far_env.io import replacing
from far_env.metrics import psnr
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.rollout.play import play
from far_env.workload import Workload

GAP = 4
DECISION_HEIGHT = 6
MAX_WIDTH = 4096
"""Widest picture in pixels: video encoders and screens do not take more. Frames are shrunk to fit."""
BACKGROUND = 24
KEPT = (80, 200, 120)
DROPPED = (70, 70, 70)
CONTEXT = (90, 140, 230)

Decisions = Sequence[tuple[int, Sequence[int]]]
"""Per decision, the step and the true numbers of the frames that stayed."""


def frame_row(frames: np.ndarray, num_columns: int) -> np.ndarray:
    """Frames (T, 3, H, W) in [0, 1] side by side, left-aligned in ``num_columns`` columns, uint8 (H, width, 3)."""
    size = frames.shape[-1]
    row = np.full((frames.shape[-2], num_columns * (size + GAP) - GAP, 3), BACKGROUND, dtype=np.uint8)
    for column, frame in enumerate(frames):
        left = column * (size + GAP)
        row[:, left : left + size] = np.rint(frame.transpose(1, 2, 0) * 255).clip(0, 255).astype(np.uint8)
    return row


def decision_rows(decisions: Decisions, num_context: int, num_columns: int, size: int, num_rows: int) -> np.ndarray:
    """Draw one line of marks per decision: green under frames that stayed, grey under frames that existed and did not.

    Returns:
        uint8 (num_rows · DECISION_HEIGHT, width, 3); lines without a decision are empty.
    """
    lines = np.full((num_rows, DECISION_HEIGHT, num_columns * (size + GAP) - GAP, 3), BACKGROUND, dtype=np.uint8)
    for line, (step, kept) in zip(lines, decisions, strict=False):
        for column in range(num_context + step + 1):
            left = column * (size + GAP)
            line[1 : DECISION_HEIGHT - 1, left : left + size] = KEPT if column in kept else DROPPED
    return lines.reshape(-1, *lines.shape[2:])


def render_episode(
    clip: np.ndarray, predicted: np.ndarray, decisions: Decisions, num_context: int, num_decision_rows: int | None = None
) -> np.ndarray:
    """The picture (height, width, 3) uint8: truth, context and prediction, one line of marks per decision.

    Args:
        clip: true frames (T, 3, H, W), context first.
        predicted: frames generated so far (S, 3, H, W).
        decisions: those made so far.
        num_context: frames that were given; a blue bar marks them.
        num_decision_rows: lines for decisions; as many as there are, unless the size must not depend on them.
    """
    num_columns, size = len(clip), clip.shape[-1]
    spacer = np.full((GAP, num_columns * (size + GAP) - GAP, 3), BACKGROUND, dtype=np.uint8)
    context_line = spacer.copy()
    context_line[:, : num_context * (size + GAP) - GAP] = CONTEXT
    generated = frame_row(np.concatenate([clip[:num_context], predicted]), num_columns)
    num_rows = len(decisions) if num_decision_rows is None else num_decision_rows
    marks = decision_rows(decisions, num_context, num_columns, size, num_rows)
    return np.concatenate([frame_row(clip, num_columns), context_line, generated, spacer, marks])


def render_workload_episode(workload: Workload, clip: np.ndarray, predicted: np.ndarray, decisions: Decisions) -> np.ndarray:
    """`render_episode` in the one size (height, width, 3) that all episodes of a workload have, at most MAX_WIDTH wide.

    Args:
        clip: all true frames of the episode (T, 3, H, W), context first. Of a chunk the last frame is shown.
        predicted: frames generated so far (S, 3, H, W).
        decisions: those made so far.
    """
    clip, predicted = of_each_unit(workload, clip, 0), of_each_unit(workload, predicted, workload.context_units)
    size = min(clip.shape[-1], frame_side(workload.num_units))
    # No decision follows the last frame, and at most one every other.
    num_decision_rows = workload.predict_units - 1
    return render_episode(shrink(clip, size), shrink(predicted, size), decisions, workload.context_units, num_decision_rows)


def of_each_unit(workload: Workload, frames: np.ndarray, first: int) -> np.ndarray:
    """The last frame of each unit, of frames (T, 3, H, W) that whole units show, from unit ``first`` on."""
    ends = np.cumsum([unit.frames for unit in workload.units[first:]])
    return frames[ends[ends <= len(frames)] - 1]


def frame_side(num_columns: int) -> int:
    """The largest even side with which ``num_columns`` frames fit into MAX_WIDTH; encoders need even sizes."""
    return max(2, (MAX_WIDTH // num_columns - GAP) // 2 * 2)


def shrink(frames: np.ndarray, size: int) -> np.ndarray:
    """Frames (T, 3, H, W) averaged down to (T, 3, size, size), float32; unchanged where they have that size."""
    if frames.shape[-1] == size:
        return frames
    if not len(frames):
        return np.zeros((0, 3, size, size), dtype=np.float32)
    return torch.nn.functional.interpolate(torch.from_numpy(frames), size=(size, size), mode="area").numpy()


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
    truth = of_each_unit(workload, clip.frames[: workload.num_frames], 0)
    width = len(truth) * (truth.shape[-1] + GAP) - GAP
    parts = [_caption(f"{workload.name}, {split} clip {clip_id}: truth", width), frame_row(truth, len(truth))]
    for name, policy in policies.items():
        rollouts, decisions = play(workload, [clip], [BENCHMARK_SEED + clip_id], policy, max_frames)
        predicted = rollouts.decode([0])[0].float().cpu()
        score = psnr(predicted, torch.from_numpy(clip.frames[workload.num_context : workload.num_frames])).item()
        kept = [(decision.step, decision.kept) for decision in decisions[0]]
        shown = of_each_unit(workload, predicted.numpy(), workload.context_units)
        picture = render_episode(truth, shown, kept, workload.context_units)
        parts += [_caption(f"{name}, budget {max_frames}: {score:.1f} dB", width), picture[truth.shape[-2] :]]
    with replacing(path) as temporary:
        Image.fromarray(np.concatenate(parts)).save(temporary, format="png")


def _caption(text: str, width: int) -> np.ndarray:
    """A line of text, uint8 (18, width, 3)."""
    image = Image.new("RGB", (width, 18), (BACKGROUND,) * 3)
    ImageDraw.Draw(image).text((2, 3), text, fill=(230, 230, 230))
    return np.asarray(image)
