"""A policy as an agent that acts in the environment, and a trained scorer as a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from far_env.agents.memory import HistoryMemory
from far_env.agents.network import RetentionNetwork
from far_env.agents.observation_spec import columns
from far_env.agents.subset_distribution import BudgetedSubset
from far_env.contract import FrameMeta, RetentionPolicy, RolloutState, TemporalCachePlan, ask_policy, copy_for_clip, make_plan
from far_env.envs.episodes import ROW_FEATURES
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
    """A trained scorer as a policy: the most probable set of frames."""

    def __init__(self, network: RetentionNetwork, name: str = "learned") -> None:
        self.network = network.eval()
        self.name = name
        self.signals = network.spec.signals
        self.memory = network.spec.new_memory()

    @torch.no_grad()
    def build_temporal_cache_plan(
        self, chunk_meta_list: list[FrameMeta], rollout_state: RolloutState, budget_state: dict[str, float]
    ) -> TemporalCachePlan:
        """Keep the newest frame and the up to budget − 1 others with the largest positive logits."""
        num_frames, max_frames = len(chunk_meta_list), int(budget_state["max_frames"])
        features = [
            (m.boundary_score, m.feature_drift, m.temporal_similarity, m.motion_strength / (1 + m.motion_strength))
            for m in chunk_meta_list
        ]
        rows = observed_rows(features, rollout_state.step, self.memory)
        signal_columns = None
        if self.signals:
            available = getattr(rollout_state, "signals", {})
            missing = [name for name in self.signals if name not in available]
            if missing:
                raise PolicyError(f"this agent needs {', '.join(missing)}, which this rollout does not provide")
            signal_columns = torch.from_numpy(columns(available, self.signals))
        progress = rollout_state.step / rollout_state.total_steps
        kept = choose(self.network, rows, self.memory, max_frames, progress, signal_columns)
        if self.memory is not None:
            self.memory.keep(kept)
        return make_plan(kept, num_frames, retention_family="anchor")


@torch.no_grad()
def choose(
    network: RetentionNetwork,
    rows: Sequence[Sequence[float]],
    memory: HistoryMemory | None,
    max_frames: int,
    progress: float,
    signals: Tensor | None = None,
) -> list[int]:
    """Ids of the frames that a scorer keeps: the newest and the up to budget − 1 others with the largest positive logits.

    With sequential eviction, the frame with the lowest logit is dropped and the rest scored again, until one too many is left.

    Args:
        rows: of `observed_rows`.
        memory: that recalled their columns.
        progress: the step as a share of the rollout.
        signals: columns (N, C) of `far_env.agents.observation_spec.columns`.
    """
    remaining = list(range(len(rows)))
    while True:
        frames = torch.tensor([remaining_rows(rows, remaining, memory)])
        if signals is not None:
            frames = torch.cat([frames, signals[None]], dim=-1)
        count = len(remaining)
        mask = torch.ones(1, count)
        logits = network(frames, mask, torch.tensor([(max_frames / count, progress, 1.0)]))
        if not network.sequential_eviction or count <= max_frames + 1:
            break
        remaining.pop(int(logits[0, :-1].argmin()))
    mode = BudgetedSubset.of_histories(logits, mask, torch.tensor([max_frames])).mode()[0]
    return [remaining[position] for position in mode.nonzero().flatten().tolist()]


def remaining_rows(
    rows: Sequence[Sequence[float]], remaining: Sequence[int], memory: HistoryMemory | None
) -> list[tuple[float, ...]]:
    """`observed_rows` of the frames ``left``, with ages and gaps as if all others were dropped; other columns are unchanged."""
    ages = [(age / len(remaining), 1 / (1 + age)) for age in range(len(remaining) - 1, -1, -1)]
    if memory is None:
        return [(*age, *rows[i][2:]) for age, i in zip(ages, remaining, strict=True)]
    gap_column = len(ROW_FEATURES) + 2
    changed = zip(ages, remaining, memory.gaps(remaining), strict=True)
    return [(*age, *rows[i][2:gap_column], gap, *rows[i][gap_column + 1 :]) for age, i, gap in changed]


def observed_rows(features: Sequence[Sequence[float]], step: int, memory: HistoryMemory | None) -> list[tuple[float, ...]]:
    """The rows of the environment's observation of a history without padding, with the columns of memory: 6 or more per frame.

    Args:
        features: per frame boundary_score, feature_drift, temporal_similarity and squashed motion, see `ROW_FEATURES`.
        memory: of this history; call its ``keep`` afterwards.
    """
    num_frames = len(features)
    recalled = [()] * num_frames if memory is None else memory.recall(features, step)
    rows = zip(range(num_frames - 1, -1, -1), features, recalled, strict=True)
    return [(age / num_frames, 1 / (1 + age), *present, *remembered) for age, present, remembered in rows]
