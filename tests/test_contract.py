"""Plans: what they do, and which are refused."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from far_env.contract import (
    ChunkDecision,
    RetentionPolicy,
    RolloutState,
    TemporalCachePlan,
    apply_plan,
    ask_policy,
    check_plan,
    copy_for_clip,
    make_plan,
    newest_within_budget,
)
from far_env.errors import PolicyError

BUDGET = {"max_frames": 3, "capacity_mb": 0.1}


def plan(*actions: str) -> TemporalCachePlan:
    return TemporalCachePlan([ChunkDecision(i, action) for i, action in enumerate(actions)])


@pytest.mark.parametrize(
    ("actions", "max_frames", "kept"),
    [
        (("keep", "drop", "demote_to_long_term", "drop"), 4, [0, 2, 3]),  # the newest stays though dropped
        (("keep", "keep", "keep", "keep"), 2, [2, 3]),  # over budget: the oldest go
        (("keep", "keep", "drop", "drop"), 2, [1, 3]),
        (("pin", "retain", "evict", "keep"), 4, [3]),  # unknown actions drop
        (("keep",), 4, [0, 3]),  # no decision drops
    ],
)
def test_the_benchmarks_rule(actions, max_frames, kept):
    assert apply_plan(plan(*actions), num_frames=4, max_frames=max_frames) == kept


def test_apply_plan_against_a_plain_restatement_of_the_rule():
    rng = np.random.default_rng(0)
    for _ in range(500):
        n, budget = int(rng.integers(1, 12)), int(rng.integers(1, 9))
        decided = rng.permutation(n)[: rng.integers(0, n + 1)]
        actions = rng.choice(["keep", "drop", "demote_to_long_term", "other"], size=len(decided))
        plan = TemporalCachePlan([ChunkDecision(int(i), str(a)) for i, a in zip(decided, actions, strict=True)])
        expected = []
        for i in range(n):
            fate = next((d.action for d in plan.chunk_decisions if d.chunk_id == i), "drop")
            if i == n - 1 or fate in ("keep", "demote_to_long_term"):
                expected.append(i)
        while len(expected) > budget:
            expected.pop(0)
        assert apply_plan(plan, n, budget) == expected


@pytest.mark.parametrize(
    ("wanted", "max_frames", "kept"),
    [
        ([1, 0, 1, 0], 4, [1, 0, 1, 1]),  # the newest stays though it is not wanted
        ([1, 1, 1, 1], 2, [0, 0, 1, 1]),  # over budget: the oldest go
        ([1, 1, 0, 0], 2, [0, 1, 0, 1]),
        ([1, 1, 1, 0], 1, [0, 0, 0, 1]),
        ([0], 1, [1]),
        ([0, 0, 0], 9999, [0, 0, 1]),
    ],
)
def test_the_keep_rule_on_masks(wanted, max_frames, kept):
    mask = np.array(wanted, dtype=bool)
    assert newest_within_budget(mask, max_frames).tolist() == [bool(bit) for bit in kept]
    assert mask.tolist() == [bool(bit) for bit in wanted], "the argument is left alone"


def test_plan_defaults_are_the_benchmarks():
    assert dataclasses.asdict(TemporalCachePlan()) == {
        "chunk_decisions": [],
        "retention_family": "recency",
        "anchor_preservation_rule": "none",
        "boundary_transition_rule": "passthrough",
        "queue_depth": 0,
        "long_term_budget_fraction": 0.0,
        "chunkwise_reuse": False,
        "compression_mode": "none",
    }
    assert ChunkDecision(0, "keep").priority == 0.0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (plan("keep", "hold"), "frame 1 the unknown action 'hold'"),
        (TemporalCachePlan([ChunkDecision(4, "keep")]), "chunk id 4, but the history has ids 0 to 3"),
        (TemporalCachePlan([ChunkDecision(-1, "keep")]), "chunk id -1"),
        (TemporalCachePlan([ChunkDecision(1, "keep"), ChunkDecision(1, "drop")]), "chunk id 1 twice"),
        (TemporalCachePlan([ChunkDecision(1.0, "keep")]), "chunk id 1.0"),
        (TemporalCachePlan([ChunkDecision(True, "keep")]), "chunk id True"),
        (TemporalCachePlan(["keep"]), "unknown action None"),
        ([0, 1], "returned list, not a TemporalCachePlan"),
        (None, "returned NoneType"),
    ],
)
def test_malformed_plans_are_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        check_plan(bad, num_frames=4)


class Scripted:
    def __init__(self, answer):
        self.answer = answer

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def ask(answer, strict=True):
    return ask_policy(Scripted(answer), [None] * 4, RolloutState(6, 0.1, 11), BUDGET, clip=17, strict=strict).kept


@pytest.mark.parametrize("answer", [KeyError("ages"), plan("hold"), None, 3])
def test_errors_name_policy_clip_and_step(answer):
    with pytest.raises(PolicyError, match="policy Scripted on clip 17, step 6: "):
        ask(answer)


def test_the_lenient_path_applies_what_the_strict_one_refuses():
    """As the benchmark does, which indexes the history with what is left of the ids (see `Indexing`)."""
    keep = [ChunkDecision(i, "keep") for i in (0, 1, 2)]
    lenient = [
        [keep[0], ChunkDecision(0, "drop"), ChunkDecision(9, "drop"), ChunkDecision(1, "?")],
        [ChunkDecision(-2, "keep"), keep[1]],
        [ChunkDecision(-9, "keep"), *keep],
        [ChunkDecision(True, "keep")],
        [],
    ]
    for decisions in lenient:
        expected = Indexing().apply(decisions, 4, BUDGET["max_frames"])
        assert ask(TemporalCachePlan(decisions), strict=False) == expected
        with pytest.raises(PolicyError):
            ask(TemporalCachePlan([*decisions, *decisions, ChunkDecision(9, "keep")]))
    assert [Indexing().apply(decisions, 4, 3) for decisions in lenient] == [[0, 3], [2, 1, 3], [1, 2, 3], [1, 3], [3]]
    for decisions in ([ChunkDecision(9, "keep")], [ChunkDecision(-9, "keep")], [ChunkDecision(1.0, "keep")]):
        with pytest.raises((IndexError, TypeError)):
            Indexing().apply(decisions, 4, 3)
        with pytest.raises(PolicyError, match="clip 17, step 6"):
            ask(TemporalCachePlan(decisions), strict=False)
    with pytest.raises(PolicyError):
        ask(None, strict=False)


class Indexing:
    """The benchmark's rule by indexing a history, which is what fails there."""

    def apply(self, decisions, num_frames, max_frames):
        wanted = {decision.chunk_id for decision in decisions if decision.action in ("keep", "demote_to_long_term")}
        wanted.add(num_frames - 1)
        history = list(range(num_frames))
        return [history[i] for i in sorted(wanted)[-max_frames:]]


def test_an_answer_tells_what_was_demoted_and_how_long_it_took():
    class Slow:
        def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
            time.sleep(0.05)
            return plan("demote_to_long_term", "keep", "demote_to_long_term", "demote_to_long_term", "keep")

    answer = ask_policy(Slow(), [None] * 5, RolloutState(6, 0.1, 11), BUDGET, clip=17)
    assert (answer.kept, answer.demoted) == ([2, 3, 4], [2, 3]), "frame 0 was demoted but did not fit"
    assert 0.05 <= answer.seconds < 1


def test_numpy_ids_are_as_good_as_pythons():
    plan = TemporalCachePlan([ChunkDecision(i, "keep") for i in np.array([0, 2])])
    check_plan(plan, 4)
    kept = apply_plan(plan, 4, 3)
    assert kept == [0, 2, 3] and all(type(i) is int for i in kept)


def test_a_policy_cannot_change_the_budget_it_is_held_to():
    class Greedy:
        def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
            budget_state["max_frames"] = 9999
            chunk_meta_list.clear()
            return make_plan([0, 1, 2, 3], 4)

    budget = {"max_frames": 2, "capacity_mb": 0.1}
    assert ask_policy(Greedy(), [None] * 4, RolloutState(6, 0.1, 11), budget, clip=0).kept == [2, 3]
    assert budget["max_frames"] == 2


def test_a_policy_that_cannot_be_prepared_names_itself():
    class Locked:
        lock = None

        def __init__(self):
            self.lock = threading.Lock()

    with pytest.raises(PolicyError, match=r"policy Locked cannot be prepared for a clip .* TypeError"):
        copy_for_clip(Locked(), 5)
    assert copy_for_clip(None, 5) is None


def test_make_plan_keeps_exactly_the_given_ids():
    assert apply_plan(make_plan([0, 2, 3], 4), 4, 3) == [0, 2, 3]
    assert isinstance(Scripted(None), RetentionPolicy)


def test_the_contract_and_the_baselines_need_no_torch():
    code = "import sys; import far_env.contract, baselines; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
