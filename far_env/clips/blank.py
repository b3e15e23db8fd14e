"""Clips without frames, for videos that are generated from nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from far_env.clips.clip import Clip, check_clip_id

MAX_CLIPS = 1_000_000


class Blank:
    """Clips without frames, any number of them; clip i has label i of ``labels``, which begin again after the last.

    Args:
        size: side of the host's frames in pixels.
        labels: classes; without, clips have none.
    """

    name = "blank"

    def __init__(self, size: int, labels: Sequence[int] = ()) -> None:
        self.size, self.labels = size, tuple(labels)

    def num_clips(self, split: str) -> int:
        """`MAX_CLIPS`, in every split."""
        return MAX_CLIPS

    def clip(self, split: str, clip_id: int) -> Clip:
        """A clip of no frames. Raises ValueError and ClipIdError as every source does."""
        check_clip_id(self, split, clip_id)
        label = self.labels[clip_id % len(self.labels)] if self.labels else None
        return Clip(clip_id, np.zeros((0, 3, self.size, self.size), dtype=np.float32), label=label)
