"""Each published rule against its pseudo-code written out over true frame numbers, which a policy does not receive."""

from __future__ import annotations

import math

import numpy as np
import pytest

from far_env import baselines
from tests.policy_world import DMLAB, UCF4, UCF8, World, rollout


def top(rows, score, count):
    """Best rows by true number: six digits, ties newer."""
    return sorted(sorted(rows, key=lambda b: (float(f"{score(b):.5e}"), b))[len(rows) - count :])


def halves(births, sink, recent):
    """Sinks, middle, newest."""
    return births[:sink], births[sink : len(births) - recent], births[len(births) - recent :]


class Spec:
    """Pseudo-code over true frame numbers, which a policy does not receive. One object per clip."""

    def __init__(self, world, budget):
        self.world, self.budget = world, budget
        self.total, self.seen, self.wins, self.previous = {}, {}, {}, {}

    def mass(self, before):
        return dict(zip(before, self.world.signals(before)["attn_mass"].astype(float), strict=True))

    def packcache_paper(self, step, before):
        anchors, others = before[:1], before[1:]
        full = others[-(self.budget - 2) :] if self.budget > 2 else others[-1:]
        tail = [b for b in others if b not in full]
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
        older_half = [b for b in middle if b < (sink[-1] + recent[0]) / 2]
        return sink + sorted(chosen + top(older_half, score, places - len(chosen))) + recent

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
        now = dict(zip(before, self.world.signals(before)["qk_first"].astype(float), strict=True))
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
        signals = self.world.signals(before)
        place = {b: i for i, b in enumerate(before)}
        left = before[:-1]
        while len(left) > self.budget - 1:
            mass = [signals["attn_mass"][place[b]] for b in left]
            pooled = np.array([max(mass[max(0, i - 1) : i + 2]) for i in range(len(left))], dtype=float)
            cos = [np.mean([signals["key_cos"][place[a], place[b]] for b in left if b != a], dtype=float) for a in left]
            redundancy = np.exp(cos) / np.exp(cos).sum()
            score = dict(zip(left, 0.07 * pooled / pooled.sum() - 0.93 * redundancy, strict=True))
            left = top(left, score.get, len(left) - 1 if iterative else self.budget - 1)
        return left + before[-1:]

    def future_forcing(self, step, before):
        signals = self.world.signals(before)
        sink, middle, recent = halves(before, 1, 2 if self.budget == 8 else 1)
        places = self.budget - len(sink) - len(recent)
        score = dict(zip(before, signals["expected_mass"].astype(float), strict=True))
        place = {b: i for i, b in enumerate(before)}
        while len(middle) > places:
            pairs = {(signals["expected_cos"][place[a], place[b]], b, a): (a, b) for a in middle for b in middle if a < b}
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

    def cosine(self, a, b):
        one, other = (self.world.latents[i].flatten().numpy().astype(float) for i in (a, b))
        return one @ other / np.linalg.norm(one) / np.linalg.norm(other)

    def k_center(self, step, before):
        kept = before[-1:]
        while len(kept) < self.budget:
            distance = {b: min(1 - self.cosine(b, c) for c in kept) for b in before if b not in kept}
            kept.append(max(distance, key=lambda b: (float(f"{distance[b]:.5e}"), b)))
        return sorted(kept)

    def latent_ri(self, step, before):
        left = list(before)
        while len(left) > self.budget:
            index = {b: sum(self.cosine(b, c) for c in left if c != b) for b in left[:-1]}
            left.remove(max(index, key=lambda b: (float(f"{index[b]:.5e}"), -b)))
        return left

    def keepsake(self, step, before):
        columns, left = self.world.latents.numpy().astype(float), list(before)

        def gaps(a, b):
            return ((columns[a][..., :, None] - columns[b][..., None, :]) ** 2).mean(axis=(0, 1)).min(axis=1)

        scale = np.mean([gaps(a, b) for a in before for b in before if a != b])
        while len(left) > self.budget:
            covered = {}
            for b in left[:-1]:
                seen = {c: np.exp(-gaps(b, c) / scale) for c in left if c != b}
                covered[b] = max(
                    np.mean([max(x, y) for x, y in zip(seen[c], seen[d], strict=True)]) for c in seen for d in seen
                )
            left.remove(max(covered, key=lambda b: (float(f"{covered[b]:.4e}"), -b)))
        return left

    def stableworld(self, step, before, threshold=0.78):
        left = list(before)
        while len(left) > self.budget:
            window = len(left) + 1
            later = 13 if window >= 20 else 2 * window // 3
            later = min(later, len(left) - 2)
            left.pop(later if self.cosine(left[0], left[later]) > threshold else 0)
        return left

    def dysink(self, step, before, repeated=0.95):
        _, middle, recent = halves(before, 0, self.budget // 2)
        bank = []
        for b in middle:
            if all(self.cosine(b, c) < repeated for c in bank):
                bank.append(b)
        relevance = {b: np.mean([self.cosine(b, c) for c in recent]) for b in middle}
        chosen = top(bank, relevance.get, min(len(bank), self.budget - len(recent)))
        again = top([b for b in middle if b not in bank], relevance.get, self.budget - len(recent) - len(chosen))
        return sorted(chosen + again) + recent


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
    ("k_center", {}, None),
    ("latent_ri", {}, None),
    ("keepsake", {}, None),
    ("stableworld", {}, None),
    ("stableworld", {"threshold": 0.2}, lambda spec, *call: spec.stableworld(*call, threshold=0.2)),
    ("dysink", {}, None),
    ("dysink", {"repeated": 0.6}, lambda spec, *call: spec.dysink(*call, repeated=0.6)),
]


@pytest.mark.parametrize(("name", "params", "how"), SPECIFIED)
def test_rules_equal_their_pseudo_code_over_true_frame_numbers(name, params, how):
    """37 → 8 and 6 → 4 at once, then one eviction per call: chunk ids there do not determine time."""
    for seed, (num_context, num_predict, budget) in enumerate((DMLAB, UCF8, UCF4, (36, 20, 4))):
        world = World(10 + seed)
        spec = Spec(world, budget)
        rule = how if callable(how) else lambda rule_object, *call: getattr(rule_object, how or name)(*call)
        decisions = rollout(baselines.make(name, **params), world, num_context, num_predict, budget)
        assert [len(before) for _, before, _ in decisions[:2]] == [max(num_context + 1, budget + 1), budget + 1]
        for step, before, kept in decisions:
            assert kept == rule(spec, step, list(before)), f"step {step}"
