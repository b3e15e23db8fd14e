"""The plans of records: which frames were there after each decision, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from far_env.contract import UNLIMITED_FRAMES
from far_env.errors import short

if TYPE_CHECKING:
    from far_env.evaluation.records import Record


def histories(record: Record, num_context: int, num_predict: int, max_kept: int | None = None) -> dict[int, list[int]]:
    """Step → true numbers of the frames that were kept by its decision, ascending.

    Args:
        num_context, num_predict, max_kept: as of `far_env.evaluation.records.Settings.plan_sizes`; None for the budget.

    Raises:
        ValueError: if the plan is not valid: a frame is kept that was not in the history, the newest is dropped, more are kept
            than the budget allows, or a decision is missing, superfluous or out of order.
    """
    budget, decisions = record.budget if max_kept is None else max_kept, {}
    for entry in record.plan:
        try:
            frames = [entry["step"], *entry["kept"], *entry["demoted"]]
            if not all(type(number) is int for number in frames):
                raise ValueError("not whole numbers")
        except (KeyError, TypeError, ValueError) as error:
            shown = short(entry)
            raise ValueError(f"has a plan with the entry {shown}, which lacks step, kept or demoted frames") from error
        decisions[frames[0]] = sorted(set(frames[1:]))
    decided = []

    def keep(step: int, history: list[int]) -> list[int]:
        decided.append(step)
        kept = decisions.get(step, [])
        if not set(kept) <= set(history) or history[-1] not in kept or len(kept) > budget:
            raise ValueError(
                f"has a plan that keeps {short(kept)} of {history} at step {step}, with a budget of {record.budget}"
            )
        return kept

    _decide(num_context, num_predict, budget, keep)
    if decided != [entry["step"] for entry in record.plan]:
        raise ValueError(f"has a plan for steps {sorted(decisions)}; its budget needs decisions at {decided}")
    return decisions


def dropped_frames(record: Record, num_context: int, num_predict: int) -> tuple[tuple[int, ...], ...]:
    """Per decision of a plan the frames that were dropped, ascending. Raises ValueError as `histories`."""
    decisions, dropped = histories(record, num_context, num_predict), []

    def keep(step: int, history: list[int]) -> list[int]:
        dropped.append(tuple(sorted(set(history) - set(decisions[step]))))
        return decisions[step]

    _decide(num_context, num_predict, record.budget, keep)
    return tuple(dropped)


def plan_of_dropped(dropped: Sequence[Sequence[int]], num_context: int, num_predict: int, budget: int) -> list[dict[str, Any]]:
    """The plan whose `dropped_frames` these are; all frames that stay count as kept.

    Raises:
        ValueError: in a few words, if the frames or the number of decisions do not fit.
    """
    plan, answers = [], list(dropped)

    def keep(step: int, history: list[int]) -> list[int]:
        if not answers:
            raise ValueError(f"has {len(dropped)} decisions; its budget needs one at step {step} too")
        frames, earlier = answers.pop(0), history[:-1]
        if not set(frames) <= set(earlier) or len(set(frames)) != len(frames):
            raise ValueError(
                f"has {short(list(frames))} at step {step}, where some of {short(earlier)} can be dropped, each once"
            )
        kept = [number for number in history if number not in frames]
        if len(kept) > budget:
            raise ValueError(f"leaves {short(kept)} at step {step}, with a budget of {budget}")
        plan.append({"step": step, "kept": kept, "demoted": []})
        return kept

    _decide(num_context, num_predict, budget, keep)
    if answers:
        raise ValueError(f"has {len(dropped)} decisions; its budget needs {len(plan)}")
    return plan


def _decide(num_context: int, num_predict: int, budget: int, keep: Callable[[int, list[int]], Sequence[int]]) -> None:
    """Ask ``keep`` at every decision of a rollout, with its step and the history (newest last), for the frames that stay."""
    history = list(range(num_context))
    for step in range(num_predict - 1):
        history.append(num_context + step)
        if len(history) > budget and budget < UNLIMITED_FRAMES:
            history = list(keep(step, history))


def check_token_plan(record: Record, num_context: int, num_predict: int) -> None:
    """Raise ValueError unless the plan of a memory of tokens is valid: steps ascend, frames exist, the budget holds."""
    last = -1
    for entry in record.plan:
        try:
            step, tokens, frames = entry["step"], entry["tokens"], [*entry["kept"], *entry["demoted"]]
            if not all(type(number) is int for number in (step, *frames)) or not math.isfinite(tokens):
                raise ValueError("not numbers")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"has a plan with the entry {short(entry)}, which lacks step, tokens, kept or demoted frames"
            ) from error
        newest = num_context + step
        if not last < step < num_predict or newest not in frames or not all(0 <= number <= newest for number in frames):
            raise ValueError(f"has a plan that keeps {short(frames)} at step {step}")
        if not 0 < tokens <= record.budget:
            raise ValueError(f"has a plan that keeps {short(tokens)} tokens at step {step}, with a budget of {record.budget}")
        last = step
