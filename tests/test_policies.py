"""The published rules, on random rollouts without a host: each against its pseudo-code written out over true frame numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import baselines
from baselines.anchor import remaining_life
from baselines.filling import FillingPolicy, comparable
from baselines.partition import PartitionPolicy, slots
from far_env.contract import STATISTICS, ObservedRolloutState, RolloutState, apply_plan, check_plan
from far_env.frame_meta import frame_features, frame_meta_list
from far_env.rollout.statistics import column_gaps, latent_cosines

MADE = {name: baselines.make(name) for name in baselines.names()}
FILLING = [name for name, policy in MADE.items() if isinstance(policy, FillingPolicy)]
EVERY_TIER = [(name, tier) for name in FILLING for tier in MADE[name].needs]
UCF8, UCF4, DMLAB = (5, 11, 8), (5, 11, 4), (36, 36, 8)


def make(name, tier=None, **params):
    chosen = {"tier": tier} if tier and len(MADE[name].needs) > 1 else {}
    return baselines.make(name, **chosen, **params)


class World:
    """Random frames, and what a host would see of them: one number, vector or matrix for each, by true frame number."""

    def __init__(self, seed: int, num_frames: int = 80):
        rng = np.random.default_rng(seed)
        self.latents = torch.from_numpy(rng.standard_normal((num_frames, 2, 2, 3)).cumsum(axis=0)).float()
        self.values = rng.random((num_frames, num_frames)).astype(np.float32)
        vectors = rng.standard_normal((num_frames, 6)) + 0.5
        self.vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        self.gaps = column_gaps(self.latents[None])[0].numpy()
        self.cosines = latent_cosines(self.latents[None])[0].numpy()

    def metas(self, kept, step):
        return frame_meta_list(frame_features(self.latents[kept][None])[0], step, 0.01)

    def statistics(self, kept):
        """As of the newest frame; nothing is known yet of its keys."""
        newest = kept[-1]
        mass = self.values[newest, kept] / self.values[newest, kept].sum()
        square = np.ix_(kept, kept)
        products = self.vectors @ self.vectors.T
        found = {
            "lat_cos": self.cosines[square],
            "column_gap": self.gaps[square],
            "key_proto": self.vectors[kept],
            "attn_mass": mass,
            "qk_first": self.values[newest, kept] - 0.5,
            "key_cos": products[square].copy(),
            "expected_mass": self.values[kept, newest].copy(),
            "expected_cos": products[square].copy(),
            "denoise_gap": self.values[kept, 0],
        }
        for name in ("key_cos", "expected_mass", "expected_cos"):
            found[name][-1] = np.nan
            found[name].T[-1] = np.nan
        assert set(found) == set(STATISTICS)
        return found


def ask(policy, metas, step, budget, statistics=None):
    place = (step, budget * 0.01, 99)
    state = RolloutState(*place) if statistics is None else ObservedRolloutState(*place, statistics)
    plan = policy.build_temporal_cache_plan(metas, state, {"max_frames": budget, "capacity_mb": budget * 0.01})
    check_plan(plan, len(metas))
    return plan


def rollout(policy, world, num_context, num_predict, budget, clip=None, calls=1):
    """The benchmark's loop; returns (step, true numbers before, true numbers that stayed) of every call."""
    if clip is not None:
        policy.begin_clip(clip)
    kept, decisions = list(range(num_context)), []
    for step in range(num_predict):
        kept.append(num_context + step)
        if len(kept) > budget:
            given = world.metas(kept, step), step, budget, world.statistics(kept)
            plans = [ask(policy, *given) for _ in range(calls)]
            assert all(plan == plans[0] for plan in plans), "asked again, it answers the same"
            stay = [kept[i] for i in apply_plan(plans[0], len(kept), budget)]
            decisions.append((step, kept, stay))
            kept = list(stay)
    return decisions


@pytest.mark.parametrize(("name", "tier"), EVERY_TIER)
def test_exactly_the_budget_stays_with_the_newest_and_in_the_order_of_the_rules(name, tier):
    world = World(0)
    for n in range(1, 41):
        metas, statistics = world.metas(list(range(n)), n), world.statistics(list(range(n)))
        for budget in (1, 2, 3, 4, 8, 16):
            plan = ask(make(name, tier), metas, n, budget, statistics)
            kept = [d.chunk_id for d in plan.chunk_decisions if d.action != "drop"]
            most = 15 if name == "far_window" and n > budget else budget
            assert len(kept) == min(n, budget, most) and n - 1 in kept
            assert kept == apply_plan(plan, n, budget), "the harness has nothing to repair"
            if n > budget and budget == 1:
                assert kept == [n - 1]
            priorities = [d.priority for d in plan.chunk_decisions]
            assert [priorities[i] for i in kept] == list(range(1, len(kept) + 1))
            assert all(d.priority == 0 for d in plan.chunk_decisions if d.action == "drop")


@pytest.mark.parametrize(("name", "tier"), EVERY_TIER)
def test_decisions_repeat_and_a_fresh_clip_forgets_the_one_before(name, tier):
    policy, world = make(name, tier), World(1)
    long = rollout(policy, world, *DMLAB, clip=7)
    short = rollout(policy, world, *UCF4, clip=9, calls=2)
    assert short == rollout(make(name, tier), world, *UCF4, clip=9)
    assert long == rollout(policy, world, *DMLAB, clip=7, calls=3)
    # untold, as in the benchmark, where one object serves all clips: by the step alone
    policy = make(name, tier)
    for clip, shape in enumerate((DMLAB, UCF4, UCF4, UCF8)):
        assert rollout(policy, world, *shape, calls=2 - clip % 2) == rollout(make(name, tier), world, *shape, clip=42 + clip)


# number of survivors that are sinks, of the middle, newest, by the specification's table
SPLITS = {
    "sink_recent": ((1, 0, 7), (1, 0, 3)),
    "packforcing": ((4, 2, 2), (2, 1, 1)),
    "future_forcing": ((1, 5, 2), (1, 2, 1)),
    "deep_forcing": ((5, 1, 2), (2, 1, 1)),
    "relax_forcing": ((4, 2, 2), (2, 1, 1)),
    "rolling_forcing": ((4, 0, 4), (2, 0, 2)),
    "h2o": ((0, 4, 4), (0, 2, 2)),
    "snapkv": ((0, 6, 2), (0, 2, 2)),
    "decoprune": ((1, 6, 1), (1, 2, 1)),
    "uniform": ((1, 6, 1), (1, 2, 1)),
    "random_mid": ((1, 5, 2), (1, 2, 1)),
    "drift_match": ((1, 5, 2), (1, 2, 1)),
    "context_match": ((1, 5, 2), (1, 2, 1)),
}


def test_splits_are_the_published_ones_and_sinks_are_demoted():
    assert set(SPLITS) == {name for name, policy in MADE.items() if isinstance(policy, PartitionPolicy)}
    for name, splits in SPLITS.items():
        for budget, (sinks, middle, newest) in zip((8, 4), splits, strict=True):
            for _, before, kept in rollout(make(name), World(2), 36, 20, budget):
                assert before[:sinks] == kept[:sinks] == list(range(sinks)), "the oldest frames are never evicted"
                assert kept[len(kept) - newest :] == before[len(before) - newest :]
                assert sinks + middle + newest == budget
            plan = ask(make(name), World(2).metas(list(range(37)), 0), 0, budget, World(2).statistics(list(range(37))))
            assert [d.action for d in plan.chunk_decisions].count("demote_to_long_term") == sinks
    # at a budget of two all shares collapse; whole numbers go through the same clamps
    assert slots(2, 0.5, 0.25) == slots(2, 10 / 16, 4 / 16) == (1, 0, 1)
    assert slots(1, 0.5, 0.25) == slots(1, 3, 2) == (0, 0, 1)
    assert slots(3, 5, 2) == (1, 0, 2) and slots(8, 0.0, 0.5) == (0, 4, 4) and slots(4, 0, 9) == (0, 0, 4)


TAGS = {
    # family, anchor rule, queue depth, long-term share, reuse, compression, all at a budget of 8
    "recent_fill": ("recency", "none", 0, 0.0, False, "none"),
    "far_window": ("recency", "none", 0, 0.0, False, "none"),
    "sink_recent": ("anchor", "first_frames", 0, 1 / 8, False, "none"),
    "packcache_paper": ("anchor", "condition_frames", 0, 1 / 8, False, "none"),
    "ca2vdm_paper": ("queue", "none", 8, 0.0, False, "none"),
    "flowcache_paper": ("chunkwise", "none", 0, 0.0, True, "token_drop"),
    "packforcing": ("anchor", "first_frames", 2, 4 / 8, False, "none"),
    "future_forcing": ("anchor", "first_frames", 5, 1 / 8, False, "none"),
    "deep_forcing": ("anchor", "first_frames", 1, 5 / 8, False, "none"),
    "relax_forcing": ("anchor", "first_frames", 2, 4 / 8, False, "none"),
    "rolling_forcing": ("anchor", "first_frames", 0, 4 / 8, False, "none"),
    "h2o": ("anchor", "none", 4, 0.0, False, "none"),
    "snapkv": ("anchor", "none", 2, 0.0, False, "none"),
    "decoprune": ("anchor", "first_frames", 6, 1 / 8, False, "none"),
    "uniform": ("anchor", "first_frames", 6, 1 / 8, False, "none"),
    "random_mid": ("anchor", "first_frames", 5, 1 / 8, False, "none"),
    "drift_match": ("anchor", "first_frames", 5, 1 / 8, False, "none"),
    "context_match": ("anchor", "first_frames", 5, 1 / 8, False, "none"),
}


@pytest.mark.parametrize("name", TAGS)
def test_plans_carry_the_specified_tags(name):
    kept = list(range(10))
    plan = ask(make(name), World(3).metas(kept, 4), 4, 8, World(3).statistics(kept))
    family, rule, depth, share, reuse, mode = TAGS[name]
    expected = (family, rule, "passthrough", depth, share, reuse, mode)
    assert tuple(vars(plan).values())[1:] == expected


def top(rows, score, count):
    """Best rows by true number: six digits, ties newer."""
    return sorted(sorted(rows, key=lambda b: (float(f"{score(b):.5e}"), b))[len(rows) - count :])


def halves(births, sink, recent):
    """Sinks, middle, newest."""
    return births[:sink], births[sink : len(births) - recent], births[len(births) - recent :]


class Spec:
    """Pseudo-code over true frame numbers, which a policy is never told. One object per clip."""

    def __init__(self, world, budget):
        self.world, self.budget = world, budget
        self.total, self.seen, self.wins, self.previous = {}, {}, {}, {}

    def mass(self, before):
        return dict(zip(before, self.world.statistics(before)["attn_mass"].astype(float), strict=True))

    def packcache_paper(self, step, before):
        anchors, rest = before[:1], before[1:]
        full = rest[-(self.budget - 2) :] if self.budget > 2 else rest[-1:]
        tail = [b for b in rest if b not in full]
        places = self.budget - 1 - len(full)

        def life(b):
            twos = 0
            while (b + 1) % 2 ** (twos + 1) == 0:
                twos += 1
            return twos - (full[0] - b)

        return anchors + sorted(sorted(tail, key=lambda b: (life(b), b))[len(tail) - places :]) + full

    def uniform(self, step, before):
        left = list(before)
        while len(left) > self.budget:
            gaps = [left[i + 1] - left[i - 1] for i in range(1, len(left) - 1)]
            del left[1 + gaps.index(min(gaps))]
        return left

    def relax_forcing(self, step, before, vectors=None):
        vectors = self.world.vectors.astype(float) if vectors is None else vectors
        sink, middle, recent = halves(before, *((4, 2) if self.budget == 8 else (2, 1)))
        places = self.budget - len(sink) - len(recent)

        def mean(births):
            total = vectors[births].sum(axis=0)
            return total / np.linalg.norm(total)

        def score(b):
            return vectors[b] @ mean(sink) - 2 * vectors[b] @ mean(recent)

        eligible = [b for b in middle if b >= (sink[-1] + recent[0]) / 2]
        if len(eligible) > 4 * places:
            eligible = [eligible[int(x)] for x in np.linspace(0, len(eligible) - 1, 4 * places + 1)[:-1] + 1e-9]
        chosen = top(eligible, score, min(places, len(eligible)))
        rest = [b for b in middle if b < (sink[-1] + recent[0]) / 2]
        return sink + sorted(chosen + top(rest, score, places - len(chosen))) + recent

    def relax_forcing_latents(self, step, before):
        flat = self.world.latents.flatten(1).numpy().astype(float)
        return self.relax_forcing(step, before, flat / np.linalg.norm(flat, axis=1, keepdims=True))

    def h2o(self, step, before, norm="sum"):
        for b, share in self.mass(before).items():
            if b != before[-1]:
                self.total[b] = self.total.get(b, 0) + share
                self.seen[b] = self.seen.get(b, 0) + 1
        score = {
            "sum": self.total.get,
            "exposure": lambda b: self.total[b] / self.seen[b],
            "last": self.mass(before).get,
        }[norm]
        recent = self.budget // 2 if norm != "last" else 1
        return top(before[:-recent], score, self.budget - recent) + before[-recent:]

    def snapkv(self, step, before):
        now, previous = self.mass(before), self.previous
        self.previous = now
        candidates = before[:-2]
        raw = [now[b] + previous.get(b, 0) for b in candidates]
        smooth = {b: np.mean(raw[max(0, i - 1) : i + 2]) for i, b in enumerate(candidates)}
        return top(candidates, smooth.get, self.budget - 2) + before[-2:]

    def query_key(self, before, recent):
        now = dict(zip(before, self.world.statistics(before)["qk_first"].astype(float), strict=True))
        previous, self.previous = self.previous, now
        return {b: now[b] + (previous.get(b, 0) if recent == 2 else 0) for b in before}

    def packforcing(self, step, before):
        sink, middle, recent = halves(before, *((4, 2) if self.budget == 8 else (2, 1)))
        score = self.query_key(before, len(recent))
        return sink + top(middle, score.get, self.budget - len(sink) - len(recent)) + recent

    def deep_forcing(self, step, before):
        sink, middle, recent = halves(before, *((5, 2) if self.budget == 8 else (2, 1)))
        score = self.query_key(before, len(recent))
        for b, wins in self.wins.items():
            if wins >= 2:
                score[b] = -math.inf
        chosen = top(middle, score.get, 1)
        self.wins[chosen[0]] = self.wins.get(chosen[0], 0) + 1
        return sink + chosen + recent

    def flowcache_paper(self, step, before, iterative=False):
        statistics = self.world.statistics(before)
        place = {b: i for i, b in enumerate(before)}
        left = before[:-1]
        while len(left) > self.budget - 1:
            mass = [statistics["attn_mass"][place[b]] for b in left]
            pooled = np.array([max(mass[max(0, i - 1) : i + 2]) for i in range(len(left))], dtype=float)
            cos = [np.mean([statistics["key_cos"][place[a], place[b]] for b in left if b != a], dtype=float) for a in left]
            redundancy = np.exp(cos) / np.exp(cos).sum()
            score = dict(zip(left, 0.07 * pooled / pooled.sum() - 0.93 * redundancy, strict=True))
            left = top(left, score.get, len(left) - 1 if iterative else self.budget - 1)
        return left + before[-1:]

    def future_forcing(self, step, before):
        statistics = self.world.statistics(before)
        sink, middle, recent = halves(before, 1, 2 if self.budget == 8 else 1)
        places = self.budget - len(sink) - len(recent)
        score = dict(zip(before, statistics["expected_mass"].astype(float), strict=True))
        place = {b: i for i, b in enumerate(before)}
        while len(middle) > places:
            pairs = {(statistics["expected_cos"][place[a], place[b]], b, a): (a, b) for a in middle for b in middle if a < b}
            best = max(pairs)
            if best[0] < 0.9:
                break
            a, b = pairs[best]
            middle = [c for c in middle if c != (a if score[a] <= score[b] else b)]
        return sink + top(middle, score.get, places) + recent

    def decoprune(self, step, before):
        return before[:1] + top(before[1:-1], lambda b: self.world.values[b, 0], self.budget - 2) + before[-1:]

    def context_match(self, step, before):
        sink, middle, recent = halves(before, 1, 2 if self.budget == 8 else 1)
        unit = self.world.latents.flatten(1).numpy().astype(float)
        unit = unit / np.linalg.norm(unit, axis=1, keepdims=True)
        mean = unit[recent].mean(axis=0)
        return sink + top(middle, lambda b: unit[b] @ mean, self.budget - 1 - len(recent)) + recent

    def drift_match(self, step, before):
        sink, middle, recent = halves(before, 1, 2 if self.budget == 8 else 1)
        flat = self.world.latents.flatten(1).numpy().astype(float)

        def drift(b):
            return min(1, np.linalg.norm(flat[b] - flat[before[0]]) / np.linalg.norm(flat[before[0]]))

        places = self.budget - 1 - len(recent)
        return sink + top(middle, lambda b: 1 - abs(drift(b) - drift(before[-1])), places) + recent

    def nearest_neighbour(self, step, before):
        flat = self.world.latents.flatten(1).numpy().astype(float)
        unit, left = flat / np.linalg.norm(flat, axis=1, keepdims=True), list(before)
        while len(left) > self.budget:
            alike = {b: max(unit[b] @ unit[c] for c in left if c != b) for b in left[:-1]}
            left.remove(max(alike, key=lambda b: (float(f"{alike[b]:.5e}"), -b)))
        return left

    def least_novel(self, step, before):
        columns, left = self.world.latents.numpy().astype(float), list(before)
        while len(left) > self.budget:
            novelty = {}
            for b in left[:-1]:
                others = np.concatenate([columns[c] for c in left if c != b], axis=-1)
                gaps = ((columns[b][..., :, None] - others[..., None, :]) ** 2).mean(axis=(0, 1))
                novelty[b] = gaps.min(axis=1).mean()
            left.remove(min(novelty, key=lambda b: (float(f"{novelty[b]:.4e}"), b)))
        return left


SPECIFIED = [
    ("packcache_paper", {}, None),
    ("uniform", {}, None),
    ("relax_forcing", {}, None),
    ("relax_forcing", {"tier": "L"}, "relax_forcing_latents"),
    ("h2o", {}, None),
    ("h2o", {"norm": "exposure"}, lambda spec, *call: spec.h2o(*call, norm="exposure")),
    ("h2o", {"norm": "last", "f_recent": 0}, lambda spec, *call: spec.h2o(*call, norm="last")),
    ("snapkv", {}, None),
    ("packforcing", {}, None),
    ("deep_forcing", {"max_reuse": 2}, None),
    ("flowcache_paper", {}, None),
    ("flowcache_paper", {"iterative": True}, lambda spec, *call: spec.flowcache_paper(*call, iterative=True)),
    ("future_forcing", {}, None),
    ("decoprune", {}, None),
    ("context_match", {}, None),
    ("drift_match", {}, None),
    ("nearest_neighbour", {}, None),
    ("least_novel", {}, None),
]


@pytest.mark.parametrize(("name", "params", "how"), SPECIFIED)
def test_rules_equal_their_pseudo_code_over_true_frame_numbers(name, params, how):
    """37 → 8 and 6 → 4 at once, then one eviction per call: chunk ids there say nothing about time."""
    for seed, (num_context, num_predict, budget) in enumerate((DMLAB, UCF8, UCF4, (36, 20, 4))):
        world = World(10 + seed)
        spec = Spec(world, budget)
        rule = how if callable(how) else lambda own, *call: getattr(own, how or name)(*call)
        decisions = rollout(baselines.make(name, **params), world, num_context, num_predict, budget)
        assert [len(before) for _, before, _ in decisions[:2]] == [max(num_context + 1, budget + 1), budget + 1]
        for step, before, kept in decisions:
            assert kept == rule(spec, step, list(before)), f"step {step}"


def test_first_calls_of_the_benchmarks_workloads():
    world = World(4)
    tail = list(range(31, 37))
    assert rollout(make("sink_recent"), world, 36, 1, 8)[0][2] == [0, *range(30, 37)]
    assert rollout(make("sink_recent", n_sink=4), world, 36, 1, 8)[0][2] == [0, 1, 2, 3, *range(33, 37)]
    # lives at distance 1, 2: frame 30 has −1, frame 29 has 1 − 2 = −1; the newer wins
    assert rollout(make("packcache_paper"), world, 36, 1, 8)[0][2] == [0, 30, *tail]
    # the anchor is frame 35 then, frame 30 the first whole one, and frame 29 right behind it has the life 1 − 1
    assert rollout(make("packcache_paper", anchors="last_context"), world, 36, 1, 8)[0][2] == [29, 30, *tail]
    # frame 3 stands before 4 = 2², which makes it stay
    assert rollout(make("packcache_paper"), world, 5, 1, 4)[0][2] == [0, 3, 4, 5]
    assert rollout(make("uniform"), world, 5, 1, 4)[0][2] == [0, 2, 4, 5]
    assert rollout(make("rolling_forcing"), world, 5, 1, 4)[0][2] == [0, 1, 4, 5]


def test_presence_of_packcaches_tail_halves_with_every_frame_of_distance():
    births = range(4096)
    for distance in range(1, 12):
        assert sum(remaining_life(birth, distance) >= 0 for birth in births) == 4096 >> distance
    # one place for the tail: as measured for the specification, over 4,000 steps at a budget of 8
    policy, kept, present = make("packcache_paper"), list(range(9)), np.zeros(5)
    metas = World(5).metas(kept, 0)
    for step in range(4000):
        kept = [kept[i] for i in apply_plan(ask(policy, metas, step, 8), 9, 8)]
        present[min(4, kept[2] - kept[1] - 1)] += 1
        kept.append(9 + step)
    np.testing.assert_allclose(present[:4] / 4000, [0.61, 0.24, 0.06, 0.06], atol=0.01)


@pytest.mark.parametrize("shape", [UCF8, UCF4, DMLAB, (36, 36, 4), (5, 20, 15)])
def test_rules_that_are_the_same_answer_the_same(shape):
    world, budget = World(6), shape[2]
    played = {name: rollout(make(name), world, *shape, clip=1) for name in FILLING}
    recent = [(step, before, before[-budget:]) for step, before, _ in played["sink_recent"][:1]]
    assert played["ca2vdm_paper"] == played["far_window"] and played["far_window"][:1] == recent
    assert rollout(make("packcache_paper", rounding="nearest"), world, *shape) == played["sink_recent"]
    halved = rollout(make("sink_recent", n_sink=budget // 2), world, *shape)
    assert budget % 2 or halved == played["rolling_forcing"]
    assert played["packforcing"] != played["relax_forcing"], "the same split, another middle"


def test_declared_equivalences_hold_up_to_their_budget_and_not_beyond():
    class Newest(FillingPolicy):
        name = family = source = "recent_fill"

        def _choose(self, history):
            return [], range(len(history))[-history.max_frames :]

    world, declared = World(7), 0
    for name in baselines.names():
        for other, most in baselines.info(name).equivalent_to.items():
            declared += 1
            for budget in {1, 2, 3, most, most + 1}:
                reference = Newest() if other == "recent_fill" else make(other)
                same = rollout(make(name), world, 30, 12, budget) == rollout(reference, world, 30, 12, budget)
                assert same == (budget <= most)
    assert declared == 3


@pytest.mark.parametrize("name", [name for name in FILLING if name not in ("packcache_paper", "random_mid", "uniform")])
def test_of_tied_rows_the_newer_stays(name):
    kept = list(range(12))
    metas = frame_meta_list(torch.tensor([[0.0, 0.0, 1.0, 0.0]] * 12), 3, 0.01)
    for meta in metas:
        meta.recentness = 0.5
    world = World(8)
    statistics = {key: np.full_like(value, 0.25) for key, value in world.statistics(kept).items()}
    plan = ask(make(name), metas, 3, 8, statistics)
    stay = [d.chunk_id for d in plan.chunk_decisions if d.action != "drop"]
    sinks = [d.chunk_id for d in plan.chunk_decisions if d.action == "demote_to_long_term"]
    assert stay == sinks + kept[len(sinks) + 12 - 8 :]


class Forbidden(dict):
    """Statistics that may not be looked at, except by name."""

    def __init__(self, allowed, values):
        super().__init__(values)
        self.allowed = allowed

    def __getitem__(self, name):
        assert name in self.allowed, f"{name} was read"
        return super().__getitem__(name)

    get = __getitem__
    values = items = None


@pytest.mark.parametrize(("name", "tier"), EVERY_TIER)
def test_a_policy_reads_what_its_tier_declares_and_nothing_else(name, tier):
    kept, world, policy = list(range(12)), World(9), make(name, tier)
    assert policy.statistics == MADE[name].needs[tier] and (tier == "M") == (policy.statistics == ())
    given = Forbidden(policy.statistics, world.statistics(kept))
    plan = ask(policy, world.metas(kept, 3), 3, 8, given)
    if tier == "M":
        assert plan == ask(make(name, tier), world.metas(kept, 3), 3, 8)


def test_without_statistics_a_policy_falls_back_to_frame_meta_or_says_what_is_missing():
    world, kept = World(9), list(range(12))
    fallbacks = []
    for name in FILLING:
        policy = make(name)
        if not policy.statistics:
            continue
        if "M" in policy.needs:
            fallbacks.append(name)
            assert ask(policy, world.metas(kept, 3), 3, 8) == ask(make(name, "M"), world.metas(kept, 3), 3, 8)
        else:
            with pytest.raises(ValueError, match=rf"{name} needs {policy.statistics[0]}.* does not hand over"):
                ask(policy, world.metas(kept, 3), 3, 8)
    assert fallbacks == ["deep_forcing", "flowcache_paper", "packforcing"]
    with pytest.raises(ValueError, match="context_match needs lat_cos"):
        ask(make("context_match"), world.metas(kept, 3), 3, 8, {"attn_mass": np.ones(12)})


def test_approximations_of_tier_m_are_the_stated_ones():
    world, kept = World(12), list(range(12))
    metas = world.metas(kept, 3)
    by_drift = sorted(range(4, 10), key=lambda i: (-abs(metas[i].feature_drift - metas[11].feature_drift), i))[-2:]
    plan = ask(make("packforcing", "M"), metas, 3, 8)
    assert apply_plan(plan, 12, 8) == [0, 1, 2, 3, *sorted(by_drift), 10, 11]
    a, r = (np.exp([getattr(m, key) for m in metas[:11]]) for key in ("recentness", "temporal_similarity"))
    score = 0.3 * a / a.sum() - 0.7 * r / r.sum()
    plan = ask(make("flowcache_paper", "M", lam=0.3), metas, 3, 8)
    assert apply_plan(plan, 12, 8) == [*sorted(np.argsort(score)[-7:].tolist()), 11]


def test_a_row_that_won_too_often_is_barred_and_a_clean_recent_frame_counts_alone():
    world, kept = World(13), list(range(9))
    policy, middles = make("deep_forcing", max_reuse=3), []
    for step in range(3, 10):
        statistics = {"qk_first": np.array([0.9 if birth == 5 else 0.1 for birth in kept], dtype=np.float32)}
        plan = ask(policy, world.metas(kept, step), step, 8, statistics)
        kept = [kept[i] for i in apply_plan(plan, 9, 8)]
        middles.append(kept[5])
        kept.append(step + 6)
    assert middles[:3] == [5, 5, 5] and 5 not in middles[3:]
    assert make("deep_forcing", clean_recent=True)._slots(8) == (6, 1, 1)
    assert make("relax_forcing", mode="fixed")._slots(8) == (2, 1, 5) and make("relax_forcing", mode="fixed")._slots(2) == (
        1,
        0,
        1,
    )


def test_random_mid_is_a_uniform_reservoir_keyed_by_seed_clip_and_birth():
    world, counts = World(14, 30), np.zeros(20)
    for clip in range(150):
        for _, _, kept in rollout(make("random_mid"), world, 11, 9, 8, clip=clip)[-1:]:
            counts[kept] += 1
    # the sink and the two newest always stay, five of the 17 others do
    assert counts[0] == counts[18] == counts[19] == 150
    np.testing.assert_allclose(counts[1:18] / 150, 5 / 17, atol=0.12)
    one, other = (rollout(make("random_mid", seed=seed), world, 5, 15, 8, clip=3) for seed in (0, 1))
    assert one != other and one == rollout(make("random_mid"), world, 5, 15, 8, clip=3)


def test_scores_are_compared_to_six_digits():
    assert comparable([1.0000001, 1, float("nan"), -math.inf, 123456.7]) == [1, 1, -math.inf, -math.inf, 123457]


def test_every_baseline_tells_where_it_comes_from():
    for name in baselines.names():
        info, text = baselines.info(name), type(MADE[name]).__doc__
        assert info.name == name and info.source and info.note and set(info.tier.split(" or ")) <= set("MLA")
        assert info.family in ("recency", "anchor", "queue", "chunkwise", "redundancy", "control")
        if name in FILLING:
            assert f"Tier: {info.tier.split(' or ')[0]}" in " ".join(text.split())
            assert all(f"``{parameter}``" in text for parameter in info.parameters)
            assert "arXiv" not in info.source or info.source.split("arXiv ")[1].split(",")[0] in text
        assert baselines.make(name, **info.parameters).name == name
    table = baselines.listing()
    assert all(f"\n{name} " in table for name in baselines.names())
    assert "Adapted: frames for tokens" in baselines.listing(["h2o"])
    with pytest.raises(ValueError, match="did you mean 'h2o'"):
        baselines.listing(["h20"])


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("sink_recent", {"n_sink": -1}, "n_sink must be a whole number of at least 0, got -1"),
        ("sink_recent", {"n_sink": 0.5}, "n_sink must be a whole number"),
        ("uniform", {"n_sink": 0}, "n_sink must be a whole number of at least 1"),
        ("packforcing", {"f_sink": 0}, "f_sink must be a share above 0"),
        ("packforcing", {"tier": "L"}, "packforcing: unknown tier 'L'"),
        ("rolling_forcing", {"f_sink": 1.5}, "f_sink must be a share from 0 to 1"),
        ("h2o", {"norm": "mean"}, "norm must be 'sum', 'exposure' or 'last'"),
        ("snapkv", {"pool": 4}, "pool must be an odd number"),
        ("packcache_paper", {"rounding": "up"}, "rounding must be 'ruler' or 'nearest'"),
        ("relax_forcing", {"mode": "free"}, "mode must be 'share' or 'fixed'"),
        ("recent_fill", {"n": 1}, "it takes none"),
    ],
)
def test_parameters_that_make_no_sense_are_refused(name, params, message):
    with pytest.raises(ValueError, match=message):
        baselines.make(name, **params)
