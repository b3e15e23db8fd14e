"""The process of a policy file: answers the calls of `far_env.policy_process` in JSON lines.

    python -m far_env.policy_worker FILE READ_FD WRITE_FD MEMORY_BYTES

The first line that it writes, {"decisions": [], "signals": [name, …]}, means that the file was loaded. A question has the keys
``metas``, ``state`` and ``budget``, and

- ``new_clip``: one object serves all clips, as in the benchmark; or
- ``copy``, ``seed``, ``signals`` and ``forget``: the copy with this number is called, which is made at its first question; its
  plan is checked as `far_env.contract.check_plan` does. The copies whose numbers are to be forgotten are deleted before.

It is answered by {"decisions": [[chunk_id, action], …]} or {"error": "…"}. What the policy prints goes to the standard output,
which carries no answers.
"""

from __future__ import annotations

import base64
import copy
import itertools
import json
import operator
import os
import random
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from far_env.contract import (
    MAX_DECISIONS,
    FrameMeta,
    ObservedRolloutState,
    RetentionPolicy,
    RolloutState,
    TemporalCachePlan,
    check_plan,
    plan_decisions,
)
from far_env.policy_file import policy_from_file


def main(path: str, read_fd: int, write_fd: int, memory_bytes: int) -> None:
    """Load the policy, then answer until the questions end, or until the supervisor has ended."""
    _limit_memory(memory_bytes)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    with os.fdopen(read_fd, encoding="utf-8") as questions, os.fdopen(write_fd, "w", encoding="utf-8") as answers:

        def answer(values: dict[str, object]) -> None:
            answers.write(json.dumps(values) + "\n")
            answers.flush()

        try:
            policy = policy_from_file(Path(path))
            signals = [str(name) for name in getattr(policy, "signals", ())]
        except BaseException as error:
            answer({"error": str(error) if isinstance(error, ValueError) else f"{path} cannot be loaded: {_described(error)}"})
            return
        answer({"decisions": [], "signals": signals})
        one, copies = _OneForAllClips(policy), _OneForEachClip(policy)
        for line in questions:
            question = json.loads(line)
            try:
                answer((copies if "copy" in question else one).answer(question))
            except BaseException as error:  # SystemExit as well
                answer({"error": f"raised {_described(error)}{_place(error, path)}"})


class _OneForAllClips:
    """The benchmark's way: one object, one state per clip, in which a policy may leave something."""

    def __init__(self, policy: RetentionPolicy) -> None:
        self.policy = policy
        self.clips = 0
        self.state: RolloutState | None = None

    def answer(self, question: dict[str, Any]) -> dict[str, object]:
        """The decisions of the plan, by the benchmark's lenient rules."""
        if question["new_clip"] or self.state is None:
            self.state = RolloutState(*question["state"])
            _seed(self.clips)
            self.clips += 1
        self.state.step, self.state.budget_capacity_mb = question["state"][:2]
        plan = self.policy.build_temporal_cache_plan(_metas(question), self.state, question["budget"])
        try:
            decisions = list(itertools.islice(plan.chunk_decisions, MAX_DECISIONS + 1))
            if len(decisions) > MAX_DECISIONS:
                return {"error": f"answered a plan with more than {MAX_DECISIONS} decisions"}
            return {"decisions": [_decision(decision) for decision in decisions]}
        except Exception as error:
            return {"error": f"answered {type(plan).__name__}, which is not a plan ({_described(error)})"}


class _OneForEachClip:
    """The evaluation's way: a copy for each clip and a new state for each call."""

    def __init__(self, policy: RetentionPolicy) -> None:
        self.policy = policy
        self.copies: dict[int, RetentionPolicy] = {}

    def answer(self, question: dict[str, Any]) -> dict[str, object]:
        """The decisions of a plan that is well formed, or what is wrong with it."""
        for number in question["forget"]:
            self.copies.pop(number, None)
        number, seed = question["copy"], question["seed"]
        policy = self.copies.get(number)
        if policy is None:
            policy = self.copies[number] = copy.deepcopy(self.policy)
            if callable(begin_clip := getattr(policy, "begin_clip", None)):
                begin_clip(seed)
        state = RolloutState(*question["state"])
        if question["signals"]:
            signals = {
                name: np.frombuffer(base64.b64decode(values), dtype="<f4").reshape(shape).copy()
                for name, (shape, values) in question["signals"].items()
            }
            state = ObservedRolloutState(*question["state"], signals)
        metas = _metas(question)
        _seed((seed * 10_007 + state.step) % 2**32)
        plan = policy.build_temporal_cache_plan(metas, state, question["budget"])
        try:
            # Read once, because a generator can be.
            decisions = plan_decisions(plan, len(question["metas"]) + 1)
            check_plan(TemporalCachePlan(decisions), len(question["metas"]))
            return {"decisions": [(int(decision.chunk_id), decision.action) for decision in decisions]}
        except ValueError as error:
            return {"error": str(error)}
        except (Exception, SystemExit) as error:  # the attributes of a plan may run any code
            return {"error": f"returned a plan that cannot be read: {_described(error)}"}


def _metas(question: dict[str, Any]) -> list[FrameMeta]:
    return [FrameMeta(*row) for row in question["metas"]]


def _decision(decision: object) -> tuple[int, str]:
    """Chunk id and action; what is neither kept nor demoted is dropped, whatever it says."""
    action = decision.action if decision.action in ("keep", "demote_to_long_term") else "drop"
    return (0 if action == "drop" else operator.index(decision.chunk_id)), action


def _described(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _place(error: BaseException, path: str) -> str:
    """The line of the policy file that was being run, in parentheses, if it is known."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == path]
    return f" (line {lines[-1]})" if lines else ""


def _seed(seed: int) -> None:
    """Seed the usual generators, as far as the policy has imported them, so that a run can be repeated."""
    random.seed(seed)
    np.random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)


def _end_with_parent(parent: int) -> None:
    """Kill this process group once the supervisor was killed, whatever the policy is doing."""
    while os.getppid() == parent:
        time.sleep(1)
    os.killpg(0, signal.SIGKILL)


def _limit_memory(num_bytes: int) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (num_bytes, num_bytes))
    except (ImportError, OSError, ValueError):
        pass  # the system has no such limit, or a lower one


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:5]))
