"""Heavy hitters: keeps the frames that received most attention, and the newest frames."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from far_env.baselines.filling import History, count, require, share
from far_env.baselines.partition import PartitionPolicy, Parts, over_last


class H2O(PartitionPolicy):
    """H2O: keeps the frames with the largest sum of softmax attention received so far, and the newest frames.

    Faithful: sums without decay; the sum of a dropped frame is forgotten. Adapted: frames instead of tokens, and one choice for
    all layers and heads; sums begin at the first call of the policy for a clip, and a new frame starts at zero, whatever
    attention it paid to itself. The recent share of half the budget replaces the equal shares of recent and heavy tokens in
    the original. ``norm="last"`` with ``f_recent=0`` is TOVA (arXiv 2401.06104).

    Source: H2O, arXiv 2306.14048 and its code. Tier: A (attn_mass). Parameters ``f_recent``, a share of the budget, rounded
    down, at least one frame; ``norm``, "sum", "exposure" (divided by the number of steps in the sum, which removes the bias
    towards old frames) or "last" (the attention of this step alone).
    """

    name = "h2o"
    source = "H2O, arXiv 2306.14048"
    tags = {"anchor_preservation_rule": "none", "long_term_budget_fraction": 0.0}
    needs = {"A": ("attn_mass",)}
    GRID = {"f_recent": (0.0, 0.25, 0.5, 0.75), "norm": ("sum", "exposure", "last")}

    def __init__(self, f_recent: float = 0.5, norm: Literal["sum", "exposure", "last"] = "sum") -> None:
        super().__init__(0, share(self.name, "f_recent", f_recent), self._received)
        require(norm in ("sum", "exposure", "last"), self.name, "norm", norm, "'sum', 'exposure' or 'last'")
        self.norm = norm

    def _slots(self, max_frames: int) -> tuple[int, int, int]:
        num_recent = max(1, int(self.recent * max_frames))
        return 0, max_frames - num_recent, num_recent

    def _received(self, history: History, parts: Parts) -> Sequence[float]:
        mass = history.signals["attn_mass"].astype(np.float64)
        mass[-1] = 0.0
        earlier = history.notes.get("received", {})
        received = {}
        for row, birth in enumerate(history.births):
            total, steps = earlier.get(birth, (0.0, 0))
            received[birth] = (total + mass[row], steps + (row < len(history) - 1))
        history.notes["received"] = received
        if self.norm == "last":
            return mass[parts.middle]
        totals = [received[history.births[row]] for row in parts.middle]
        return [total / (steps if self.norm == "exposure" else 1) for total, steps in totals]

    def _tags(self, max_frames: int) -> dict[str, Any]:
        return super()._tags(max_frames) | {"queue_depth": self._slots(max_frames)[2]}


class SnapKV(PartitionPolicy):
    """SnapKV: keeps the last frames, and those that received most attention from them, smoothed over neighbours.

    Faithful: the attention of a window of last queries on everything before it, summed and average-pooled, without sinks.
    Adapted: frames instead of tokens, and a window of frames, each with the queries of its denoising, as far as the policy
    was called for it; one choice for all heads; the choice is made again at every call instead of once.

    Source: SnapKV, arXiv 2404.14469 and its code. Tier: A (attn_mass). Parameters ``window``, at most budget − 1; ``pool``, the
    width of the average over kept neighbours, cut off at the ends.
    """

    name = "snapkv"
    source = "SnapKV, arXiv 2404.14469"
    tags = {"anchor_preservation_rule": "none", "long_term_budget_fraction": 0.0}
    needs = {"A": ("attn_mass",)}
    GRID = {"window": (1, 2, 4), "pool": (1, 3, 5)}

    def __init__(self, window: int = 2, pool: int = 3) -> None:
        super().__init__(0, count(self.name, "window", window, 1), self._smoothed)
        require(count(self.name, "pool", pool, 1) % 2 == 1, self.name, "pool", pool, "an odd number")
        self.pool = pool

    def _slots(self, max_frames: int) -> tuple[int, int, int]:
        num_recent = min(self.recent, max(1, max_frames - 1))
        return 0, max_frames - num_recent, num_recent

    def _smoothed(self, history: History, parts: Parts) -> Sequence[float]:
        mass = over_last(history, "attn_mass", len(parts.recent))[parts.middle]
        half = self.pool // 2
        return [float(mass[max(0, i - half) : i + half + 1].mean()) for i in range(len(mass))]

    def _tags(self, max_frames: int) -> dict[str, Any]:
        return super()._tags(max_frames) | {"queue_depth": self._slots(max_frames)[2]}
