"""Queue policies: first in, first out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from far_env.baselines.filling import FillingPolicy, History, count


class Ca2VDM(FillingPolicy):
    """Ca2-VDM's cache: a queue of clean frames, from which the oldest is dropped when a new one is added.

    Faithful: the queue and its depth of 25 frames; the original has no score, long-term pool or boundary rule. Adapted: one
    frame is generated at a time, so one is dropped at a time (8 in the original). Up to a budget of ``p_max`` this is
    recent_fill; with a larger budget the queue does not use the rest.

    Source: Ca2-VDM, arXiv 2411.16375 and its code. Tier: M. Parameter ``p_max``.
    """

    name = "ca2vdm_paper"
    family = "queue"
    source = "Ca2-VDM, arXiv 2411.16375"
    equivalent_to = {"recent_fill": 25}

    def __init__(self, p_max: int = 25) -> None:
        super().__init__()
        self.p_max = count(self.name, "p_max", p_max, 1)

    def _choose(self, history: History) -> tuple[Sequence[int], Sequence[int]]:
        return [], range(len(history))[-min(history.max_frames, self.p_max) :]

    def _tags(self, max_frames: int) -> dict[str, Any]:
        return {"queue_depth": min(max_frames, self.p_max)}
