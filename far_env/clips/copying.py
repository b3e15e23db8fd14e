"""How well frames can be predicted by copying earlier ones: whether a clip rewards memory at all, without any video model, and
how long ago the evidence for a frame was last in view."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from far_env.clips.clip import Clip, ClipSource

TOLERANCE_DB = 1.0
"""A frame counts as evidence if copying it is at most this much worse than copying the best one."""
LEAST_DB = 20.0
"""A frame whose best copy is worse than this was not in view before."""
_SMALLEST_ERROR = 1e-10
"""So that clips that stand still have 100 dB, not infinitely many."""


def copying_psnr(video: np.ndarray, num_context: int, newest: Sequence[int | None]) -> list[float]:
    """PSNR in dB if every frame from ``num_context`` on is the best copy of a true frame before it.

    Args:
        video: uint8 (T, H, W, 3).
        newest: from how many of the newest frames before it a frame is copied, None for all; one or several.

    Returns:
        One value for each entry of ``newest``; as in `far_env.metrics`, of one mean squared error over all predicted frames.

    Raises:
        ValueError: unless 1 ≤ num_context < T.
    """
    if not 1 <= num_context < len(video):
        raise ValueError(f"num_context must be in 1 to {len(video) - 1}, got {num_context}")
    pixels = video.reshape(len(video), -1).astype(np.float32) / 255
    errors = np.empty((len(video) - num_context, len(newest)))
    for row, frame in enumerate(range(num_context, len(video))):
        distances = np.mean((pixels[:frame] - pixels[frame]) ** 2, axis=1)
        errors[row] = [distances[-(count or frame) :].min() for count in newest]
    return (-10 * np.log10(np.maximum(errors.mean(axis=0), _SMALLEST_ERROR))).tolist()


def evidence_gaps(clips: ClipSource, clip: Clip, num_context: int, num_frames: int) -> list[int | None]:
    """How many frames ago the evidence for each predicted frame was last in view.

    Where the source knows which scene a frame shows (its method ``scenes``), that is the newest earlier frame of this scene.
    Else it is the newest earlier true frame whose copy is at most `TOLERANCE_DB` worse than the best copy, if that has at least
    `LEAST_DB`. Of a source with an attribute ``view_rows`` only so many rows of pixels from the top are compared; those below
    them show something else.

    Returns:
        For frames num_context … num_frames − 1 a number of at least 1, or None for what was not in view before.
    """
    scenes = clips.scenes(clip)[:num_frames] if hasattr(clips, "scenes") else None
    rows = getattr(clips, "view_rows", None)
    pixels = clip.frames[:num_frames, :, :rows].reshape(num_frames, -1)
    gaps: list[int | None] = []
    for frame in range(num_context, num_frames):
        if frame == 0:
            found = np.array([], dtype=np.int64)
        elif scenes is not None:
            found = np.flatnonzero(scenes[:frame] == scenes[frame])
        else:
            errors = np.mean((pixels[:frame] - pixels[frame]) ** 2, axis=1)
            decibels = -10 * np.log10(np.maximum(errors, _SMALLEST_ERROR))
            found = np.flatnonzero(decibels >= max(decibels.max() - TOLERANCE_DB, LEAST_DB))
        gaps.append(int(frame - found[-1]) if len(found) else None)
    return gaps
