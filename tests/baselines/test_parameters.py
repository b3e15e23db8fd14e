"""Parameters of baselines: in names, in grids for tuning, and the partition of which the published ones are special cases."""

from __future__ import annotations

import pytest

from far_env import baselines
from far_env.baselines.composed import MIDDLES
from far_env.baselines.partition import PartitionPolicy, slots
from far_env.policies import load_policy, policy_facts
from tests.policy_world import DMLAB, UCF4, UCF8, World, rollout


@pytest.mark.parametrize(
    ("parameters", "published", "budgets"),
    [
        ({"mid": "none", "n_sink": 2}, ("sink_recent", {"n_sink": 2}), (8, 4)),
        ({"mid": "uniform", "f_recent": 0.0}, ("uniform", {}), (8, 4)),
        ({"mid": "ruler", "f_recent": 0.75}, ("packcache_paper", {}), (8,)),
        ({"mid": "ruler", "f_recent": 0.5}, ("packcache_paper", {}), (4,)),
        ({"mid": "context_match"}, ("context_match", {}), (8, 4)),
        ({"mid": "qk_first", "n_sink": 4}, ("packforcing", {}), (8,)),
        ({"mid": "qk_first", "n_sink": 2}, ("packforcing", {}), (4,)),
        ({"mid": "denoise_gap", "f_recent": 0.0}, ("decoprune", {}), (8, 4)),
    ],
)
def test_the_published_partitions_are_special_cases(parameters, published, budgets):
    name, others = published
    for seed, shape in enumerate((UCF8, DMLAB, UCF4, (36, 20, 4))):
        if shape[2] in budgets:
            world = World(seed)
            policy, other = baselines.make("partition", **parameters), baselines.make(name, **others)
            assert rollout(policy, world, *shape) == rollout(other, world, *shape), shape


def test_the_middle_of_relaxed_is_like_the_sinks_and_unlike_the_newest():
    world = World(3)
    flat = world.latents.flatten(1).numpy().astype(float)
    unit = flat / (flat**2).sum(axis=1, keepdims=True) ** 0.5
    for _, before, kept in rollout(baselines.make("partition", mid="relaxed"), world, *DMLAB):
        sink, recent = unit[before[0]], unit[before[-2:]].mean(axis=0)
        recent = recent / (recent @ recent) ** 0.5
        score = {b: float(f"{unit[b] @ sink - 2 * unit[b] @ recent:.4e}") for b in before[1:-2]}
        middle = sorted(sorted(score, key=lambda b: (score[b], b))[-5:])
        assert kept == [before[0], *middle, *before[-2:]]


def test_a_grid_has_every_split_once_and_only_values_that_the_baseline_takes():
    counts = {}
    for name in baselines.names():
        if not getattr(type(baselines.make(name)), "GRID", {}):
            continue
        for budget in (2, 4, 8):
            variants = baselines.variants(name, budget)
            assert variants[0] == name and len(variants) == len(set(variants))
            for variant in variants:
                assert baselines.load(variant).name == name
            counts[name, budget] = len(variants)
        assert set(type(baselines.make(name)).GRID) <= set(baselines.info(name).parameters)
    assert {"sink_recent", "flowcache_paper", "partition", "scene_tracker", "path_tracker"} <= {name for name, _ in counts}
    splits = set()
    for variant in baselines.variants("partition", 4):
        policy = baselines.load(variant)
        split = slots(4, policy.sink, policy.recent)
        splits.add((policy.mid, split[0]) if policy.mid == "none" else (policy.mid, *split))
    # Three rows besides the newest: sinks, middle and further newest ones, at least one in the middle unless the score is none.
    partitions = [(s, m, 4 - s - m) for s in range(4) for m in range(1, 4 - s)]
    wanted = {("none", s) for s in range(4)}
    wanted |= {
        (mid, *split) for mid in MIDDLES if mid != "none" for split in partitions if split[0] or not MIDDLES[mid].needs_sink
    }
    assert splits == wanted and counts["partition", 4] == len(wanted)
    for score in ("lam", 0.07), ("lam", 0.3), ("lam", 0.5):
        assert any(baselines.load(v).lam == score[1] for v in baselines.variants("flowcache_paper", 4))
    with pytest.raises(ValueError, match=r"recent_fill has no parameters that are tuned; these have: .*sink_recent"):
        baselines.variants("recent_fill", 4)


def test_a_name_may_carry_parameters():
    policy = load_policy("flowcache_paper:lam=0.3:iterative=true")
    assert (policy.lam, policy.iterative, policy.protect) == (0.3, True, 1)
    assert load_policy("path_tracker:drop=older:near=0").near == 0.0
    facts = policy_facts("partition:mid=qk_first:n_sink=0")
    assert facts["parameters"] == "mid=qk_first, n_sink=0" and facts["tier"] == "A"
    assert "parameters" not in policy_facts("partition")
    assert isinstance(load_policy("partition:mid=none:n_sink=0"), PartitionPolicy)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sink_recent:n_sink=two", "n_sink must be a whole number, got 'two'"),
        ("sink_recent:n_sinks=2", "sink_recent has no parameter 'n_sinks'; it takes n_sink"),
        ("sink_recent:", "needs each parameter once"),
        ("sink_recent:n_sink", "needs each parameter once"),
        ("sink_recent:n_sink=1:n_sink=2", "needs each parameter once"),
        ("flowcache_paper:iterative=yes", "iterative must be true or false, got 'yes'"),
        ("flowcache_paper:lam=nan", "lam must be a share from 0 to 1"),
        ("path_tracker:near=nan", "near must be"),
        ("keepsake:tau=0", "tau must be a number above 0"),
        ("partition:mid=best", "mid must be one of none, ruler"),
        ("partition:mid=relaxed:n_sink=0", "n_sink must be at least 1"),
        ("recent_fill:n=1", "it takes none"),
        ("sink_recnt:n_sink=1", "no policy 'sink_recnt:n_sink=1'"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_in_one_sentence(name, message):
    with pytest.raises(ValueError, match=message) as error:
        load_policy(name)
    assert "\n" not in str(error.value)
