"""A thousand malformed plans: every one ends as a valid answer or as one sentence, in bounded time and memory."""

from __future__ import annotations

import itertools
import math
import random
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

from far_env.contract import ACTIONS, MAX_DECISIONS, ChunkDecision, RolloutState, TemporalCachePlan, ask_policy
from far_env.errors import PolicyError

NUM_FRAMES, BUDGET = 9, 4


class Hostile:
    """An object none of whose operations works."""

    def __getattr__(self, name):
        raise RuntimeError("no attributes\nand a second line")

    def __repr__(self):
        raise RuntimeError("no repr")

    __str__ = __hash__ = __eq__ = __iter__ = __index__ = __bool__ = __len__ = __repr__


class Wordy:
    def __repr__(self):
        return "line\n" * 100_000


class Exits:
    @property
    def chunk_decisions(self):
        raise SystemExit(3)


class Changing:
    """A decision that is another one whenever it is read."""

    def __init__(self, rng):
        self.rng = rng

    @property
    def chunk_id(self):
        return self.rng.randrange(-3, NUM_FRAMES + 3)

    @property
    def action(self):
        return self.rng.choice([*ACTIONS, "other"])


def failing(decisions):
    yield from decisions
    raise RecursionError("deep\n" * 1000)


def a_number(rng):
    whole = rng.choice([rng.randrange(-12, 12), 10**5000, -(10**30), 2**63, np.int64(3), np.uint8(250), True])
    other = rng.choice(
        [1.0, math.nan, math.inf, 2 + 1j, np.float32(2), np.array(2), np.array([1, 2]), None, "3", b"3", [1], {1: 2}]
    )
    return rng.choice([whole, whole, other, Hostile(), Wordy()])


def an_action(rng):
    wrong = ["pin", "KEEP", "", "keep\n", "x" * 10**6, None, 1, math.nan, ["keep"], b"keep", np.array(["keep", "drop"])]
    return rng.choice([*ACTIONS, *ACTIONS, *ACTIONS, rng.choice(wrong), Hostile(), Wordy()])


def a_decision(rng):
    kind = rng.randrange(8)
    if kind == 0:
        return rng.choice(["keep", 3, None, (0, "keep"), {"chunk_id": 0, "action": "keep"}, Hostile(), Wordy(), Changing(rng)])
    if kind == 1:
        return SimpleNamespace(**rng.choice([{"chunk_id": a_number(rng)}, {"action": an_action(rng)}, {}]))
    if kind < 5:
        return ChunkDecision(
            rng.randrange(NUM_FRAMES), rng.choice(ACTIONS), rng.choice([math.nan, -math.inf, "high", None, Hostile()])
        )
    return ChunkDecision(a_number(rng), an_action(rng), a_number(rng))


def some_decisions(rng):
    decisions = [a_decision(rng) for _ in range(rng.randrange(0, 14))]
    return rng.choice(
        [
            lambda: decisions,
            lambda: tuple(decisions),
            lambda: iter(decisions),
            lambda: (decision for decision in decisions),
            lambda: failing(decisions),
            lambda: dict(enumerate(decisions)),
            lambda: np.fromiter(decisions, dtype=object),
            lambda: decisions * 2_000,
            lambda: itertools.cycle([ChunkDecision(0, "keep")]),
            lambda: (ChunkDecision(i, "keep") for i in itertools.count()),
            lambda: (ChunkDecision(-i, "keep") for i in itertools.count(1)),
            lambda: [ChunkDecision(i, "drop") for i in range(12_000)],
            lambda: [ChunkDecision(i, rng.choice(ACTIONS)) for i in rng.sample(range(NUM_FRAMES), 5)],
            lambda: rng.choice([None, 3, "keep", math.nan, Hostile(), {1, 2}, b"keep"]),
        ]
    )()


def a_plan(rng):
    kind = rng.randrange(12)
    if kind == 0:
        return rng.choice(
            [None, 3, "keep", [], {}, math.nan, Hostile(), Wordy(), Exits(), TemporalCachePlan, iter([]), np.zeros(3)]
        )
    if kind == 1:
        return SimpleNamespace(**{rng.choice(["chunk_decision", "chunk_decisions"]): some_decisions(rng)})
    return TemporalCachePlan(some_decisions(rng), queue_depth=a_number(rng), compression_mode=an_action(rng))


class Scripted:
    name = "scripted"

    def __init__(self, plan):
        self.plan = plan

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        chunk_meta_list.clear()
        budget_state.clear()
        return self.plan


def ask(plan, strict):
    state, budget = RolloutState(6, 0.1, 11), {"max_frames": BUDGET, "capacity_mb": 0.1}
    return ask_policy(Scripted(plan), [None] * NUM_FRAMES, state, budget, clip=17, strict=strict)


@pytest.mark.parametrize("strict", [True, False])
def test_a_thousand_malformed_plans_are_answers_or_one_sentence(strict):
    outcomes = {"valid": 0, "refused": 0}
    slowest = 0.0
    tracemalloc.start()
    try:
        for seed in range(1000):
            plan = a_plan(random.Random(seed))
            start = time.perf_counter()
            try:
                answer = ask(plan, strict)
            except PolicyError as error:
                message = str(error)
                assert message.startswith("policy scripted on clip 17, step 6: "), (seed, message)
                assert "\n" not in message and 50 < len(message) < 700, (seed, message)
                outcomes["refused"] += 1
            else:
                assert all(type(i) is int and 0 <= i < NUM_FRAMES for i in answer.kept), seed
                assert 1 <= len(answer.kept) <= BUDGET and answer.kept[-1] == NUM_FRAMES - 1, seed
                assert set(answer.demoted) <= set(answer.kept), seed
                if strict:
                    assert answer.kept == sorted(set(answer.kept)), seed
                outcomes["valid"] += 1
            slowest = max(slowest, time.perf_counter() - start)
            del plan
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert min(outcomes.values()) > 50, f"both outcomes are common: {outcomes}"
    assert slowest < 5 and peak < 200 * 2**20


def test_a_generator_is_read_once_and_as_a_list():
    decisions = [ChunkDecision(i, "keep" if i in (1, 2) else "drop") for i in range(NUM_FRAMES)]
    for strict in (True, False):
        answer = ask(TemporalCachePlan(decision for decision in decisions), strict)
        assert answer.kept == [1, 2, NUM_FRAMES - 1]


@pytest.mark.parametrize(
    ("plan", "strict", "message"),
    [
        (TemporalCachePlan(None), True, "a plan whose chunk_decisions is NoneType, not a list"),
        (TemporalCachePlan(None), False, "a plan whose chunk_decisions is NoneType, not a list"),
        (TemporalCachePlan(itertools.cycle([ChunkDecision(0, "keep")])), True, "decided about chunk id 0 twice"),
        (
            TemporalCachePlan(itertools.repeat(ChunkDecision(0, "keep"))),
            False,
            f"more than {MAX_DECISIONS} decisions for 9 frames",
        ),
        (
            TemporalCachePlan([ChunkDecision(10**5000, "keep")]),
            True,
            "decided about chunk id .*, but the history has ids 0 to 8",
        ),
        (TemporalCachePlan([ChunkDecision(0, np.array(["keep", "drop"]))]), True, "frame 0 the unknown action array"),
        (Exits(), True, "returned a plan that cannot be read: SystemExit: 3$"),
    ],
)
def test_what_is_wrong_is_said(plan, strict, message):
    with pytest.raises(PolicyError, match=message):
        ask(plan, strict)


def test_a_policy_that_exits_or_raises_at_length_is_an_error_of_one_line():
    class Raises:
        def __init__(self, error):
            self.error = error

        def build_temporal_cache_plan(self, *arguments):
            raise self.error

    for error, said in [
        (SystemExit(3), "raised SystemExit: 3"),
        (ValueError("a\nb"), "raised ValueError: a"),
        (KeyError("x" * 10**6), "raised KeyError: 'xxx"),
    ]:
        with pytest.raises(PolicyError, match=f"policy Raises on clip 17, step 6: {said}") as caught:
            ask_policy(Raises(error), [None] * 9, RolloutState(6, 0.1, 11), {"max_frames": 4}, clip=17)
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 700
