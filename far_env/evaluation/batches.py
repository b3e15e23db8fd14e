"""A batch of episodes, played with a history of frames or with a memory of tokens, as an evaluation records it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.contract import UNLIMITED_FRAMES, RetentionPolicy
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.intervention import IntervenedFrames
from far_env.rollout.memo import FrameMemo
from far_env.rollout.play import Decision, play, replay
from far_env.rollout.streaming import TokenDecision, check_token_budget, play_streaming
from far_env.rollout.token_policy import TokenPolicy
from far_env.workload import Workload


@dataclass(frozen=True)
class TokenMemory:
    """That budgets count entries of a streaming memory (`far_env.rollout.streaming`).

    Attributes:
        max_gap: see `far_env.rollout.token_cache.TokenCache`.
    """

    max_gap: int | None = 1


@dataclass(frozen=True)
class PlayedBatch:
    """Finished rollouts.

    Attributes:
        latents: of all generated frames or chunks, (R, L, C, h, w).
        predicted: pixels (R, n_predict, 3, H, W), float32.
        plans: of each row, see `far_env.evaluation.records.Record`.
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


def play_frames(
    workload: Workload,
    clips: Sequence[Clip],
    noise_seeds: Sequence[int],
    policies: list[RetentionPolicy | None],
    max_frames: int,
    memo: FrameMemo,
    intervened: IntervenedFrames,
    on_frame: Callable[[int], None],
    failures: dict[int, str] | None = None,
) -> PlayedBatch | None:
    """Play the clips together with a history of frames, each under its policy.

    Arguments and errors as of `far_env.rollout.play.play`. Only rows without ``failures`` are in the answer; None if all fail.
    """
    hooks = {"on_frame": on_frame, "before_frame": intervened, "failures": failures}
    rollouts, decisions = play(workload, clips, noise_seeds, policies, max_frames, memo=memo, **hooks)
    finished = [row for row in range(len(clips)) if row not in (failures or {})]
    if not finished:
        return None
    plans = [[_entry(decision) for decision in decisions[row]] for row in finished]
    return _finished(rollouts, finished, plans, [_milliseconds(decisions[row]) for row in finished])


def replay_frames(
    workload: Workload,
    clips: Sequence[Clip],
    noise_seeds: Sequence[int],
    kept: Sequence[Mapping[int, Sequence[int]]],
    memo: FrameMemo,
    intervened: IntervenedFrames,
    on_frame: Callable[[int], None],
) -> PlayedBatch:
    """Play the clips together by decisions of before (`far_env.rollout.play.replay`); the plans of the answer are empty."""
    rollouts = replay(workload, clips, noise_seeds, kept, memo=memo, on_frame=on_frame, before_frame=intervened)
    return _finished(rollouts, range(len(clips)), [[] for _ in clips], [None] * len(clips))


def play_tokens(
    workload: Workload,
    clips: Sequence[Clip],
    noise_seeds: Sequence[int],
    policy: TokenPolicy | None,
    budget: int,
    memory: TokenMemory,
    on_frame: Callable[[int], None] | None = None,
) -> PlayedBatch:
    """Play the clips together with a memory of tokens; a policy None drops nothing.

    Decisions before the first generated frame are left out of the plans. Errors as of
    `far_env.rollout.streaming.StreamingBatch`.
    """
    limit = None if policy is None else budget
    rollouts = play_streaming(workload, clips, noise_seeds, policy, limit, max_gap=memory.max_gap, on_frame=on_frame)
    latents = torch.stack([rollout.latents for rollout in rollouts])
    with torch.no_grad():
        predicted = workload.host.decode(latents).float()
    plans = [[_token_entry(decision) for decision in rollout.decisions if decision.step >= 0] for rollout in rollouts]
    # The policy decides for all rows together; each has an equal share.
    costs = [_milliseconds(rollout.decisions, len(clips)) for rollout in rollouts]
    return PlayedBatch(latents, predicted, plans, costs)


def _finished(
    rollouts: RolloutBatch, rows: Sequence[int], plans: list[list[dict[str, Any]]], costs: list[float | None]
) -> PlayedBatch:
    return PlayedBatch(rollouts.generated(rows), rollouts.decode(rows).float(), plans, costs)


def _entry(decision: Decision) -> dict[str, Any]:
    kept = [number for number in decision.kept if number not in decision.demoted]
    return {"step": decision.step, "kept": kept, "demoted": list(decision.demoted)}


def _token_entry(decision: TokenDecision) -> dict[str, Any]:
    return {
        "step": decision.step,
        "kept": list(decision.full),
        "demoted": list(decision.coarse),
        "tokens": round(decision.tokens, 4),
    }


def _milliseconds(decisions: Sequence[Decision | TokenDecision], num_rows: int = 1) -> float | None:
    """Mean milliseconds of a decision that was made for so many rows together, per row."""
    if not decisions:
        return None
    return round(1e3 * sum(decision.seconds for decision in decisions) / len(decisions) / num_rows, 6)
