"""Recency: the newest frames stay."""

from __future__ import annotations

from far_env.contract import NewestFrames


class RecentFill(NewestFrames):
    """Keeps the newest frames up to the budget: what the benchmark's card means by a recent window.

    Source: the benchmark's task text. Tier: FrameMeta. No parameters.
    """
