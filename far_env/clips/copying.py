"""How well frames can be predicted by copying earlier ones: whether a clip rewards memory at all, without any video model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

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
