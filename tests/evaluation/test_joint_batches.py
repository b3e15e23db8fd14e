"""Several policies in one batch: what each does is what it does alone, and what they share is computed once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from far_env import baselines
from far_env.contract import make_plan
from far_env.errors import PolicyError
from far_env.evaluation.evaluate import evaluate_grid
from far_env.rollout.cached_frames import CachedFrames
from far_env.rollout.play import play

NAMES = ("recent_fill", "packcache", "random", "k_center", "latent_ri", "h2o", "snapkv")
"""Stateless ones, a random one, and three groups that request no signals, those of latents, and those of attention."""


class FailsLate:
    """Keeps the newest frames, and raises at a late step of one clip."""

    name = "fails_late"

    def begin_clip(self, seed):
        self.fails = seed == 43

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        if self.fails and rollout_state.step == 6:
            raise RuntimeError("cannot go on")
        n = len(chunk_meta_list)
        return make_plan(range(n)[-int(budget_state["max_frames"]) :], n)


def evaluate(workload, names, **options):
    policies = [baselines.make(name) if isinstance(name, str) else name for name in names]
    everyone = {policy.name: policy for policy in policies}
    options = {"metrics": ["psnr"], "progress": False} | options
    return evaluate_grid([workload], [2, 4], everyone, range(2), **options)


def by_key(results):
    """Records without the time that decisions took."""
    return {record.key: replace(record, decision_ms=None) for record in results.records}


@pytest.fixture(scope="module")
def together(tiny_workload):
    return by_key(evaluate(tiny_workload, NAMES, interventions=["swap"]))


@pytest.fixture
def passes(monkeypatch):
    """Rows of every forward pass that generates frames."""
    rows = []
    generate = CachedFrames.generate

    def counting(self, rollouts):
        rows.append(len(rollouts))
        return generate(self, rollouts)

    monkeypatch.setattr(CachedFrames, "generate", counting)
    return rows


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_plays_as_it_does_alone(together, tiny_workload, name):
    alone = by_key(evaluate(tiny_workload, [name], batch_size=1, memo_bytes=0, interventions=["swap"]))
    assert len(alone) == 2 * 2
    for key, record in alone.items():
        same = together[key]
        assert same.latents_sha256 == record.latents_sha256 and same.plan == record.plan
        # Pixels are decoded in batches of other sizes, which may change their last bits.
        assert same.metrics == pytest.approx(record.metrics, abs=1e-4)


@pytest.mark.parametrize("memo_bytes", [0, 2**28])
def test_a_frame_on_which_policies_agree_is_one_row(tiny_workload, passes, memo_bytes):
    results = evaluate(tiny_workload, ["recent_fill", "packcache", "random"], memo_bytes=memo_bytes)
    of_budget = {}
    for record in results.records:
        decided = [(entry["step"], *sorted(entry["kept"] + entry["demoted"])) for entry in record.plan]
        for step in range(tiny_workload.num_predict):
            made = (record.clip, step, *(decision for decision in decided if decision[0] < step))
            of_budget.setdefault(record.budget, set()).add(made)
    assert sum(passes) == (len(set.union(*of_budget.values())) if memo_bytes else sum(map(len, of_budget.values())))
    assert sum(passes) < len(results.records) * tiny_workload.num_predict


def test_a_batch_is_filled_with_several_policies(tiny_workload, passes):
    names = ["recent_fill", "random", "uniform"]
    evaluate(tiny_workload, names, batch_size=4, memo_bytes=0)
    assert max(passes) == 4, "two clips of each policy"
    passes.clear()
    evaluate(tiny_workload, names, batch_size=2, memo_bytes=0)
    assert max(passes) == 2


def test_a_policy_that_fails_leaves_the_others_of_its_batch_alone(together, tiny_workload):
    options = {"interventions": ["swap"]}
    results = evaluate(tiny_workload, [FailsLate(), "packcache", "random"], optional={"fails_late"}, **options)
    assert len(results.records) == 2 * 2 * 2
    for key, record in by_key(results).items():
        assert record.latents_sha256 == together[key].latents_sha256 and record.plan == together[key].plan
        assert record.metrics == pytest.approx(together[key].metrics, abs=1e-4)
    assert results.settings.failed.keys() == {"fails_late"} and len(results.settings.failed["fails_late"]) == 2
    assert all(
        "clip 1, step 6: raised RuntimeError: cannot go on" in why for why in results.settings.failed["fails_late"].values()
    )
    with pytest.raises(PolicyError, match="clip 1, step 6: raised RuntimeError: cannot go on") as raised:
        evaluate(tiny_workload, [FailsLate(), "packcache"])
    assert isinstance(raised.value.__cause__, RuntimeError), "the policy's own error, with its traceback"


class FailsToBegin:
    """Cannot begin the second clip."""

    name = "fails_to_begin"

    def begin_clip(self, seed):
        if seed == 43:
            raise RuntimeError("no such clip")

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        n = len(chunk_meta_list)
        return make_plan(range(n)[-int(budget_state["max_frames"]) :], n)


def test_a_policy_that_cannot_begin_leaves_the_others_of_its_batch_alone(together, tiny_workload):
    policies = [FailsToBegin(), "packcache", "random"]
    results = evaluate(tiny_workload, policies, optional={"fails_to_begin"}, interventions=["swap"])
    assert {record.policy for record in results.records} == {"packcache", "random"} and len(results.records) == 2 * 2 * 2
    for key, record in by_key(results).items():
        assert record.metrics == pytest.approx(together[key].metrics, abs=1e-4) and record.plan == together[key].plan
    assert all("no such clip" in reason for reason in results.settings.failed["fails_to_begin"].values())


class KeepsThenNewest:
    """Keeps some of the oldest frames at its first decision and the newest ones from then on; notes its signals."""

    signals = ("expected_mass", "denoise_gap")

    def __init__(self, oldest):
        self.oldest, self.received = oldest, []

    def __deepcopy__(self, memo):
        return self

    def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state):
        n, budget = len(chunk_meta_list), budget_state["max_frames"]
        oldest = 0 if self.received else self.oldest
        self.received.append(rollout_state.signals)
        return make_plan([*range(oldest), *range(n)[n - budget + oldest :]], n)


def test_signals_stay_apart_where_true_frames_make_histories_alike_again(tiny_workload):
    workload = replace(tiny_workload, feedback="true", num_predict=9)
    clip = workload.clips.clip("test", 0)
    joint = [KeepsThenNewest(0), KeepsThenNewest(2)]
    batch, _ = play(workload, [clip, clip], [1, 1], list(joint), 4)
    for row, policy in enumerate(joint):
        alone = KeepsThenNewest(policy.oldest)
        expected, _ = play(workload, [clip], [1], alone, 4)
        assert batch.frame_numbers(row) == expected.frame_numbers(0) and len(policy.received) == len(alone.received) > 4
        for signals, others in zip(policy.received, alone.received, strict=True):
            for name in policy.signals:
                np.testing.assert_allclose(signals[name], others[name], rtol=1e-5, atol=1e-6)


def test_policies_with_other_signals_do_not_share_a_batch(tiny_workload):
    clip = tiny_workload.clips.clip("test", 0)
    with pytest.raises(ValueError, match=r"must request the same signals, got \(\) and \('expected_mass', 'denoise_gap'\)"):
        play(tiny_workload, [clip, clip], [1, 1], [baselines.make("recent_fill"), KeepsThenNewest(0)], 4)
