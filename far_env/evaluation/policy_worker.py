"""The process of `far_env.evaluation.policy_process`: runs a policy file and answers calls in JSON lines.

    python -m far_env.evaluation.policy_worker FILE READ_FD WRITE_FD

A line {"metas", "state", "budget", "new_clip"} is answered by {"decisions": [[chunk_id, action], …]} or {"error": "…"}; the
first answer means that the file was loaded. What the policy prints goes to the standard output, which carries no answers.
"""

from __future__ import annotations

import json
import operator
import os
import random
import sys
from pathlib import Path

from far_env.contract import FrameMeta, RetentionPolicy, RolloutState
from far_env.policy_file import policy_from_file


def main(path: str, read_fd: int, write_fd: int) -> None:
    """Load the policy, then answer until the questions end."""
    with os.fdopen(read_fd, encoding="utf-8") as questions, os.fdopen(write_fd, "w", encoding="utf-8") as answers:

        def answer(values: dict[str, object]) -> None:
            answers.write(json.dumps(values) + "\n")
            answers.flush()

        try:
            policy = policy_from_file(Path(path))
        except BaseException as error:
            answer({"error": str(error) if isinstance(error, ValueError) else f"{path} cannot be loaded: {_described(error)}"})
            return
        answer({"decisions": []})
        clips, state = 0, None
        for line in questions:
            question = json.loads(line)
            if question["new_clip"] or state is None:
                # The benchmark makes one state per clip; a policy may leave something in it.
                state = RolloutState(*question["state"])
                _seed(clips)
                clips += 1
            state.step, state.budget_capacity_mb = question["state"][:2]
            answer(_ask(policy, [FrameMeta(*row) for row in question["metas"]], state, question["budget"]))


def _ask(policy: RetentionPolicy, metas: list[FrameMeta], state: RolloutState, budget: dict[str, float]) -> dict[str, object]:
    try:
        plan = policy.build_temporal_cache_plan(metas, state, budget)
    except BaseException as error:  # SystemExit as well
        return {"error": f"raised {_described(error)}"}
    try:
        return {"decisions": [_decision(decision) for decision in plan.chunk_decisions]}
    except Exception as error:
        return {"error": f"answered {type(plan).__name__}, which is not a plan ({_described(error)})"}


def _decision(decision: object) -> tuple[int, str]:
    """Chunk id and action; what is neither kept nor demoted is dropped, whatever it says."""
    action = decision.action if decision.action in ("keep", "demote_to_long_term") else "drop"
    return (0 if action == "drop" else operator.index(decision.chunk_id)), action


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _seed(clip: int) -> None:
    """Seed the usual generators, as far as the policy has imported them, so that a run can be repeated."""
    random.seed(clip)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(clip)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(clip)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
