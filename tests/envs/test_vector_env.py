"""The vector environment: rows equal single environments, autoreset, truncation, resuming and the adapter to SB3."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import TimeLimit

import far_env  # noqa: F401  (registers the ids)


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


def one_row_at_a_time(make, make_vector, mode, choose, **options):
    """Rows decide by themselves, in an order that ``choose`` gives; compare each with a single environment."""
    vector, singles = make_vector(3, autoreset_mode=mode, **options), [make(**options) for _ in range(3)]
    observations, infos = vector.reset(seed=2)
    seen = [env.reset(seed=2 + row)[0] for row, env in enumerate(singles)]
    rng, over, steps = np.random.default_rng(0), [False] * 3, [0] * 3
    for number in range(24):
        deciding = choose(number)
        actions = rng.integers(0, 2, (3, 6))
        observations, rewards, terminations, truncations, infos = vector.step(actions, rows=deciding)
        for row, env in enumerate(singles):
            reward, terminated = 0.0, False
            if row in deciding and over[row]:
                (seen[row], _), over[row] = env.reset(), False
            elif row in deciding:
                seen[row], reward, terminated, _, info = env.step(actions[row])
                steps[row] += 1
                over[row] = terminated and mode == "NEXT_STEP"
                assert mode == "SAME_STEP" or infos["repaired"][row] == info["repaired"]
                if terminated and mode == "SAME_STEP":
                    np.testing.assert_allclose(infos["final_obs"][row]["frames"], seen[row]["frames"], atol=1e-5)
                    assert infos["final_info"]["psnr"][row] == pytest.approx(info["psnr"], abs=1e-3)
                    seen[row], _ = env.reset()
            assert rewards[row] == pytest.approx(reward, abs=1e-3) and terminations[row] == terminated
            assert not truncations[row]
            for key, value in seen[row].items():
                np.testing.assert_allclose(observations[key][row], value, atol=1e-5)
    return steps


@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP"])
def test_rows_that_decide_by_themselves_are_single_environments(make, make_vector, mode):
    order = np.random.default_rng(1)

    def some(number):
        return np.flatnonzero(order.random(3) < (0.9, 0.5, 0.3)).tolist()

    steps = one_row_at_a_time(make, make_vector, mode, some)
    assert steps[0] > steps[1] > steps[2] > 0, "they are at different decisions"
    one_row_at_a_time(make, make_vector, mode, lambda number: range(3))


def test_a_row_that_ended_waits_for_its_reset_while_others_decide_without_autoreset(make_vector):
    env = make_vector(2, autoreset_mode="DISABLED", max_episode_steps=2)
    env.reset(seed=0)
    actions = np.ones((2, 6), dtype=np.int8)
    assert [env.step(actions, rows=[0])[3].tolist() for _ in range(2)] == [[False, False], [True, False]]
    with pytest.raises(gym.error.ResetNeeded, match=r"rows \[0\] have ended"):
        env.step(actions, rows=[1])
    env.reset(options={"reset_mask": np.array([True, False])})
    assert [env.step(actions, rows=[1])[3].tolist() for _ in range(2)] == [[False, False], [False, True]]
    assert env.state_dict()["elapsed_steps"] == [0, 2]
