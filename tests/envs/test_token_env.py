"""The environment of a token memory: conventions, the rule for actions, and agreement with streaming rollouts."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import far_env  # noqa: F401  (registers the ids)
from far_env.envs.token_env import TokenRetentionEnv
from far_env.host.protocol import Host
from far_env.metrics import clip_metrics
from far_env.rollout.frame_actions import COMPRESS, DROP, KEEP, granted, regrouping
from far_env.rollout.streaming import StreamingBatch, play_streaming
from far_env.rollout.token_cache import FULL, MERGED

FRAME, SMALL = 16, 4
BUDGET = 4 * FRAME


@pytest.fixture
def make(tiny_workload):
    return lambda **options: TokenRetentionEnv(tiny_workload, **{"budget": BUDGET, **options})


def play(env, agent, **options):
    """Rewards and infos of an episode."""
    observation, info = env.reset(options={"clip_id": 1, **options})
    rewards, infos, ended = [], [info], False
    while not ended:
        observation, reward, ended, truncated, info = env.step(agent(observation, info))
        assert not truncated
        rewards.append(reward)
        infos.append(info)
    return rewards, infos


def keep_all(observation, info):
    return np.full(len(observation["mask"]), KEEP)


def two_levels(observation, info):
    """The two newest frames whole, the others compressed."""
    action = np.full(len(observation["mask"]), COMPRESS)
    action[-2:] = KEEP
    return action


def test_gymnasiums_and_sb3s_checkers_pass(make):
    from stable_baselines3.common.env_checker import check_env as sb3_check_env

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*not having a spec.*")
        check_env(make(render_mode="rgb_array"))
    sb3_check_env(make(), warn=False)


@pytest.mark.parametrize(("name", "slots"), [("Orbit", 65), ("MazeRetrieval", 31)])
def test_registered_ids_make_environments(name, slots):
    env = gym.make(f"far_env/{name}Tokens-v0", budget=256, device="cpu")
    assert env.action_space == gym.spaces.MultiDiscrete([3] * slots)
    assert env.observation_space["frames"].shape == (slots, 8)


@pytest.mark.parametrize("sizes", [(16, 16, 16), (4, 16, 4, 16), (4, 4, 16, 16, 16)])
@pytest.mark.parametrize("budget", [16, 20, 33, 64])
def test_of_all_legal_answers_the_granted_one_gives_newer_frames_most(sizes, budget):
    def tokens(actions):
        return [(0, SMALL, min(FRAME, size))[action] for action, size in zip(actions, sizes, strict=True)]

    for wanted in itertools.product(range(3), repeat=len(sizes)):
        got = granted(wanted, sizes, FRAME, budget)
        limit = [*wanted[:-1], KEEP]
        legal = [
            actions
            for actions in itertools.product(range(3), repeat=len(sizes))
            if sum(tokens(actions)) <= budget
            and all(a <= w for a, w in zip(actions, limit, strict=True))
            and actions[-1] == KEEP
        ]
        assert tokens(got) == max((tokens(actions) for actions in legal), key=lambda held: held[::-1])


def test_a_compressed_frame_is_the_mean_of_each_2x2_tokens_and_counts_as_four(tiny_workload):
    workload = replace(tiny_workload, num_predict=3)
    clips = [workload.clips.clip("test", i) for i in range(2)]
    batch = StreamingBatch(workload, clips, [1, 2], None, None)
    before, cache = [batch.cache.key.clone(), batch.cache.value.clone()], batch.cache
    actions = [{0: KEEP, 1: COMPRESS, 2: DROP, 3: COMPRESS, 4: KEEP}, {0: DROP, 1: KEEP, 2: COMPRESS, 3: DROP, 4: KEEP}]
    cache.regroup(regrouping(cache.view(4, 1000), actions))
    for row, held in enumerate(actions):
        for frame, action in held.items():
            found = [cache.frame[0, row, h] == frame for h in range(2)]
            expected = {DROP: [], COMPRESS: [0, 2, 8, 10], KEEP: list(range(16))}[action]
            for layer, head in itertools.product(range(2), range(2)):
                assert cache.cell[layer, row, head][found[head]].tolist() == expected
            if action == COMPRESS:
                at = cache.frame[1, row, 1] == frame
                assert bool((cache.weight[1, row, 1][at] == 4).all() and (cache.kind[1, row, 1][at] == MERGED).all())
                start = 16 * frame
                for slot, cell in zip(torch.nonzero(at).flatten().tolist(), expected, strict=True):
                    around = [start + cell + offset for offset in (0, 1, 4, 5)]
                    mean = before[1][0, 1, row, 1, around].mean(dim=0)
                    assert torch.allclose(cache.value[0, 1, row, 1, slot], mean, atol=1e-6)
    cache.regroup(regrouping(cache.view(4, 1000), [{number: KEEP for number in range(5)}] * 2))
    assert bool((cache.kind[:, 1][cache.frame[:, 1] == 2] == MERGED).all()), "what is compressed stays compressed"
    assert bool((cache.kind[:, 0][cache.frame[:, 0] == 0] == FULL).all())


class TwoLevels:
    """`two_levels` as a policy of streaming rollouts."""

    coarse_frames = staticmethod(lambda frames, sizes: [])

    def retain(self, view):
        answers = []
        for row in range(view.frame.shape[1]):
            numbers = sorted(set(view.frame[0, row, 0].tolist()) - {-1})
            sizes = [int((view.frame[0, row, 0] == number).sum()) for number in numbers]
            wanted = [COMPRESS] * (len(numbers) - 2) + [KEEP] * 2
            answers.append(dict(zip(numbers, granted(wanted, sizes, FRAME, view.budget), strict=True)))
        return regrouping(view, answers)


@pytest.mark.parametrize("kind", ["plain", "long"])
def test_an_episode_is_the_streaming_rollout_of_the_same_decisions(make, tiny_workload, tiny_hosts, kind):
    workload = replace(tiny_workload, host=tiny_hosts[kind])
    env = TokenRetentionEnv(workload, BUDGET, split="test", metrics=["ssim"])
    rewards, infos = play(env, two_levels)
    clip = workload.clips.clip("test", 1)
    (rollout,) = play_streaming(workload, [clip], [43], TwoLevels(), BUDGET)
    latents = torch.stack(env.episode._generated)
    assert torch.equal(latents, rollout.latents)
    assert [step for step, _ in env.episode.decisions] == [decision.step for decision in rollout.decisions]
    assert [kept for _, kept in env.episode.decisions] == [list(decision.full) for decision in rollout.decisions]
    frames = workload.host.autoencoder.decode(latents[None])
    (expected,) = clip_metrics(frames, torch.from_numpy(clip.frames[5:])[None], ["psnr", "ssim"])
    assert rewards[-1] == pytest.approx(expected["psnr"]) and set(rewards[:-1]) == {0.0}
    assert infos[-1]["ssim"] == pytest.approx(expected["ssim"])
    assert all(info["tokens"] > BUDGET for info in infos[:-1])


def test_telescoping_rewards_have_the_same_sum(make):
    at_the_end, _ = play(make(split="test"), two_levels)
    parts, _ = play(make(split="test", telescoping=True), two_levels)
    assert sum(parts) == pytest.approx(sum(at_the_end)) and len([part for part in parts if part]) > 3


def test_what_is_changed_is_counted_and_the_mask_says_what_may_be_chosen(make):
    env = make()
    observation, info = env.reset(options={"clip_id": 0})
    assert (info["tokens"], info["kept_frames"], info["step"]) == (80, [0, 1, 2, 3, 4], -1)
    assert env.action_masks().reshape(-1, 3)[-5:].tolist() == [[True, True, True]] * 4 + [[False, False, True]]
    assert env.action_masks().reshape(-1, 3)[:-5].tolist() == [[True, False, False]] * (len(observation["mask"]) - 5)
    observation, _, _, _, info = env.step(keep_all(observation, info))
    # Padding, and the oldest frame, which did not fit at all.
    assert info["repaired"] == len(observation["mask"]) - 5 + 1
    action = np.zeros(len(observation["mask"]), dtype=int)
    action[-5:] = [COMPRESS, COMPRESS, KEEP, KEEP, KEEP]
    assert info["kept_frames"] == [1, 2, 3, 4, 5]
    observation, _, _, _, info = env.step(action)
    assert info["repaired"] == 0 and info["kept_frames"] == [1, 2, 3, 4, 5, 6]
    assert observation["frames"][:, 6].tolist() == [0.0] * (len(action) - 6) + [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert env.action_masks().reshape(-1, 3)[-6:].tolist() == [[True, True, False]] * 2 + [[True, True, True]] * 3 + [
        [False, False, True]
    ]
    assert observation["frames"][:, 7].sum() == pytest.approx(1), "shares of attention"
    assert observation["budget"][2] == pytest.approx((4 * 16 + 8) / (16 * len(action)))


def test_episodes_are_determined_by_the_seed_and_options(make):
    env = make(budget=[48, 64])
    runs = [env.reset(seed=3) for _ in range(2)]
    for key, value in runs[0][0].items():
        assert np.array_equal(value, runs[1][0][key])
    assert runs[0][1]["token_budget"] == runs[1][1]["token_budget"]
    _, info = env.reset(options={"clip_id": 2, "noise_seed": 9, "budget": 48})
    assert (info["clip_id"], info["noise_seed"], info["token_budget"]) == (2, 9, 48)


def test_sb3_learns_in_it(make):
    from stable_baselines3 import PPO

    env = make(num_clips=2)
    model = PPO("MultiInputPolicy", env, n_steps=8, batch_size=8, n_epochs=1, seed=0, device="cpu")
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    model.learn(8)
    assert any(not torch.equal(before[key], value) for key, value in model.policy.state_dict().items())


class AnotherModel(Host):
    """No FAR."""

    name, latent_shape, frame_size = "another", (4, 8, 8), 64


def test_errors_are_sentences(make, tiny_workload):
    for budget, message in ((8, "hold the newest frame, which has 16 tokens"), (240, "leaves nothing to decide in tiny_pan")):
        with pytest.raises(ValueError, match=message):
            make(budget=budget)
    with pytest.raises(ValueError, match="a memory of tokens needs a FAR or FAR-Long host"):
        TokenRetentionEnv(replace(tiny_workload, host=AnotherModel(torch.device("cpu"), torch.float32)), budget=BUDGET)
    with pytest.raises(TypeError, match="takes no signals"):
        make(signals=["lat_cos"])
    with pytest.raises(ValueError, match="unknown render_mode 'human'"):
        make(render_mode="human")
    env = make(num_clips=1)
    with pytest.raises(gym.error.ResetNeeded, match="call reset"):
        env.step(np.zeros(17))
    _, _ = env.reset()
    with pytest.raises(ValueError, match="an action has shape"):
        env.step(np.zeros(3))
    with pytest.raises(ValueError, match="an action holds 0"):
        env.step(np.full(env.action_space.shape, 3))
    play(env, keep_all, clip_id=0)
    with pytest.raises(gym.error.ResetNeeded, match="the episode is over"):
        env.step(keep_all(env.episode.observe(), {}))


def test_pictures_have_one_size(make):
    env = make(render_mode="rgb_array")
    env.reset(options={"clip_id": 0})
    first = env.render()
    play(env, keep_all)
    assert first.shape == env.render().shape and first.dtype == np.uint8
