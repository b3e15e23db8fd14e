"""Which budgets of a training leave something to decide in a workload: in frames, or in tokens of a token memory."""

from __future__ import annotations

from collections.abc import Sequence

from far_env.agents.config import TOKENS
from far_env.envs.token_episode import check_token_decides
from far_env.workload import Workload
from far_env.workload import deciding_budgets as deciding_budgets_of_frames


def deciding_budgets(memory: str, workload: Workload, budgets: Sequence[int]) -> list[int]:
    """The budgets, in frames or in tokens as `memory` counts, under which a decision can influence a frame of the workload.

    Raises:
        ValueError: if there is none, or if the workload's host has no token memory.
    """
    if memory != TOKENS:
        return deciding_budgets_of_frames(workload, budgets)
    deciding, reason = [], None
    for budget in budgets:
        try:
            check_token_decides(workload, budget)
        except ValueError as error:
            reason = reason or error
        else:
            deciding.append(budget)
    if not deciding:
        raise reason
    return deciding
