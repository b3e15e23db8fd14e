"""The score by which the best scorer of a training is chosen."""

from __future__ import annotations

from collections.abc import Sequence

from far_env.agents.budgets import deciding_budgets
from far_env.agents.checkpoints import LEARNED
from far_env.agents.config import TOKENS, AgentTraining
from far_env.agents.network import RetentionNetwork
from far_env.agents.policies import AgentPolicy
from far_env.agents.token_policy import LearnedTokenPolicy
from far_env.evaluation.batches import TokenMemory
from far_env.evaluation.evaluate import evaluate
from far_env.progress import show_progress
from far_env.workload import Workload


def validation_scores(
    config: AgentTraining, workloads: Sequence[Workload], budgets: Sequence[int], scorer: RetentionNetwork
) -> dict[tuple[str, int], float]:
    """(workload, budget) → the scorer's mean of the reward's metric on validation clips.

    Each clip is played under one of the budgets that leave something to decide, so that several cost no more than one.
    """
    metric, scores = config.reward.metric, {}
    total = len(workloads) * config.validation_clips
    with show_progress(total=total, description="validation", unit="clips") as bar:
        for workload in workloads:
            deciding = deciding_budgets(config.network.memory, workload, budgets)
            for index, budget in enumerate(deciding):
                clips = range(config.validation_clips)[index :: len(deciding)]
                policies = {LEARNED: scorer_policy(scorer)}
                chosen = {"split": "validation", "metrics": (metric,), "memory": memory_of(config)}
                result = evaluate(workload, budget, policies, clips, progress=False, **chosen)
                scores[workload.name, budget] = float(result.scores[LEARNED][metric].mean())
                bar.set_postfix(**{metric: f"{sum(scores.values()) / len(scores):.2f}"})
                bar.update(len(clips))
    return scores


def scorer_policy(scorer: RetentionNetwork) -> AgentPolicy | LearnedTokenPolicy:
    """A trained scorer as a policy of its memory."""
    return LearnedTokenPolicy(scorer) if scorer.config.memory == TOKENS else AgentPolicy(scorer)


def memory_of(config: AgentTraining) -> TokenMemory | None:
    """The memory with which a run's policies are evaluated."""
    return TokenMemory() if config.network.memory == TOKENS else None
