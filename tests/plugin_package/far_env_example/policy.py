"""A policy of another distribution."""

from far_env.contract import make_plan


class KeepOldest:
    """Keeps the oldest frames and the newest one."""

    name = "keep_oldest"

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        """Keep frames 0 to budget − 2 and the last."""
        num_frames = len(chunk_meta_list)
        return make_plan([*range(int(budget_state["max_frames"]) - 1), num_frames - 1], num_frames)
