"""The four rules that ship with the benchmark ``ar-video-kv-temporal-policy``, exactly, under its names.

They are weak approximations of the methods that they are named after; the faithful forms are separate baselines. All are
stateless: the first matching rule decides about a frame. Tier: M. No parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from far_env.contract import ChunkDecision, FrameMeta, RolloutState, TemporalCachePlan


class _FrameRule(ABC):
    """A rule that decides about one frame at a time and tags its plans."""

    source = "ar-video-kv-temporal-policy"
    tags: dict[str, object] = {}

    def build_temporal_cache_plan(
        self, chunk_meta_list: list[FrameMeta], rollout_state: RolloutState, budget_state: dict[str, float]
    ) -> TemporalCachePlan:
        """Return one decision per frame, by the class's rule."""
        decisions = [ChunkDecision(m.chunk_id, self._action(m), self._priority(m)) for m in chunk_meta_list]
        return TemporalCachePlan(chunk_decisions=decisions, **self.tags)

    @abstractmethod
    def _action(self, meta: FrameMeta) -> str: ...

    @abstractmethod
    def _priority(self, meta: FrameMeta) -> float: ...


def _hit_ratio(meta: FrameMeta) -> float:
    """Always 1 in the benchmark, whose counters never move."""
    return meta.recent_hit_count / max(meta.access_count, 1)


def _flow(meta: FrameMeta) -> float:
    return meta.temporal_similarity * (1 - meta.feature_drift) * (1 - 0.3 * meta.motion_strength)


class RecentWindow(_FrameRule):
    """Keeps recentness ≥ 0.34: the two newest frames, whatever the budget."""

    name = "recent_window"

    def _action(self, meta: FrameMeta) -> str:
        return "keep" if meta.recentness >= 0.34 else "drop"

    def _priority(self, meta: FrameMeta) -> float:
        return 3 * meta.recentness + 0.5 * meta.temporal_similarity


class PackCache(_FrameRule):
    """The benchmark's approximation of PackCache: key frames are demoted, drifted ones dropped, recent similar ones kept."""

    name = "packcache"
    tags = {
        "retention_family": "anchor",
        "anchor_preservation_rule": "keyframe_anchor",
        "boundary_transition_rule": "demote_all",
        "long_term_budget_fraction": 0.25,
    }

    def _action(self, meta: FrameMeta) -> str:
        if meta.keyframe_score >= 0.72 or meta.access_count >= 3:
            return "demote_to_long_term"
        if meta.feature_drift >= 0.45:
            return "drop"
        return "keep" if meta.recentness >= 0.25 and meta.temporal_similarity >= 0.85 else "drop"

    def _priority(self, meta: FrameMeta) -> float:
        return (
            2.1 * meta.temporal_similarity
            + 1.7 * meta.keyframe_score
            + 1.1 * max(0.0, 1 - 0.12 * meta.age)
            + 0.9 * _hit_ratio(meta)
            + 0.4 * (1 - meta.motion_strength)
        )


class CausalCacheVDM(_FrameRule):
    """The benchmark's approximation of Ca2-VDM: residents and key frames are demoted, drifted frames dropped, the rest kept."""

    name = "causalcache_vdm"
    tags = {
        "retention_family": "queue",
        "anchor_preservation_rule": "keyframe_anchor",
        "boundary_transition_rule": "selective",
        "queue_depth": 6,
        "long_term_budget_fraction": 0.35,
    }

    def _action(self, meta: FrameMeta) -> str:
        if meta.long_term_resident or meta.keyframe_score >= 0.75 or meta.access_count >= 3:
            return "demote_to_long_term"
        if meta.feature_drift >= 0.50:
            return "drop"
        return "keep" if meta.recentness >= 0.20 or _hit_ratio(meta) >= 0.70 else "drop"

    def _priority(self, meta: FrameMeta) -> float:
        return (
            1.6 * meta.recentness
            + 1.5 * _hit_ratio(meta)
            + 1.2 * meta.keyframe_score
            + 0.8 * meta.temporal_similarity
            + 0.4 * (1 - meta.motion_strength)
        )


class FlowCache(_FrameRule):
    """The benchmark's approximation of FlowCache: frames older than the last scene boundary are dropped; of the others, smooth
    ones are kept."""

    name = "flowcache"
    tags = {
        "retention_family": "chunkwise",
        "anchor_preservation_rule": "keyframe_anchor",
        "boundary_transition_rule": "selective",
        "long_term_budget_fraction": 0.30,
        "chunkwise_reuse": True,
        "compression_mode": "token_drop",
    }

    def build_temporal_cache_plan(
        self, chunk_meta_list: list[FrameMeta], rollout_state: RolloutState, budget_state: dict[str, float]
    ) -> TemporalCachePlan:
        """Drop what precedes the youngest boundary, then decide frame by frame."""
        plan = super().build_temporal_cache_plan(chunk_meta_list, rollout_state, budget_state)
        boundary_ages = [meta.age for meta in chunk_meta_list if meta.boundary_score >= 0.45]
        if boundary_ages:
            for meta, decision in zip(chunk_meta_list, plan.chunk_decisions, strict=True):
                if meta.age > min(boundary_ages):
                    decision.action = "drop"
        return plan

    def _action(self, meta: FrameMeta) -> str:
        if meta.keyframe_score >= 0.75 or _flow(meta) >= 0.70 or meta.recentness >= 0.35:
            return "keep"
        return "demote_to_long_term" if _flow(meta) >= 0.40 else "drop"

    def _priority(self, meta: FrameMeta) -> float:
        return 2 * _flow(meta) + 1.5 * meta.keyframe_score + 1.2 * meta.recentness + 0.8 * meta.temporal_similarity
