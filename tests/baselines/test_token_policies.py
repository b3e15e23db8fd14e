"""Policies over entries against loops over single heads, on random entries; Future Forcing's merging against enumeration."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from far_env.baselines import tokens
from far_env.baselines.token_merging import FutureForcingReconstruction, QueryProxy
from far_env.baselines.token_rules import SinksAndCoarse, TwoLevels, best
from far_env.policies import load_token_policy, token_policy_facts, token_policy_names
from far_env.rollout.attention_probe import QueryMoments
from far_env.rollout.token_cache import COARSE, EMPTY, FULL, CacheView
from far_env.rollout.token_policy import TokenSizes, check_answer

PER_FRAME, DIM = 4, 6


def random_view(seed=0, num_slots=37, budget=24, shape=(2, 3, 2), most_empty=4, weights=True) -> CacheView:
    """Entries of a few tokens of each of some frames, the newest whole, and some empty slots in front."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    frame, cell = (np.full((*shape, num_slots), fill) for fill in (-1, 0))
    newest = 15
    for place in np.ndindex(*shape):
        empty = rng.integers(0, most_empty + 1)
        chosen = np.sort(rng.choice(newest * PER_FRAME, num_slots - PER_FRAME - empty, replace=False))
        slots = np.concatenate([chosen, newest * PER_FRAME + np.arange(PER_FRAME)])
        frame[place][empty:], cell[place][empty:] = slots // PER_FRAME, slots % PER_FRAME
    frame, cell = torch.from_numpy(frame), torch.from_numpy(cell)
    present = (frame >= 0).float()
    weight = torch.randint(1, 4, frame.shape).float() if weights else torch.ones(frame.shape)
    weight = torch.where(frame == newest, 1.0, weight) * present
    queries = torch.randn(*shape, 200, DIM).permute(0, 1, 3, 2, 4) + torch.randn(*shape[:2], 1, shape[2], DIM)
    received = torch.rand(2, *frame.shape) * present
    return CacheView(
        frame=frame,
        cell=cell,
        kind=torch.where(frame >= 0, FULL, EMPTY),
        weight=weight,
        position=frame - newest - 1,
        key=torch.randn(*frame.shape, DIM),
        value=torch.randn(*frame.shape, DIM),
        rotated_key=torch.randn(*frame.shape, DIM),
        accumulated=torch.rand(frame.shape) * present,
        received=received,
        queries=QueryMoments.of(queries),
        mean_rotation=torch.polar(torch.rand(DIM // 2), torch.rand(DIM // 2)),
        newest=newest,
        budget=budget,
        tokens_per_frame=PER_FRAME,
        tokens_per_coarse_frame=1,
        tokens_per_row=2,
    )


def stays(into: torch.Tensor) -> torch.Tensor:
    return into == torch.arange(into.shape[-1])


def by_head(view, rule):
    """The answer of a rule for one head: from the numbers of its slots that hold entries to those that stay."""
    out = torch.zeros(view.frame.shape, dtype=torch.bool)
    for place in np.ndindex(*view.frame.shape[:3]):
        slots = [s for s in range(view.frame.shape[-1]) if view.frame[place][s] >= 0]
        out[place][rule(place, slots)] = True
    return out


def top(slots, score, number):
    return sorted(slots, key=lambda s: (float(score(s)), s), reverse=True)[: max(0, number)]


def slow(name, view):
    frame, budget = view.frame, view.budget

    def recent_fill(place, slots):
        return slots[-budget:]

    def streaming_llm(place, slots):
        return slots if len(slots) <= budget else slots[:4] + slots[-(budget - 4) :]

    def sink_recent(place, slots):
        sinks = [s for s in slots if frame[place][s] < 1]
        return sinks + [s for s in slots if s not in sinks][-(budget - len(sinks)) :]

    def h2o(place, slots):
        recent = slots[-(budget // 2) :]
        rest = slots[: -(budget // 2)]
        return recent + top(rest, lambda s: view.accumulated[place][s], budget - len(recent))

    def snapkv(place, slots):
        window = slots[-2 * PER_FRAME :]
        paid = view.received[:, place[0], place[1], place[2]].sum(dim=0)

        def score(s):
            near = [n for n in range(s - 2, s + 3) if n in slots]
            return np.mean([float(paid[n]) for n in near])

        return window + top(slots[: -2 * PER_FRAME], lambda s: round(score(s), 6), budget - len(window))

    def flowcache(place, slots):
        newest, others = slots[-PER_FRAME:], slots[:-PER_FRAME]
        paid, keys = view.received[-1][place] / PER_FRAME, view.rotated_key[place]
        keys = keys / keys.norm(dim=-1, keepdim=True)
        means = torch.tensor([np.mean([float(keys[a] @ keys[b]) for b in others if b != a]) for a in others])
        redundancy = dict(zip(others, means.softmax(dim=0).tolist(), strict=True))

        def score(s):
            peak = max(float(paid[n]) for n in range(s - 3, s + 4) if n in others)
            return 0.07 * peak - 0.93 * redundancy[s]

        return newest + top(others, score, budget - len(newest))

    rules = (recent_fill, streaming_llm, sink_recent, h2o, snapkv, flowcache)
    return by_head(view, next(rule for rule in rules if rule.__name__ == name))


@pytest.mark.parametrize("name", ["recent_fill", "streaming_llm", "sink_recent", "h2o", "snapkv", "flowcache"])
def test_rules_are_those_of_a_loop_over_heads(name):
    for seed in range(4):
        view = random_view(seed)
        into = tokens.load(name).retain(view)
        check_answer(into, view)
        expected = slow(name, view)
        assert torch.equal(stays(into), expected)
        assert torch.equal(into >= 0, expected), "nothing is merged"
        assert bool((expected.sum(dim=-1) == view.budget).all())


def test_two_levels_and_packforcing_choose_resolutions():
    """Under eight frames of tokens, of twelve frames: . full, c coarse."""
    sizes = TokenSizes(budget=8 * 16, full=16, coarse=4, window=15)
    for policy, expected in ((TwoLevels(), "cccccccc...."), (SinksAndCoarse(), "....cccccc..")):
        coarse = policy.coarse_frames(list(range(12)), sizes)
        assert "".join("c" if number in coarse else "." for number in range(12)) == expected
    assert TwoLevels().coarse_frames(list(range(40)), replace(sizes, budget=64 * 16)) == list(range(25)), "the host's window"
    view = random_view()
    view = replace(view, kind=torch.where((view.frame >= 0) & (view.frame < 9), COARSE, view.kind))
    for policy, sinks in ((TwoLevels(), 0), (SinksAndCoarse(), 3)):  # a budget of six frames: three sinks
        expected = by_head(
            view,
            lambda place, slots, sinks=sinks: (
                (first := [s for s in slots if view.frame[place][s] < sinks])
                + [s for s in slots if s not in first][-(view.budget - len(first)) :]
            ),
        )
        assert torch.equal(stays(policy.retain(view)), expected)
        with pytest.raises(ValueError, match="needs a host with coarse frames"):
            policy.retain(replace(view, tokens_per_coarse_frame=None))


def test_of_equal_scores_the_newer_wins():
    scores = torch.tensor([1.0, 2.0, 1.0, 1.0, 2.0])
    assert best(scores, torch.ones(5, dtype=torch.bool), 3).tolist() == [False, True, False, True, True]
    assert best(scores, scores < 2, torch.tensor(1)).tolist() == [False, False, False, True, False]


def exact_outputs(queries, keys, values, weights):
    """Attention outputs (Q, d) of queries (Q, d) for entries."""
    logits = queries @ keys.T / math.sqrt(keys.shape[-1]) + weights.log()
    return logits.softmax(dim=-1) @ values


def merged(keys, values, weights, i, j):
    total = weights[i] + weights[j]
    rest = [n for n in range(len(keys)) if n not in (i, j)]
    new = [(weights[i] * x[i] + weights[j] * x[j]) / total for x in (keys, values)]
    return (
        torch.cat([keys[rest], new[0][None]]),
        torch.cat([values[rest], new[1][None]]),
        torch.cat([weights[rest], total[None]]),
    )


def one_head(seed, num_old=6):
    """One head with few entries, and queries drawn from its proxy: mean and the leading directions alone.

    Logits differ by little, so that the first order counts.
    """
    view = random_view(seed, num_slots=num_old + PER_FRAME, budget=num_old + PER_FRAME - 1, shape=(1, 1, 1), most_empty=0)
    view = replace(view, rotated_key=0.2 * view.rotated_key)
    proxy = QueryProxy.of(view.queries.mean, view.queries.covariance, view.mean_rotation, rank=2)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(4000, 2, generator=generator)
    noise = torch.cat([noise, -noise])
    basis = proxy.affine[0, 0, 0] * DIM**0.5
    return view, proxy, basis[:, 0] + noise @ basis[:, 1:].T


def test_the_merged_pair_changes_the_attention_output_least_of_all_pairs():
    ratios, spread = [], []
    for seed in range(20):
        view, _, queries = one_head(seed)
        policy = FutureForcingReconstruction(f_sink=0.0, f_recent=0.0, rank=2, disagreement=1e9)
        into = policy.retain(view)[0, 0, 0]
        (gone,) = torch.nonzero(~stays(into)).flatten().tolist()
        assert into[gone] >= 0, "merged, not dropped"
        keys, values, weights = (x[0, 0, 0] for x in (view.rotated_key, view.value, view.weight))
        before = exact_outputs(queries, keys, values, weights)
        changes = {}
        for i in range(6):
            for j in range(i):
                after = exact_outputs(queries, *merged(keys, values, weights, i, j))
                changes[j, i] = float((after - before).square().sum(dim=-1).mean())
        chosen = tuple(sorted((gone, int(into[gone]))))
        ratios.append(changes[chosen] / min(changes.values()))
        spread.append(np.median(list(changes.values())) / min(changes.values()))
    # Two pairs whose changes are nearly equal may be taken for each other.
    assert ratios.count(1.0) >= 19 and max(ratios) < 1.1 and np.median(spread) > 10


def test_keys_that_differ_outside_of_the_affine_subspace_are_merged_without_any_change():
    view, proxy, queries = one_head(3)
    direction = torch.linalg.svd(proxy.affine[0, 0, 0].T, full_matrices=True).Vh[-1]
    keys = view.rotated_key.clone()
    keys[..., 4, :] = keys[..., 1, :] + 3 * direction
    view = replace(view, rotated_key=keys)
    into = FutureForcingReconstruction(0.0, 0.0, rank=2, disagreement=1e-3).retain(view)[0, 0, 0]
    assert {i: int(target) for i, target in enumerate(into) if target != i} in ({1: 4}, {4: 1})
    keys, values, weights = (x[0, 0, 0] for x in (view.rotated_key, view.value, view.weight))
    before = exact_outputs(queries, keys, values, weights)
    after = exact_outputs(queries, *merged(keys, values, weights, 1, 4))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    assert float((values[1] - values[4]).norm()) > 0.1


def slow_future_forcing(view, place, policy):
    """Merging and dropping of one head with lists, every cost computed anew at every step."""
    mean, covariance = view.queries.mean[place], view.queries.covariance[place]
    rotation = np.zeros((DIM, DIM))
    for n, number in enumerate(view.mean_rotation.tolist()):
        rotation[2 * n : 2 * n + 2, 2 * n : 2 * n + 2] = [[number.real, -number.imag], [number.imag, number.real]]
    mean, covariance = rotation @ mean.double().numpy(), rotation @ covariance.double().numpy() @ rotation.T
    values, vectors = np.linalg.eigh(covariance)
    second_moment = np.outer(mean, mean)
    for value, vector in list(zip(values, vectors.T, strict=True))[-policy.rank :]:
        second_moment += max(value, 0) * np.outer(vector, vector)
    slots = [s for s in range(view.frame.shape[-1]) if view.frame[place][s] >= 0]
    num_recent = max(PER_FRAME, int(policy.f_recent * view.budget))
    num_sink = int(policy.f_sink * view.budget)
    data = {
        s: [view.rotated_key[place][s].double().numpy(), view.value[place][s].double().numpy(), float(view.weight[place][s])]
        for s in slots[num_sink : len(slots) - num_recent]
    }
    into = {s: s for s in slots}

    def logit(key):
        return mean @ key / math.sqrt(DIM) + key @ covariance @ key / (2 * DIM)

    def cost(a, b):
        (ka, va, wa), (kb, vb, wb) = data[a], data[b]
        rms = math.sqrt(max(0.0, (ka - kb) @ second_moment @ (ka - kb) / DIM))
        shared = (wa * logit(ka) + wb * logit(kb)) / (wa + wb)
        return (wa * wb / (wa + wb) * math.exp(shared) * rms * np.linalg.norm(va - vb), rms)

    for _ in range(len(slots) - view.budget):
        pairs = {(a, b): cost(a, b) for a in data for b in data if a < b}
        allowed = [pair for pair, (_, rms) in pairs.items() if rms <= policy.disagreement]
        if allowed:
            old, new = min(allowed, key=lambda pair: pairs[pair][0])
            root, gone = (old, new) if data[old][2] > data[new][2] else (new, old)
            (kr, vr, wr), (kg, vg, wg) = data[root], data[gone]
            data[root] = [(wr * kr + wg * kg) / (wr + wg), (wr * vr + wg * vg) / (wr + wg), wr + wg]
            target = root
        else:
            gone = min(data, key=lambda s: data[s][2] * math.exp(logit(data[s][0])) * np.linalg.norm(data[s][1]))
            target = -1
        into = {s: target if goal == gone else goal for s, goal in into.items()}
        del data[gone]
    return into


@pytest.mark.parametrize("disagreement", [0.0, 0.3, 1e9])
def test_future_forcing_is_that_of_lists_with_every_cost_computed_anew(disagreement):
    policy = FutureForcingReconstruction(rank=3, disagreement=disagreement)
    merges = drops = 0
    for seed in range(3):
        view = random_view(seed, weights=seed > 0)
        into = policy.retain(view)
        check_answer(into, view)
        for place in np.ndindex(*view.frame.shape[:3]):
            expected = slow_future_forcing(view, place, policy)
            got = {s: int(into[place][s]) for s in expected}
            assert got == expected
            merges += sum(goal not in (s, -1) for s, goal in expected.items())
            drops += sum(goal == -1 for goal in expected.values())
    assert (merges > 0) == (disagreement > 0) and (drops > 0) == (disagreement < 1e9)


def test_names_parameters_and_errors():
    assert set(token_policy_names()) == {*tokens.names(), "pretrained/general", "pretrained/orbit", "full_history"}
    assert len(token_policy_names()) == len(set(token_policy_names()))
    assert load_token_policy("full_history") is None
    policy = load_token_policy("h2o:f_recent=0.25")
    assert policy.f_recent == 0.25
    assert token_policy_facts("h2o:f_recent=0.25")["parameters"] == "f_recent=0.25"
    assert "reconstruction" in token_policy_facts("future_forcing_reconstruction")["source"]
    for name, reason in (
        ("h2", "no token policy 'h2'"),
        ("h2o:f=1", "has no parameter 'f'; it takes f_recent"),
        ("h2o:f_recent=2", "a share from 0 to 1"),
        ("snapkv:pool=4", "must be odd"),
        ("sink_recent:n_sink=x", "must be a whole number"),
        ("future_forcing_reconstruction:disagreement=-1", "at least 0"),
    ):
        with pytest.raises(ValueError, match=reason):
            load_token_policy(name)
