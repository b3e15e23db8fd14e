"""The single environment: conventions, determinism, options, errors, and fixed agents in both forms."""

from __future__ import annotations

import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import far_env  # noqa: F401  (registers the ids)
from far_env import baselines
from far_env.agents.policies import PolicyAgent
from far_env.envs.retention_env import FrameRetentionEnv
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.errors import PolicyError
from far_env.host import weights
from far_env.rollout.play import play


def test_gymnasiums_checker_passes(make):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*not having a spec.*")
        check_env(make(render_mode="rgb_array"))


def test_sb3s_checker_passes(make):
    from stable_baselines3.common.env_checker import check_env as sb3_check_env

    sb3_check_env(make())


@pytest.mark.parametrize("name", ["Pan", "Cuts"])
def test_registered_ids_make_single_and_vector_environments(name, tiny_host_folder):
    options = {"budget": 8, "host": str(tiny_host_folder), "device": "cpu"}
    env = gym.make(f"far_env/{name}-v0", **options)
    assert env.unwrapped.episodes.workload.name == name.lower()
    assert json.loads(env.spec.to_json())["kwargs"]["budget"] == 8
    obs, _ = env.reset(seed=1)
    assert obs["frames"].shape == (9, 6)
    vector = gym.make_vec(f"far_env/{name}-v0", num_envs=3, vectorization_mode="vector_entry_point", **options)
    assert isinstance(vector.unwrapped, FrameRetentionVectorEnv)
    assert vector.reset(seed=1)[0]["frames"].shape == (3, 9, 6)


def test_the_ids_of_the_real_data_ask_for_it(monkeypatch):
    sources = {
        "ucf101": ("UCF101Short", "UCF101C4P12"),
        "dmlab": ("DMLabLong", "DMLabC144P156", "DMLabC36P264"),
        "bair": ("BAIRC2P14", "BAIRC2P28"),
        "minecraft": ("MinecraftC144P156", "MinecraftC36P264"),
    }
    for name, data in ((name, data) for data, names in sources.items() for name in names):
        monkeypatch.delenv(f"{data.upper()}_DATA_DIR", raising=False)
        with pytest.raises(ValueError, match=f"{data} needs a folder of videos"):
            gym.make(f"far_env/{name}-v0")


def test_precision_and_memo_are_options(tiny_host_folder, make):
    half = FrameRetentionEnv("pan", host=str(tiny_host_folder), device="cpu", precision="bfloat16")
    assert half.episodes.workload.host.dtype == torch.bfloat16
    rewards = []
    for env in (half, make(), make(memo_bytes=2**20)):
        for _ in range(2):
            env.reset(options={"clip_id": 3})
            done = False
            while not done:
                _, reward, done, _, _ = env.step(np.ones(env.action_space.n, dtype=np.int8))
            rewards.append(reward)
    assert env.episodes.memo.statistics.hits == 23, "the context, eleven frames and their pixels, the second time"
    np.testing.assert_allclose(rewards[2:], rewards[2], atol=1e-3)
    np.testing.assert_allclose(rewards[:2], rewards[2], atol=0.3)


@pytest.mark.parametrize("disturbance", ["autocast", "default_dtype", "default_device"])
def test_neither_autocast_nor_torchs_defaults_change_an_episode(tiny_host_folder, disturbance):
    """In the process that loads the host too, whose weights would be on another device or of another dtype."""

    def episode():
        weights._load_host.cache_clear()
        env = FrameRetentionEnv("pan", host=str(tiny_host_folder), device="cpu", signals=("lat_cos", "attn_mass", "key_proto"))
        return play_out(env, 5, lambda t: np.array([1, 0, 1, 1, 0, 1]))

    expected = episode()
    try:
        if disturbance == "default_dtype":
            torch.set_default_dtype(torch.float64)
        if disturbance == "default_device":
            torch.set_default_device("meta")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=disturbance == "autocast"):
            disturbed = episode()
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)
    for (obs, reward, _), (other, other_reward, _) in zip(expected, disturbed, strict=True):
        for key, value in obs.items():
            assert other[key].dtype == np.float32
            np.testing.assert_array_equal(other[key], value)
        assert other_reward == reward


def play_out(env, seed, act):
    obs, info = env.reset(seed=seed)
    record = [(obs, 0.0, info)]
    done = False
    while not done:
        obs, reward, done, truncated, info = env.step(act(len(record)))
        assert truncated is False and type(done) is bool and type(reward) is float
        record.append((obs, reward, info))
    return record


def test_same_seed_same_episode(make):
    actions = np.random.default_rng(0).integers(0, 2, (12, 6))
    first, second = (play_out(make(), 3, lambda t: actions[t]) for _ in range(2))
    other = play_out(make(), 4, lambda t: actions[t])
    assert len(first) == len(second)
    for (obs_a, reward_a, info_a), (obs_b, reward_b, info_b) in zip(first, second, strict=True):
        for key in obs_a:
            np.testing.assert_array_equal(obs_a[key], obs_b[key])
            assert obs_a[key].dtype == np.float32 and obs_a[key] is not obs_b[key]
        assert reward_a == reward_b and info_a["kept_frames"] == info_b["kept_frames"]
    assert first[-1][1] == first[-1][2]["psnr"] != other[-1][2]["psnr"]


def test_reset_options_choose_clip_and_noise(make):
    env = make(split="validation")
    _, info = env.reset(options={"clip_id": 11})
    assert (info["clip_id"], info["noise_seed"]) == (11, 53)
    _, info = env.reset(options={"clip_id": 11, "noise_seed": 5})
    assert (info["clip_id"], info["noise_seed"]) == (11, 5)
    with pytest.raises(IndexError, match="clip id 4096 is out of range: pan/validation has clips 0 to 4095"):
        env.reset(options={"clip_id": 4096})
    with pytest.raises(ValueError, match="unknown reset option 'clip'"):
        env.reset(options={"clip": 1})


def test_num_clips_limits_what_reset_draws(make):
    env = make(num_clips=3)
    assert {env.reset(seed=seed)[1]["clip_id"] for seed in range(20)} == {0, 1, 2}


def test_info_contains_masks_kept_frames_and_repairs(make):
    env = make()
    obs, info = env.reset(seed=0)
    assert obs["mask"].sum() == 6
    np.testing.assert_array_equal(info["action_mask"], [2, 2, 2, 2, 2, 1])
    assert info["kept_frames"] == [0, 1, 2, 3, 4, 5] and info["step"] == 0
    pairs = env.action_masks().reshape(6, 2)
    np.testing.assert_array_equal(pairs, [[True, True]] * 5 + [[False, True]])
    _, _, _, _, info = env.step(np.array([1, 1, 1, 1, 1, 0]))
    assert info["kept_frames"] == [2, 3, 4, 5, 6] and info["repaired"] == 3  # two too old, the newest unmarked
    _, _, _, _, info = env.step(np.array([0, 0, 0, 0, 1, 1]))
    # only two frames were kept: the budget is exceeded again three frames later
    assert info["kept_frames"] == [5, 6, 7, 8, 9] and info["repaired"] == 0
    np.testing.assert_array_equal(info["action_mask"], [0, 2, 2, 2, 2, 1])
    np.testing.assert_array_equal(env.action_masks().reshape(6, 2)[0], [True, False])


def test_misuse_is_an_error_that_names_the_mistake(make, tiny_host_folder):
    env = make()
    with pytest.raises(gym.error.ResetNeeded):
        env.step(np.ones(6))
    play_out(env, 0, lambda t: np.ones(6, dtype=int))
    with pytest.raises(gym.error.ResetNeeded, match="the episode is over"):
        env.step(np.ones(6))
    env.reset()
    with pytest.raises(ValueError, match=r"shape \(6,\), got \(5,\)"):
        env.step(np.ones(5))
    for options, message in [
        ({"budget": 0}, "at least 1 frame, got 0"),
        ({"budget": "tigth_history_budget"}, "did you mean 'tight_history_budget'"),
        ({"budget": "full_history_budget"}, "leaves nothing to decide"),
        ({"split": "dev"}, "unknown split 'dev'"),
        ({"budget": 4.7}, "whole number of frames, got 4.7"),
        ({"num_clips": 0}, "num_clips must be in 1 to 1000000"),
        ({"render_mode": "human"}, "unknown render_mode 'human'"),
        ({"reward": "fvd"}, "unknown metric 'fvd'"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**options)
    with pytest.raises(ValueError, match="did you mean 'pan'"):
        FrameRetentionEnv("pam", host=str(tiny_host_folder))


def of_frame_meta(name):
    """A baseline that reads no more than the environment shows."""
    return baselines.make(name, **({"tier": "M"} if "tier" in baselines.info(name).parameters else {}))


def test_agents_that_need_signals_are_refused_by_the_environment(make):
    env = make(split="test")
    obs, info = env.reset(options={"clip_id": 2})
    with pytest.raises(PolicyError, match="context_match needs lat_cos, which this rollout does not provide"):
        PolicyAgent(baselines.make("context_match")).predict(obs, info)
    # what can do without them does
    for name in ("packforcing", "flowcache_paper", "deep_forcing"):
        chosen = PolicyAgent(baselines.make(name)).predict(obs, info)
        np.testing.assert_array_equal(chosen, PolicyAgent(of_frame_meta(name)).predict(obs, info))


@torch.no_grad()
def test_fixed_agents_play_in_the_environment_as_in_the_evaluation(make, make_vector, tiny_workload):
    names = ("recent_window", "causalcache_vdm", "flowcache", "random", "least_change_next", "packcache_paper", "random_mid")
    for name in (*names, "deep_forcing"):
        policy = of_frame_meta(name)
        env = make(split="test")
        agent = PolicyAgent(policy)
        obs, info = env.reset(options={"clip_id": 2})
        done = False
        while not done:
            obs, _, done, _, info = env.step(agent.predict(obs, info))
        rollouts, decisions = play(tiny_workload, [tiny_workload.clips.clip("test", 2)], [44], policy, 4)
        torch.testing.assert_close(env.episodes.rollouts.generated([0]), rollouts.generated([0]), atol=1e-4, rtol=0)
        vector, agent = make_vector(2, split="test", autoreset_mode="DISABLED"), PolicyAgent(policy)
        obs, infos = vector.reset(options={"clip_id": [5, 2]})
        ended = np.zeros(2, dtype=bool)
        while not ended[1]:
            obs, _, ended, _, infos = vector.step(agent.predict(obs, infos))
            if ended[0] and not ended[1]:
                obs, infos = vector.reset(options={"reset_mask": np.array([True, False]), "clip_id": 5})
        torch.testing.assert_close(vector.episodes.rollouts.generated([1]), rollouts.generated([0]), atol=1e-4, rtol=0)
        assert decisions[0]
