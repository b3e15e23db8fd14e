"""Recency policies: the newest frames are kept."""

from __future__ import annotations

from collections.abc import Sequence

from far_env.baselines.filling import FillingPolicy, History, count
from far_env.contract import NewestFrames


class RecentFill(NewestFrames):
    """Keeps the newest frames up to the budget: the recent window that the benchmark's description refers to.

    Source: the benchmark's task text. Tier: M. No parameters.
    """

    family = "recency"
    source = "task text of ar-video-kv-temporal-policy"


class FarWindow(FillingPolicy):
    """FAR's short-term context: the newest frames of a window that includes the frame being denoised.

    Faithful: the window (16). Adapted: FAR keeps older frames at a lower resolution; here a frame counts as one whatever its
    size, so older frames are dropped. With a budget larger than the window the rest is not used.

    Source: FAR, arXiv 2503.19325 and its code. Tier: M. Parameter ``short_window``.
    """

    name = "far_window"
    family = "recency"
    source = "FAR, arXiv 2503.19325"
    equivalent_to = {"recent_fill": 15}

    def __init__(self, short_window: int = 16) -> None:
        super().__init__()
        self.short_window = count(self.name, "short_window", short_window, 2)

    def _choose(self, history: History) -> tuple[Sequence[int], Sequence[int]]:
        return [], range(len(history))[-min(history.max_frames, self.short_window - 1) :]
