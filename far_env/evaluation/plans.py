"""The plans of records: which frames were there after each decision, checked."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from far_env.contract import UNLIMITED_FRAMES
from far_env.errors import short

if TYPE_CHECKING:
    from far_env.evaluation.records import Record


def histories(record: Record, num_context: int, num_predict: int) -> dict[int, list[int]]:
    """Step → true numbers of the frames that were kept by its decision, ascending.

    Raises:
        ValueError: if the plan is not valid: a frame is kept that was not in the history, the newest is dropped, more are kept
            than the budget allows, or a decision is missing, superfluous or out of order.
    """
    decisions = {}
    for entry in record.plan:
        try:
            frames = [entry["step"], *entry["kept"], *entry["demoted"]]
            if not all(type(number) is int for number in frames):
                raise ValueError("not whole numbers")
        except (KeyError, TypeError, ValueError) as error:
            shown = short(entry)
            raise ValueError(f"has a plan with the entry {shown}, which lacks step, kept or demoted frames") from error
        decisions[frames[0]] = sorted(set(frames[1:]))
    history, decided = list(range(num_context)), []
    for step in range(num_predict - 1):
        newest = num_context + step
        history.append(newest)
        if len(history) <= record.budget or record.budget >= UNLIMITED_FRAMES:
            continue
        decided.append(step)
        kept = decisions.get(step, [])
        if not set(kept) <= set(history) or newest not in kept or len(kept) > record.budget:
            raise ValueError(
                f"has a plan that keeps {short(kept)} of {history} at step {step}, with a budget of {record.budget}"
            )
        history = list(kept)
    if decided != [entry["step"] for entry in record.plan]:
        raise ValueError(f"has a plan for steps {sorted(decisions)}; its budget needs decisions at {decided}")
    return decisions


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
