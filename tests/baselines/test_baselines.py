"""Baselines: decision rules written out on chosen rows, and the properties every budget-filling rule has."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from far_env import baselines
from far_env.contract import RolloutState, apply_plan, check_plan
from far_env.frame_meta import frame_meta_list
from far_env.policies import policy_facts

COLUMNS = ("boundary_score", "feature_drift", "temporal_similarity", "motion_strength")
FILLING = ("recent_fill", "random", "least_change_prev", "least_change_next")


def plan_of(name: str, rows: list[tuple], max_frames: int = 4, **params):
    metas = frame_meta_list(torch.tensor(rows, dtype=torch.float32), step=5, size_mb=0.0078125)
    budget = {"max_frames": max_frames, "capacity_mb": max_frames * 0.0078125}
    plan = baselines.make(name, **params).build_temporal_cache_plan(metas, RolloutState(5, budget["capacity_mb"], 11), budget)
    check_plan(plan, len(rows))
    return plan


def actions(name: str, rows: list[tuple]) -> str:
    """First letters of the decisions in order of the frames."""
    return "".join(decision.action[:2] for decision in plan_of(name, rows).chunk_decisions)


# boundary, drift, similarity, motion
STILL = (0.1, 0.1, 0.95, 0.1)
DRIFTED = (0.1, 0.47, 0.95, 0.1)
FAR_GONE = (0.1, 0.9, 0.2, 0.5)
KEYFRAME = (0.2, 0.9, 0.5, 0.74)
STRONGER = (0.2, 0.9, 0.5, 0.8)
CUT = (0.5, 0.9, 0.1, 0.5)


@pytest.mark.parametrize(
    ("name", "rows", "expected"),
    [
        # recentness of five rows: 1/5, 1/4, 1/3, 1/2, 1
        ("recent_window", [STILL] * 5, "drdrdrkeke"),
        ("packcache", [STILL] * 5, "drkekekeke"),
        ("packcache", [STILL, DRIFTED, KEYFRAME, FAR_GONE, (0.1, 0.1, 0.8, 0.1)], "drdrdedrdr"),
        ("causalcache_vdm", [STILL] * 5, "kekekekeke"),
        ("causalcache_vdm", [STILL, DRIFTED, KEYFRAME, STRONGER, FAR_GONE], "kekedrdedr"),
        # flow of STILL: 0.95 · 0.9 · 0.97 = 0.83; of DRIFTED 0.95 · 0.53 · 0.97 = 0.49
        ("flowcache", [STILL] * 5, "kekekekeke"),
        ("flowcache", [DRIFTED, FAR_GONE, STRONGER, DRIFTED, FAR_GONE], "dedrkekeke"),
        ("flowcache", [STILL, STRONGER, CUT, FAR_GONE, STILL, STILL], "drdrdrdrkeke"),
        ("flowcache", [STILL, CUT, STILL, CUT, STILL], "drdrdrkeke"),
    ],
)
def test_the_benchmarks_rules(name, rows, expected):
    assert actions(name, rows) == expected


def test_the_benchmarks_tags_and_priorities():
    rows = [(0.0, 0.0, 1.0, 0.0), (0.3, 0.2, 0.9, 0.4)]
    expected = {
        "recent_window": (("recency", "none", "passthrough", 0, 0.0, False, "none"), 3 + 0.5 * 0.9),
        "packcache": (
            ("anchor", "keyframe_anchor", "demote_all", 0, 0.25, False, "none"),
            2.1 * 0.9 + 1.7 * 0.4 + 1.1 + 0.9 + 0.4 * 0.6,
        ),
        "causalcache_vdm": (
            ("queue", "keyframe_anchor", "selective", 6, 0.35, False, "none"),
            1.6 + 1.5 + 1.2 * 0.4 + 0.8 * 0.9 + 0.4 * 0.6,
        ),
        "flowcache": (
            ("chunkwise", "keyframe_anchor", "selective", 0, 0.30, True, "token_drop"),
            2 * 0.9 * 0.8 * 0.88 + 1.5 * 0.4 + 1.2 + 0.8 * 0.9,
        ),
    }
    for name, (tags, priority) in expected.items():
        plan = plan_of(name, rows)
        fields = list(vars(plan).values())
        assert tuple(fields[1:]) == tags
        assert plan.chunk_decisions[-1].priority == pytest.approx(priority, abs=1e-6)


@pytest.mark.parametrize("name", FILLING)
def test_filling_rules_use_exactly_the_budget_and_keep_the_newest(name):
    rng = np.random.default_rng(0)
    for n in range(1, 41):
        rows = [tuple(row) for row in rng.random((n, 4))]
        for budget in (1, 2, 3, 4, 8, 16):
            plan = plan_of(name, rows, budget)
            kept = [d.chunk_id for d in plan.chunk_decisions if d.action == "keep"]
            assert len(kept) == min(n, budget) and n - 1 in kept
            assert kept == apply_plan(plan, n, budget), "the harness has nothing to repair"


def test_recent_fill_keeps_the_newest():
    plan = plan_of("recent_fill", [STILL] * 7, 3)
    assert apply_plan(plan, 7, 3) == [4, 5, 6]


def test_redundancy_rules_evict_the_frame_that_changed_least():
    motions = [0.0, 0.5, 0.1, 0.4, 0.2, 0.3]
    rows = [(0.0, 0.0, 1.0, motion) for motion in motions]
    # to the predecessor: 2 (0.1), then 4 (0.2); frame 0 has none; frame 5 is the newest
    assert apply_plan(plan_of("least_change_prev", rows), 6, 4) == [0, 1, 3, 5]
    # to the successor: 1 (0.1), then 3 (0.2)
    assert apply_plan(plan_of("least_change_next", rows), 6, 4) == [0, 2, 4, 5]
    tied = [(0.0, 0.0, 1.0, 0.0)] * 5
    assert apply_plan(plan_of("least_change_next", tied), 5, 4) == [1, 2, 3, 4]


def test_random_depends_on_its_seed_and_the_clip_alone():
    def choices(seed, clips):
        policy = baselines.make("random", seed=seed)
        metas = frame_meta_list(torch.rand(9, 4), 3, 0.01)
        kept = {}
        for clip in clips:
            policy.begin_clip(clip)
            state = RolloutState(3, 0.04, 11)
            plans = [policy.build_temporal_cache_plan(metas, state, {"max_frames": 4}) for _ in range(3)]
            kept[clip] = [apply_plan(plan, 9, 4) for plan in plans]
        return kept

    assert choices(0, [1, 2, 3]) == {clip: choices(0, [clip])[clip] for clip in (1, 2, 3)}
    assert choices(0, [1]) != choices(1, [1])
    drawn = choices(0, range(300))
    counts = np.bincount([i for kept in drawn.values() for ids in kept for i in ids], minlength=9) / 900
    assert counts[8] == 1
    np.testing.assert_allclose(counts[:8], 3 / 8, atol=0.06)


def test_the_registry_names_makes_and_corrects():
    assert set(FILLING) | {"recent_window", "packcache", "causalcache_vdm", "flowcache"} <= set(baselines.names())
    for name in baselines.names():
        assert baselines.make(name).name == name
    with pytest.raises(ValueError, match="did you mean 'recent_fill'"):
        baselines.make("recent_fil")
    with pytest.raises(ValueError, match=r"baseline random has no parameter 'sed'; it takes seed"):
        baselines.make("random", sed=1)
    with pytest.raises(ValueError, match="it takes none"):
        baselines.make("recent_fill", n=1)


def test_results_tell_family_tier_and_source():
    facts = policy_facts("packforcing")
    about = baselines.info("packforcing")
    assert (facts["family"], facts["tier"], facts["source"]) == (about.family, about.tier, about.source)
    assert about.note.startswith(facts["note"]) and "\n" not in facts["note"]
    assert policy_facts("pretrained/general")["family"] == "learned"
