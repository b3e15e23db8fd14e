"""Two-way adapters: any policy as an agent that acts in the environment, any trained scorer as a policy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from far_env.agents.memory import HistoryMemory
from far_env.agents.network import RetentionNetwork
from far_env.agents.observation_spec import columns
from far_env.agents.subset_distribution import BudgetedSubset
from torch import Tensor

from far_env.contract import FrameMeta, RetentionPolicy, RolloutState, TemporalCachePlan, ask_policy, copy_for_clip, make_plan
from far_env.envs.episodes import ROW_FEATURES
from far_env.errors import PolicyError
from far_env.frame_meta import frame_meta_list

_USED = ("clip_id", "noise_seed", "step", "total_steps", "max_frames", "capacity_mb", "frame_features")


class PolicyAgent:
    """Runs a policy as a fixed agent in `FrameRetentionEnv` or its vector form; each episode gets its own copy of it.

    Args:
        policy: anything with ``build_temporal_cache_plan``. The environment shows it what the benchmark would; signals that
            it declares are not handed over.
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
        return np.stack([self._act(row, mask, {key: info[key][row] for key in _USED}) for row, mask in enumerate(obs["mask"])])

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
        """The row's copy of the policy, made anew when another episode has begun there."""
        known = self._copies.get(row)
        is_new = known is None or known[0] != clip or step <= known[1]
        policy = copy_for_clip(self.policy, clip[1]) if is_new else known[2]
        self._copies[row] = (clip, step, policy)
        return policy


class AgentPolicy:
    """A trained scorer as a policy: the most probable set of frames."""

    def __init__(self, network: RetentionNetwork, name: str = "learned") -> None:
        self.network = network.eval()
        self.name = name
        self.signals = network.view.signals
        self.memory = network.view.new_memory()

    @torch.no_grad()
    def build_temporal_cache_plan(
        self, chunk_meta_list: list[FrameMeta], rollout_state: RolloutState, budget_state: dict[str, float]
    ) -> TemporalCachePlan:
        """Keep the newest frame and the up to budget − 1 others with the largest positive logits."""
        num_frames, max_frames = len(chunk_meta_list), int(budget_state["max_frames"])
        looks = [
            (m.boundary_score, m.feature_drift, m.temporal_similarity, m.motion_strength / (1 + m.motion_strength))
            for m in chunk_meta_list
        ]
        rows = observed_rows(looks, rollout_state.step, self.memory)
        told = None
        if self.signals:
            shown = getattr(rollout_state, "signals", {})
            missing = [name for name in self.signals if name not in shown]
            if missing:
                raise PolicyError(f"this agent needs {', '.join(missing)}, which this rollout does not hand over")
            told = torch.from_numpy(columns(shown, self.signals))
        progress = rollout_state.step / rollout_state.total_steps
        kept = choose(self.network, rows, self.memory, max_frames, progress, told)
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

    An independent scorer keeps the newest of those with positive ones. One that works one by one first drops the frame with
    the lowest logit, again and again, until one too many is left.

    Args:
        rows: of `observed_rows`.
        memory: that recalled their columns.
        progress: the step's share of the rollout.
        signals: columns (N, C) of `far_env.agents.observation_spec.columns`.
    """
    left = list(range(len(rows)))
    while True:
        shown = torch.tensor([remaining_rows(rows, left, memory)])
        if signals is not None:
            shown = torch.cat([shown, signals[None]], dim=-1)
        count = len(left)
        every = torch.ones(1, count)
        logits = network(shown, every, torch.tensor([(max_frames / count, progress, 1.0)]))
        if not network.sequential_eviction or count <= max_frames + 1:
            break
        left.pop(int(logits[0, :-1].argmin()))
    mode = BudgetedSubset.of_histories(network.ranked(logits), every, torch.tensor([max_frames])).mode()[0]
    return [left[place] for place in mode.nonzero().flatten().tolist()]


def remaining_rows(
    rows: Sequence[Sequence[float]], left: Sequence[int], memory: HistoryMemory | None
) -> list[tuple[float, ...]]:
    """`observed_rows` of the frames that are left as if all others were gone: places and gaps as then, all else as before."""
    last = len(left) - 1
    told = [(place / len(left), 1 / (1 + place)) for place in range(last, -1, -1)]
    if memory is None:
        return [(*place, *rows[i][2:]) for place, i in zip(told, left, strict=True)]
    column = len(ROW_FEATURES) + 2
    gaps = zip(told, left, memory.gaps(left), strict=True)
    return [(*place, *rows[i][2:column], gap, *rows[i][column + 1 :]) for place, i, gap in gaps]


def observed_rows(looks: Sequence[Sequence[float]], step: int, memory: HistoryMemory | None) -> list[tuple[float, ...]]:
    """What the environment would show of a history without padding, and what is remembered: a row of 6 or more per frame.

    Args:
        looks: per frame boundary_score, feature_drift, temporal_similarity and squashed motion, see `ROW_FEATURES`.
        memory: of this history; it recalls, and must then be told what is kept.
    """
    num_frames = len(looks)
    recalled = [()] * num_frames if memory is None else memory.recall(looks, step)
    ages = range(num_frames - 1, -1, -1)
    return [(age / num_frames, 1 / (1 + age), *look, *own) for age, look, own in zip(ages, looks, recalled, strict=True)]
