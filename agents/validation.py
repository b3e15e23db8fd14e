"""The score by which the best scorer of a training is chosen."""

from __future__ import annotations

from collections.abc import Sequence

from far_env.agents.config import AgentTraining
from far_env.agents.network import RetentionNetwork
from far_env.agents.policies import AgentPolicy
from far_env.evaluation.evaluate import evaluate
from far_env.progress import show_progress
from far_env.workloads import Workload, deciding_budgets


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
            deciding = deciding_budgets(workload, budgets)
            for index, budget in enumerate(deciding):
                clips = range(config.validation_clips)[index :: len(deciding)]
                policies = {"learned": AgentPolicy(scorer)}
                result = evaluate(workload, budget, policies, clips, split="validation", metrics=(metric,), progress=False)
                scores[workload.name, budget] = float(result.scores["learned"][metric].mean())
                bar.set_postfix(**{metric: f"{sum(scores.values()) / len(scores):.2f}"})
                bar.update(len(clips))
    return scores
