"""Episodes: the environment's transition is the benchmark's, rewards agree with their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from far_env.contract import apply_plan, make_plan
from far_env.envs.episodes import EpisodeBatch, Reward
from far_env.errors import MetricUnavailable
from far_env.frame_meta import frame_features
from far_env.metrics import clip_metrics, lpips
from far_env.rollout.reference import reference_rollout


def begin(workload, budget=4, rows=1, reward=None, metrics=()):
    episodes = EpisodeBatch(workload, [budget], rows, reward or Reward.make("psnr"), metrics)
    ids = list(range(rows))
    episodes.begin(ids, ["test"] * rows, ids, [42 + i for i in ids], [budget] * rows)
    episodes.run(ids)
    return episodes


def finish(episodes, seed=0):
    """Play random masks to the end; returns each row's rewards and final metrics."""
    rng = np.random.default_rng(seed)
    rows = list(range(len(episodes.clips)))
    earned, finals = {row: [] for row in rows}, {}
    while active := [row for row in rows if not episodes.ended(row)]:
        for row in active:
            episodes.retain(row, rng.integers(0, 2, episodes.num_slots))
        episodes.run(active)
        rewards, ended = episodes.rewards(active)
        for row, reward, metrics in zip(active, rewards, ended, strict=True):
            earned[row].append(reward)
            if metrics is not None:
                finals[row] = metrics
    return earned, finals


def test_any_mask_has_the_effect_of_the_benchmarks_rule(tiny_workload):
    episodes = EpisodeBatch(tiny_workload, [4], 1, Reward.make("psnr"))
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(5, 7))
        episodes.rollouts._rows[0].kept = list(range(n))
        mask = rng.integers(0, 2, episodes.num_slots)
        repaired = episodes.retain(0, mask)
        wanted = np.flatnonzero(mask[episodes.num_slots - n :]).tolist()
        expected = apply_plan(make_plan(wanted, n), n, 4)
        assert episodes.rollouts.frame_numbers(0) == expected
        padding = mask[: episodes.num_slots - n].sum()
        assert repaired == len(set(wanted) ^ set(expected)) + padding


def test_whole_episodes_equal_the_specification(tiny_workload):
    for budget in (1, 4, 8):
        episodes = begin(tiny_workload, budget)
        taken = []

        class Replay:
            def build_temporal_cache_plan(self, chunk_meta_list, rollout_state, budget_state, taken=taken):
                n = len(chunk_meta_list)
                kept = taken.pop(0) if taken else [n - 1]
                return make_plan(kept, n)

        rng = np.random.default_rng(budget)
        while not episodes.ended(0):
            n = len(episodes.rollouts.frame_numbers(0))
            mask = rng.integers(0, 2, episodes.num_slots)
            taken.append(np.flatnonzero(mask[episodes.num_slots - n :]).tolist())
            episodes.retain(0, mask)
            episodes.run([0])
        expected = reference_rollout(tiny_workload, tiny_workload.clips.clip("test", 0), Replay(), budget, 42)
        torch.testing.assert_close(episodes.rollouts.generated([0])[0], expected.latents, atol=1e-4, rtol=0)
        _, (final,) = episodes.rewards([0])
        truth = torch.from_numpy(tiny_workload.clips.clip("test", 0).frames[5:])
        assert final["psnr"] == pytest.approx(clip_metrics(expected.frames[None], truth[None], ("psnr",))[0]["psnr"], abs=1e-3)


@pytest.mark.parametrize("budget", [2, 4, 8])
def test_the_telescoping_reward_sums_to_the_terminal_one(tiny_workload, budget):
    terminal, finals = finish(begin(tiny_workload, budget, 3))
    telescoped, _ = finish(begin(tiny_workload, budget, 3, Reward.make("psnr", telescoping=True)))
    for row in range(3):
        assert terminal[row][:-1] == [0] * (len(terminal[row]) - 1)
        assert terminal[row][-1] == pytest.approx(finals[row]["psnr"])
        assert sum(telescoped[row]) == pytest.approx(terminal[row][-1], abs=1e-4)
        assert any(abs(reward) > 1e-3 for reward in telescoped[row][:-1]), "it pays along the way"


def test_weighted_rewards_and_extra_metrics(tiny_workload):
    earned, finals = finish(begin(tiny_workload, 4, 2, Reward.make({"psnr": 0.1, "ssim": 2.0})))
    for row in range(2):
        assert sum(earned[row]) == pytest.approx(0.1 * finals[row]["psnr"] + 2 * finals[row]["ssim"])
    _, finals = finish(begin(tiny_workload, 4, 1, metrics=("ssim",)))
    assert set(finals[0]) == {"psnr", "ssim"}


def test_lpips_rewards_fail_at_construction_without_weights(tiny_workload, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(MetricUnavailable, match="fetches them"):
        Reward.make("lpips")


def test_an_lpips_reward_is_the_negated_distance_of_each_episode_of_a_batch(tiny_workload, random_alexnet):
    batch = begin(tiny_workload, 4, 3, Reward.make("lpips", telescoping=True))
    earned, finals = finish(batch)
    truth = torch.stack([batch.truth(row, 11) for row in range(3)])
    for row, (predicted, true) in enumerate(zip(batch.predicted(range(3)), truth, strict=True)):
        alone = lpips(predicted, true).item()
        assert finals[row]["lpips"] == pytest.approx(alone, rel=1e-4) and alone > 0
        assert sum(earned[row]) == pytest.approx(-alone, rel=1e-4) and len(earned[row]) > 1


def test_observations_hold_what_the_benchmark_hands_a_policy(tiny_workload):
    episodes = begin(tiny_workload, 8, 2)
    episodes.retain(0, np.array([0, 1, 0, 1, 1, 0, 0, 1, 1]))
    episodes.run([0, 1])
    observed = episodes.observe([0, 1])
    assert {key: value.shape for key, value in observed.items()} == {"frames": (2, 9, 6), "mask": (2, 9), "budget": (2, 3)}
    latents, lengths = episodes.rollouts.history([0])
    n = int(lengths[0])
    features = frame_features(latents)[0].numpy()
    rows = observed["frames"][0, 9 - n :]
    ages = np.arange(n - 1, -1, -1)
    np.testing.assert_allclose(rows[:, 0], ages / 9, rtol=1e-6)
    np.testing.assert_allclose(rows[:, 1], 1 / (1 + ages), rtol=1e-6)
    np.testing.assert_allclose(rows[:, 2:5], features[:, :3], rtol=1e-6)
    np.testing.assert_allclose(rows[:, 5], features[:, 3] / (1 + features[:, 3]), rtol=1e-5)
    assert observed["frames"][0, : 9 - n].max(initial=0) == 0
    np.testing.assert_array_equal(observed["mask"][0], [0] * (9 - n) + [1] * n)
    step = episodes.last_step(0)
    np.testing.assert_allclose(observed["budget"][0], [8 / 9, step / 11, n / 9], rtol=1e-6)
    given_features = episodes.info(0)["frame_features"]
    np.testing.assert_allclose(given_features[9 - n :], features, rtol=1e-6)
    assert given_features[: 9 - n].max(initial=0) == 0
    np.testing.assert_array_equal(episodes.action_mask(0), [0] * (9 - n) + [2] * (n - 1) + [1])


def test_decisions_begin_and_end_where_they_matter(tiny_workload):
    for budget, first, count in ((8, 3, 7), (4, 0, 10), (14, 9, 1)):
        episodes = begin(tiny_workload, budget)
        assert episodes.last_step(0) == first
        decisions = 0
        while not episodes.ended(0):
            episodes.retain(0, np.ones(episodes.num_slots))
            episodes.run([0])
            decisions += 1
        assert decisions == count


@pytest.mark.parametrize("budget", [15, 16, 9999])
def test_budgets_without_a_decision_are_refused(tiny_workload, budget):
    with pytest.raises(ValueError, match=r"leaves nothing to decide in tiny_pan.*use at most 14"):
        EpisodeBatch(tiny_workload, [budget], 1, Reward.make("psnr"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("fvd",), "unknown metric 'fvd'"), (({},), "needs at least one")],
)
def test_bad_rewards_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Reward.make(*arguments)


def test_a_saved_batch_goes_on_as_if_nothing_had_happened(tiny_workload):
    for reward in (Reward.make("psnr"), Reward.make("psnr", telescoping=True)):
        episodes = begin(tiny_workload, 4, 2, reward)
        for _ in range(3):
            for row in range(2):
                episodes.retain(row, np.array([1, 0, 1, 1, 0, 1]))
            episodes.run([0, 1])
            episodes.rewards([0, 1])
        other = EpisodeBatch(tiny_workload, [4], 2, reward)
        other.load_state_dict(episodes.state_dict())
        for key, value in episodes.observe([0, 1]).items():
            np.testing.assert_array_equal(value, other.observe([0, 1])[key])
        saved = episodes.state_dict()
        before = episodes.rollouts.generated([0, 1])
        episodes.retain(0, np.array([1, 1, 1, 1, 1, 1]))
        episodes.run([0, 1])
        episodes.load_state_dict(saved)
        torch.testing.assert_close(episodes.rollouts.generated([0, 1]), before, atol=0, rtol=0)
        expected, resumed = finish(episodes, 1)[0], finish(other, 1)[0]
        assert other.decisions == episodes.decisions
        for row in (0, 1):
            assert resumed[row] == pytest.approx(expected[row], abs=1e-5)
