"""Episodes whose memory is entries of tokens (`far_env.rollout.streaming`), as an evaluation records them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.contract import UNLIMITED_FRAMES
from far_env.rollout.streaming import TokenDecision, TokenPolicy, check_token_budget, play_streaming
from far_env.workloads import Workload


@dataclass(frozen=True)
class TokenMemory:
    """That budgets count entries of a streaming memory.

    Attributes:
        max_gap: see `far_env.rollout.token_cache.TokenCache`.
    """

    max_gap: int | None = 1


@dataclass(frozen=True)
class Episodes:
    """Finished streaming rollouts.

    Attributes:
        latents: (R, n_predict, C, h, w).
        predicted: pixels (R, n_predict, 3, H, W), float32.
        plans: of each row, see `far_env.evaluation.records.Record`; decisions before the first generated frame are left out.
        decision_ms: of each row, mean milliseconds per decision; None without decisions.
    """

    latents: Tensor
    predicted: Tensor
    plans: list[list[dict[str, Any]]]
    decision_ms: list[float | None]


def check_token_budgets(workloads: Sequence[Workload], budgets: Sequence[int]) -> None:
    """Raise ValueError unless every budget is a number of tokens that the workloads' hosts can be played with."""
    for budget in budgets:
        if budget >= UNLIMITED_FRAMES:
            raise ValueError(f"a token budget must be below {UNLIMITED_FRAMES}, got {budget}; full_history drops nothing")
        for workload in workloads:
            check_token_budget(workload.host, budget)


def play_episodes(
    workload: Workload,
    clips: Sequence[Clip],
    noise_seeds: Sequence[int],
    policy: TokenPolicy | None,
    budget: int,
    memory: TokenMemory,
    on_frame: Callable[[int], None] | None = None,
) -> Episodes:
    """Play the clips together; a policy None drops nothing. Errors as `far_env.rollout.streaming.StreamingBatch`."""
    limit = None if policy is None else budget
    rollouts = play_streaming(workload, clips, noise_seeds, policy, limit, max_gap=memory.max_gap, on_frame=on_frame)
    latents = torch.stack([rollout.latents for rollout in rollouts])
    with torch.no_grad():
        predicted = workload.host.autoencoder.decode(latents).float()
    plans = [[_entry(decision) for decision in rollout.decisions if decision.step >= 0] for rollout in rollouts]
    return Episodes(latents, predicted, plans, [_milliseconds(rollout.decisions, len(clips)) for rollout in rollouts])


def _entry(decision: TokenDecision) -> dict[str, Any]:
    return {
        "step": decision.step,
        "kept": list(decision.full),
        "demoted": list(decision.coarse),
        "tokens": round(decision.tokens, 4),
    }


def _milliseconds(decisions: Sequence[TokenDecision], num_rows: int) -> float | None:
    """The policy decides for all rows together; each has an equal share."""
    if not decisions:
        return None
    return round(1e3 * sum(decision.seconds for decision in decisions) / len(decisions) / num_rows, 6)
