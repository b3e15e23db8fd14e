"""Controls: rules that look at nothing, against which every other rule must show itself."""

from __future__ import annotations

import numpy as np

from far_env.contract import FrameMeta, RolloutState, TemporalCachePlan, make_plan


class RandomSubset:
    """Keeps the newest frame and a random choice of the others, filling the budget.

    Tier: none. Parameter ``seed``. Told of a new clip by `begin_clip`, it draws from (seed, clip's noise seed), so that the
    choice on a clip does not depend on the clips before it.
    """

    name = "random"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self._rng = np.random.default_rng(seed)

    def begin_clip(self, noise_seed: int) -> None:
        """Restart the generator for a clip."""
        self._rng = np.random.default_rng((self.seed, noise_seed))

    def build_temporal_cache_plan(
        self, chunk_meta_list: list[FrameMeta], rollout_state: RolloutState, budget_state: dict[str, float]
    ) -> TemporalCachePlan:
        """Keep the newest and budget − 1 others drawn uniformly."""
        num_frames = len(chunk_meta_list)
        older = min(num_frames - 1, int(budget_state["max_frames"]) - 1)
        chosen = self._rng.choice(num_frames - 1, size=older, replace=False) if older > 0 else []
        return make_plan([*(int(i) for i in chosen), num_frames - 1], num_frames)
