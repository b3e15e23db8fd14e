"""Redundancy: the frame that repeats its neighbour goes. Strong on the embedded worlds, where a standing camera fills a recent
window with copies."""

from __future__ import annotations

from far_env.contract import FrameMeta, RolloutState, TemporalCachePlan, make_plan


def _evict_smallest(changes: list[float], max_frames: int) -> list[int]:
    """Ids that stay when those of the smallest change leave one by one, ties evicting the older; the newest always stays."""
    evictable = sorted(range(len(changes) - 1), key=lambda i: (changes[i], i))
    evicted = set(evictable[: max(0, len(changes) - max_frames)])
    return [i for i in range(len(changes)) if i not in evicted]


class LeastChangePrevious:
    """Evicts the frame that changed least from the kept frame before it (by motion_strength, which is not clipped).

    The oldest frame has no predecessor and counts as all change. Tier: FrameMeta. No parameters.
    """

    name = "least_change_prev"

    def build_temporal_cache_plan(
        self, chunk_meta_list: list[FrameMeta], rollout_state: RolloutState, budget_state: dict[str, float]
    ) -> TemporalCachePlan:
        """Keep the budget's worth of frames with the largest motion_strength."""
        changes = [float("inf"), *(meta.motion_strength for meta in chunk_meta_list[1:])]
        return make_plan(_evict_smallest(changes, int(budget_state["max_frames"])), len(changes))


class LeastChangeNext:
    """Evicts the frame from which the kept frame after it changed least: what follows holds nearly the same.

    Tier: FrameMeta. No parameters.
    """

    name = "least_change_next"

    def build_temporal_cache_plan(
        self, chunk_meta_list: list[FrameMeta], rollout_state: RolloutState, budget_state: dict[str, float]
    ) -> TemporalCachePlan:
        """Keep the budget's worth of frames whose successors have the largest motion_strength."""
        changes = [*(meta.motion_strength for meta in chunk_meta_list[1:]), float("inf")]
        return make_plan(_evict_smallest(changes, int(budget_state["max_frames"])), len(changes))
