"""The Gymnasium environments: conventions, determinism, autoreset, and the two forms agreeing."""

from __future__ import annotations

import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit

import far_env  # noqa: F401  (registers the ids)
from far_env import baselines
from far_env.agents.policies import PolicyAgent
from far_env.envs.retention_env import FrameRetentionEnv
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.errors import PolicyError
from far_env.host import weights
from far_env.rollout.play import play


@pytest.fixture
def make(tiny_workload):
    return lambda **options: FrameRetentionEnv(tiny_workload, **options)


@pytest.fixture
def make_vector(tiny_workload):
    return lambda n, **options: FrameRetentionVectorEnv(n, tiny_workload, **options)


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


def test_rows_equal_single_environments_with_the_same_seeds(make, make_vector):
    # keeping different numbers of frames makes rows reach their decisions at different steps
    vector = make_vector(3, autoreset_mode="DISABLED")
    singles = [make() for _ in range(3)]
    observations, infos = vector.reset(seed=7)
    for row, env in enumerate(singles):
        obs, info = env.reset(seed=7 + row)
        assert infos["clip_id"][row] == info["clip_id"]
        for key in obs:
            np.testing.assert_allclose(observations[key][row], obs[key], atol=1e-5)
    rng = np.random.default_rng(0)
    alive = np.ones(3, dtype=bool)
    while alive.all():
        actions = rng.integers(0, 2, (3, 6))
        observations, rewards, terminations, _, infos = vector.step(actions)
        for row, env in enumerate(singles):
            obs, reward, terminated, _, info = env.step(actions[row])
            for key in obs:
                np.testing.assert_allclose(observations[key][row], obs[key], atol=1e-5)
            assert rewards[row] == pytest.approx(reward, abs=1e-4) and terminations[row] == terminated
            assert infos["kept_frames"][row] == info["kept_frames"] and infos["repaired"][row] == info["repaired"]
        alive = ~terminations
    assert rewards.max() > 0


KEEP_ALL = np.ones((2, 6), dtype=np.int8)


def run_two_episodes(env, steps):
    """Terminations and reset observations' steps over the given number of vector steps; budget 4 has ten decisions."""
    env.reset(seed=0)
    ended, reset_steps, rewarded, clip_ids = [], [], [], []
    for _ in range(steps):
        _, rewards, terminations, truncations, infos = env.step(KEEP_ALL)
        assert not truncations.any()
        ended.append(terminations[0])
        rewarded.append(rewards[0] != 0)
        reset_steps.append(int(infos["step"][0]))
        clip_ids.append(int(infos["clip_id"][0]))
    return ended, reset_steps, rewarded, clip_ids


def test_next_step_autoreset_over_two_episodes(make_vector):
    env = make_vector(2)
    assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    ended, steps, rewarded, clips = run_two_episodes(env, 21)
    assert ended == [False] * 9 + [True] + [False] * 10 + [True]
    assert rewarded == ended
    assert steps == [*range(1, 11), 0, *range(1, 11)]
    assert len(set(clips[:10])) == len(set(clips[10:])) == 1 and clips[0] != clips[10]


def test_same_step_autoreset_over_two_episodes(make_vector):
    env = make_vector(2, autoreset_mode=AutoresetMode.SAME_STEP)
    assert env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
    ended, steps, rewarded, clips = run_two_episodes(env, 20)
    assert ended == ([False] * 9 + [True]) * 2
    assert rewarded == ended
    assert steps == [*range(1, 10), 0, *range(1, 10), 0]
    assert len(set(clips[:9])) == 1 and clips[9] == clips[10] != clips[0]


def test_same_step_autoreset_returns_the_last_observation(make, make_vector):
    env, single = make_vector(2, autoreset_mode="same_step"), make()
    env.reset(seed=0)
    single.reset(seed=0)
    for _ in range(10):
        observations, _, _, _, infos = env.step(KEEP_ALL)
        last, _, _, _, info = single.step(KEEP_ALL[0])
    for key in last:
        np.testing.assert_allclose(infos["final_obs"][0][key], last[key], atol=1e-5)
        assert np.abs(observations["budget"][0] - last["budget"]).max() > 0.1
    assert infos["final_info"]["psnr"][0] == pytest.approx(info["psnr"], abs=1e-3)
    assert infos["_final_info"].tolist() == [True, True]


def test_disabled_autoreset_waits_for_a_reset_mask(make_vector):
    env = make_vector(2, autoreset_mode=AutoresetMode.DISABLED)
    env.reset(seed=0)
    keep_two = np.array([[1] * 6, [0] * 5 + [1]])
    ended = []
    while not (ended and ended[-1].any()):
        ended.append(env.step(keep_two)[2])
    first = ended[-1]
    assert first.tolist() == [False, True], "keeping one frame leaves fewer decisions"
    with pytest.raises(gym.error.ResetNeeded, match=r"rows \[1\] have ended"):
        env.step(KEEP_ALL)
    with pytest.raises(ValueError, match="reset_mask must be a bool array"):
        env.reset(options={"reset_mask": np.array([1, 0])})
    observations, infos = env.reset(options={"reset_mask": first, "clip_id": 9})
    assert infos["_clip_id"].tolist() == [True, True] and infos["clip_id"][1] == 9 != infos["clip_id"][0]
    assert infos["step"].tolist()[1] == 0 and observations["budget"][1, 1] == 0
    env.step(KEEP_ALL)


def test_a_partial_reset_leaves_the_other_rows_and_their_seeds_alone(make_vector):
    resumed, untouched = (make_vector(2, autoreset_mode="DISABLED") for _ in range(2))
    for env in (resumed, untouched):
        env.reset(seed=0)
    before, _ = resumed.reset(seed=5, options={"reset_mask": np.array([True, False])})
    after, _ = untouched.reset(options={"reset_mask": np.array([True, False])})
    for key in before:
        np.testing.assert_array_equal(before[key][1], after[key][1])
    ids = [env.reset(options={"reset_mask": np.array([False, True])})[1]["clip_id"][1] for env in (resumed, untouched)]
    assert ids[0] == ids[1]


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_stepping_before_a_reset_is_refused(make_vector, mode):
    env = make_vector(2, autoreset_mode=mode)
    with pytest.raises(gym.error.ResetNeeded, match="call reset"):
        env.step(KEEP_ALL)
    env.reset(options={"reset_mask": np.array([True, False])})
    with pytest.raises(gym.error.ResetNeeded, match="call reset"):
        env.step(KEEP_ALL)


FEW = np.array([[0, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 1]])
"""Row 0 keeps one frame and decides again four frames later (at steps 0, 4 and 8); row 1 decides after every frame."""


@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP"])
def test_rows_that_end_at_different_times_do_not_affect_one_another(make, make_vector, mode):
    vector = make_vector(2, autoreset_mode=mode)
    singles = [make() for _ in range(2)]
    observations, _ = vector.reset(seed=3)
    for row, env in enumerate(singles):
        env.reset(seed=3 + row)
    over, ended, numbers = [False, False], [[], []], [[], []]
    for _ in range(12):
        observations, rewards, terminations, _, infos = vector.step(FEW)
        for row, env in enumerate(singles):
            if over[row] and mode == "NEXT_STEP":
                obs, info = env.reset()
                reward, terminated = 0.0, False
            else:
                obs, reward, terminated, _, info = env.step(FEW[row])
            if terminated and mode == "SAME_STEP":
                np.testing.assert_allclose(infos["final_obs"][row]["frames"], obs["frames"], atol=1e-5)
                assert infos["final_info"]["psnr"][row] == pytest.approx(info["psnr"], abs=1e-3)
                obs, info = env.reset()
            over[row] = terminated
            assert terminations[row] == terminated and rewards[row] == pytest.approx(reward, abs=1e-3)
            for key in obs:
                np.testing.assert_allclose(observations[key][row], obs[key], atol=1e-5)
            assert infos["kept_frames"][row] == info["kept_frames"] and infos["clip_id"][row] == info["clip_id"]
            np.testing.assert_array_equal(infos["action_mask"][row], info["action_mask"])
            ended[row].append(bool(terminated))
            numbers[row].append(int(infos["step"][row]))
    if mode == "NEXT_STEP":
        assert ended[0] == [False, False, True, False] * 3
        assert numbers[0] == [4, 8, 10, 0] * 3
        assert ended[1] == [False] * 9 + [True] + [False] * 2
        assert numbers[1] == [*range(1, 11), 0, 1]
    else:
        assert ended[0] == [False, False, True] * 4
        assert numbers[0] == [4, 8, 0] * 4
        assert ended[1] == [False] * 9 + [True] + [False] * 2
        assert numbers[1] == [*range(1, 10), 0, 1, 2]


@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP", "DISABLED"])
def test_a_vector_environment_is_truncated_as_time_limit_truncates_single_ones(make, make_vector, mode):
    vector = make_vector(2, autoreset_mode=mode, max_episode_steps=3)
    singles = SyncVectorEnv([lambda: TimeLimit(make(), 3)] * 2, autoreset_mode=AutoresetMode[mode])
    for env in (vector, singles):
        env.reset(seed=3)
    truncated = []
    for _ in range(9):
        if mode == "DISABLED" and truncated and truncated[-1].any():
            for env in (vector, singles):
                env.reset(options={"reset_mask": truncated[-1].copy()})
        results = [env.step(FEW) for env in (vector, singles)]
        for value, other in zip(results[0][1:4], results[1][1:4], strict=True):
            np.testing.assert_allclose(value, other, atol=1e-3)
        for key, value in results[0][0].items():
            np.testing.assert_allclose(value, results[1][0][key], atol=1e-5)
        np.testing.assert_array_equal(results[0][4]["clip_id"], results[1][4]["clip_id"])
        truncated.append(results[0][3])
    # Row 0 also terminates in its third step, row 1 is in the middle of its episode.
    third, none = [True, True], [False, False]
    expected = [none, none, third, none] * 2 + [none] if mode == "NEXT_STEP" else [none, none, third] * 3
    assert [row.tolist() for row in truncated] == expected


def test_the_length_of_episodes_is_an_argument_of_make_vec_and_none_by_default(tiny_host_folder):
    options = {"num_envs": 2, "host": str(tiny_host_folder), "device": "cpu"}
    assert gym.make_vec("far_env/Pan-v0", **options).unwrapped.max_episode_steps is None
    assert gym.make_vec("far_env/Pan-v0", max_episode_steps=-1, **options).unwrapped.max_episode_steps is None
    for mode in ("vector_entry_point", "sync"):
        env = gym.make_vec("far_env/Pan-v0", max_episode_steps=2, vectorization_mode=mode, **options)
        env.reset(seed=0)
        truncations = [env.step(np.ones((2, 6), dtype=np.int8))[3].tolist() for _ in range(3)]
        assert truncations == [[False] * 2, [True] * 2, [False] * 2]
    with pytest.raises(ValueError, match="max_episode_steps must be a whole number of at least 1, or None, got 0"):
        gym.make_vec("far_env/Pan-v0", max_episode_steps=0, **options)


def test_sb3_learns_that_a_row_was_truncated(make_vector):
    from far_env.envs.sb3 import SB3VecEnv

    env = SB3VecEnv(make_vector(2, autoreset_mode="SAME_STEP", max_episode_steps=3))
    env.reset()
    for _ in range(3):
        _, _, dones, infos = env.step(FEW)
    assert dones.tolist() == [True, True], "row 0 terminates in its third step"
    assert [info["TimeLimit.truncated"] for info in infos] == [False, True]
    assert all("terminal_observation" in info for info in infos)


def test_a_resumed_vector_environment_is_truncated_when_it_would_have_been(make_vector):
    first, second = (make_vector(1, max_episode_steps=4) for _ in range(2))
    first.reset(seed=0)
    first.step(KEEP_ALL[:1])
    second.load_state_dict(first.state_dict())
    assert [second.step(KEEP_ALL[:1])[3].tolist() for _ in range(3)] == [[False], [False], [True]]


def test_vector_options_take_one_value_or_one_per_row(make_vector):
    env = make_vector(2)
    assert env.reset(options={"clip_id": 5})[1]["clip_id"].tolist() == [5, 5]
    infos = env.reset(options={"clip_id": [5, 6], "noise_seed": [1, 2]})[1]
    assert infos["clip_id"].tolist() == [5, 6] and infos["noise_seed"].tolist() == [1, 2]
    with pytest.raises(ValueError, match="one per row: 2, got 3"):
        env.reset(seed=[1, 2, 3])
    with pytest.raises(ValueError, match="unknown autoreset_mode 'never'"):
        make_vector(2, autoreset_mode="never")
    with pytest.raises(ValueError, match="num_envs must be at least 1"):
        make_vector(0)


def test_sb3_adapter_keeps_sb3s_conventions(make_vector, tiny_workload):
    from far_env.envs.sb3 import SB3VecEnv

    with pytest.raises(ValueError, match="SAME_STEP"):
        SB3VecEnv(make_vector(2))
    env = SB3VecEnv(make_vector(2, autoreset_mode="SAME_STEP"))
    env.seed(3)
    first = env.reset()
    env.seed(3)
    again = env.reset()
    for key in first:
        np.testing.assert_array_equal(first[key], again[key])
    env.set_options({"clip_id": 4})
    env.reset()
    assert [info["clip_id"] for info in env.reset_infos] == [4, 4]
    env.set_options([{}, {"clip_id": 7}])
    env.reset()
    assert env.reset_infos[1]["clip_id"] == 7
    env.set_options({"clip_id": 4})
    env.reset()
    for _ in range(10):
        obs, rewards, dones, infos = env.step(KEEP_ALL)
    assert rewards.dtype == np.float32 and dones.tolist() == [True, True]
    assert set(infos[0]["terminal_observation"]) == set(obs)
    assert infos[0]["TimeLimit.truncated"] is False and infos[0]["psnr"] == pytest.approx(rewards[0], abs=1e-4)
    masks = env.env_method("action_masks")
    assert len(masks) == 2 and masks[0].shape == (12,)
    assert len(env.env_method("action_masks", indices=[1])) == 1
    assert env.env_is_wrapped(gym.Wrapper, indices=1) == [False]
    assert env.has_attr("action_masks") and not env.has_attr("no_such_thing")


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
