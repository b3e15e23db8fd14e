"""A policy that keeps every second frame, counted back from the newest."""

from __future__ import annotations

from far_env.contract import FrameMeta, RolloutState, TemporalCachePlan, make_plan


class EverySecond:
    """Keeps the newest frame, the third newest, and so on, then the newest others."""

    name = "every_second"

    def build_temporal_cache_plan(
        self,
        chunk_meta_list: list[FrameMeta],
        rollout_state: RolloutState,
        budget_state: dict[str, float],
    ) -> TemporalCachePlan:
        """Keep min(n, budget) of the n frames."""
        num_frames = len(chunk_meta_list)
        newest_first = range(num_frames - 1, -1, -1)
        ranked = [*newest_first[::2], *newest_first[1::2]]
        kept = ranked[: int(budget_state["max_frames"])]
        return make_plan(kept, num_frames, retention_family="anchor")
