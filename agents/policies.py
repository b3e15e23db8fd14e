"""A policy as an agent that acts in the environment, and a trained scorer as a policy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from far_env.agents.config import NetworkConfig
from far_env.agents.network import RetentionNetwork
from far_env.agents.observation import signal_arrays
from far_env.agents.runtime import GraphScorer
from far_env.contract import FrameMeta, RetentionPolicy, RolloutState, TemporalCachePlan, ask_policy, copy_for_clip, make_plan
from far_env.errors import PolicyError
from far_env.frame_meta import frame_meta_list

_INFO_KEYS = ("clip_id", "noise_seed", "step", "total_steps", "max_frames", "capacity_mb", "frame_features")


class PolicyAgent:
    """Runs a policy as a fixed agent in `FrameRetentionEnv` or its vector form; each episode gets a separate copy of it.

    Args:
        policy: anything with ``build_temporal_cache_plan``. It receives what the benchmark provides; signals that it declares
            are not provided.
    """

    def __init__(self, policy: RetentionPolicy) -> None:
        self.policy = policy
        self._copies: dict[int, tuple[tuple, int, RetentionPolicy]] = {}

    def predict(self, obs: dict[str, np.ndarray], info: dict[str, Any]) -> np.ndarray:
        """The policy's plan as a keep mask: int8 (N,), or (num_envs, N) for what a vector environment returned.

        Raises:
            PolicyError: if the policy raises or answers an invalid plan.
        """
        if obs["mask"].ndim == 1:
            return self._act(0, obs["mask"], info)
        return np.stack(
            [self._act(row, mask, {key: info[key][row] for key in _INFO_KEYS}) for row, mask in enumerate(obs["mask"])]
        )

    def _act(self, row: int, mask: np.ndarray, info: dict[str, Any]) -> np.ndarray:
        num_frames, slots = int(mask.sum()), len(mask)
        features = torch.from_numpy(np.asarray(info["frame_features"]))[slots - num_frames :]
        step, max_frames, capacity = int(info["step"]), int(info["max_frames"]), float(info["capacity_mb"])
        policy = self._copy_for(row, (int(info["clip_id"]), int(info["noise_seed"])), step)
        metas = frame_meta_list(features, step, capacity / max_frames)
        state = RolloutState(step, capacity, int(info["total_steps"]))
        budget = {"max_frames": max_frames, "capacity_mb": capacity}
        ids = ask_policy(policy, metas, state, budget, clip=info["clip_id"]).kept
        action = np.zeros(slots, dtype=np.int8)
        action[slots - num_frames + np.array(ids)] = 1
        return action

    def _copy_for(self, row: int, clip: tuple, step: int) -> RetentionPolicy:
        """The row's copy of the policy, a new one when another episode has begun in the row."""
        entry = self._copies.get(row)
        is_new = entry is None or entry[0] != clip or step <= entry[1]
        policy = copy_for_clip(self.policy, clip[1]) if is_new else entry[2]
        self._copies[row] = (clip, step, policy)
        return policy


class AgentPolicy:
    """A trained scorer as a policy; it acts as its exported file does."""

    def __init__(self, network: RetentionNetwork, name: str = "learned") -> None:
        self.scorer = numpy_scorer(network)
        self.name = name
        self.signals = network.config.signals

    def build_temporal_cache_plan(
        self, chunk_meta_list: list[FrameMeta], rollout_state: RolloutState, budget_state: dict[str, float]
    ) -> TemporalCachePlan:
        """Keep the newest frame and, up to the budget, those that are left after dropping the lowest score one by one."""
        features = [(m.boundary_score, m.feature_drift, m.temporal_similarity, m.motion_strength) for m in chunk_meta_list]
        available = getattr(rollout_state, "signals", {})
        missing = [name for name in self.signals if name not in available]
        if missing:
            raise PolicyError(f"this agent needs {', '.join(missing)}, which this rollout does not provide")
        signals = signal_arrays(available, self.signals)
        situation = rollout_state.step, rollout_state.total_steps, int(budget_state["max_frames"])
        kept = self.scorer.choose(np.array(features), *situation, signals)
        return make_plan(kept, len(chunk_meta_list), retention_family="anchor")


def numpy_scorer(network: RetentionNetwork) -> GraphScorer:
    """The network in NumPy."""
    weights = {name: value.detach().cpu().numpy() for name, value in network.state_dict().items()}
    return GraphScorer(weights, **scorer_options(network.config))


def scorer_options(config: NetworkConfig) -> dict[str, int | bool]:
    """The arguments of `GraphScorer` beside the weights."""
    names = ("num_heads", "num_layers", "edges", "edge_updates", "dropped_frames", "scaled")
    return {name: getattr(config, name) for name in names}
