"""Redundancy policies: the frame that is most similar to another kept frame is dropped. Strong on the embedded worlds, where a
camera at rest fills a window of recent frames with copies."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from far_env.baselines.filling import FillingPolicy, History, comparable
from far_env.contract import FrameMeta, RolloutState, TemporalCachePlan, make_plan


def _evict_smallest(changes: list[float], max_frames: int) -> list[int]:
    """Ids that are kept when the ones with the smallest change are dropped one by one, of equal ones the older; the newest is
    always kept."""
    evictable = sorted(range(len(changes) - 1), key=lambda i: (changes[i], i))
    evicted = set(evictable[: max(0, len(changes) - max_frames)])
    return [i for i in range(len(changes)) if i not in evicted]


class LeastChangePrevious:
    """Drops the frame that changed least from the kept frame before it (by motion_strength, which is not clipped).

    The oldest frame has no predecessor and counts as infinitely changed. Source: this project. Tier: M. No parameters.
    """

    name = "least_change_prev"
    family = "redundancy"
    source = "this project"

    def build_temporal_cache_plan(
        self, chunk_meta_list: list[FrameMeta], rollout_state: RolloutState, budget_state: dict[str, float]
    ) -> TemporalCachePlan:
        """Keep the budget's worth of frames with the largest motion_strength."""
        changes = [float("inf"), *(meta.motion_strength for meta in chunk_meta_list[1:])]
        return make_plan(_evict_smallest(changes, int(budget_state["max_frames"])), len(changes))


class LeastChangeNext:
    """Drops the frame from which the kept frame after it changed least, because the later frame shows nearly the same.

    Source: this project. Tier: M. No parameters.
    """

    name = "least_change_next"
    family = "redundancy"
    source = "this project"

    def build_temporal_cache_plan(
        self, chunk_meta_list: list[FrameMeta], rollout_state: RolloutState, budget_state: dict[str, float]
    ) -> TemporalCachePlan:
        """Keep the budget's worth of frames whose successors have the largest motion_strength."""
        changes = [*(meta.motion_strength for meta in chunk_meta_list[1:]), float("inf")]
        return make_plan(_evict_smallest(changes, int(budget_state["max_frames"])), len(changes))


class SequentialEviction(FillingPolicy):
    """Drops one row after another: the least novel of those that are left, of equal ones the older. The newest is kept."""

    family = "redundancy"
    source = "this project"
    tags = {"retention_family": "anchor"}

    def __init__(self) -> None:
        super().__init__()

    def _choose(self, history: History) -> tuple[Sequence[int], Sequence[int]]:
        remaining = list(range(len(history)))
        while len(remaining) > history.max_frames:
            scores = comparable([self._novelty(history, row, [i for i in remaining if i != row]) for row in remaining[:-1]])
            remaining.remove(min(zip(scores, remaining[:-1], strict=True))[1])
        return [], remaining

    @abstractmethod
    def _novelty(self, history: History, row: int, others: list[int]) -> float:
        """Return how much a row differs from these others."""


class NearestNeighbour(SequentialEviction):
    """Drops the frame whose latent is most similar to that of another kept frame.

    Source: this project. Tier: L (lat_cos). No parameters.
    """

    name = "nearest_neighbour"
    needs = {"L": ("lat_cos",)}

    def _novelty(self, history: History, row: int, others: list[int]) -> float:
        return -float(history.signals["lat_cos"][row, others].max())


class LeastNovel(SequentialEviction):
    """Drops the frame whose latent columns match best with columns of other kept frames, at whatever position.

    With a camera that moves sideways, the same content is at another position of another frame.

    Source: this project. Tier: L (column_gap). No parameters.
    """

    name = "least_novel"
    needs = {"L": ("column_gap",)}

    def _novelty(self, history: History, row: int, others: list[int]) -> float:
        return float(np.mean(history.signals["column_gap"][row, others].min(axis=0)))
