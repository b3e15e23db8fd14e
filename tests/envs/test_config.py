"""The configuration of episodes: what is refused names the field and the value, and both environments share it."""

from __future__ import annotations

import dataclasses

import gymnasium as gym
import numpy as np
import pytest

import far_env  # noqa: F401  (registers the ids)
from far_env.envs.config import EpisodeConfig
from far_env.envs.retention_env import FrameRetentionEnv
from far_env.envs.vector_env import FrameRetentionVectorEnv


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workload": 3}, "workload must be a registered name or a Workload, got 3"),
        ({"budget": 0}, "budget must be at least 1 frame, got 0"),
        ({"budget": None}, "budget must be a number of frames, a budget name or a list of these, got None"),
        ({"budget": [4, None]}, r"a list of these, got \[4, None\]"),
        ({"budget": []}, "a budget is needed"),
        ({"reward": "fvd"}, "unknown metric 'fvd'"),
        ({"reward": {}}, "a reward needs at least one of the metrics"),
        ({"reward": 3}, "reward must be a metric's name or a dict of weights, got 3"),
        ({"reward": {"psnr": "much"}}, "reward: the weight of psnr must be a finite number, got 'much'"),
        ({"reward": {"psnr": float("nan")}}, "reward: the weight of psnr must be a finite number, got nan"),
        ({"telescoping": "yes"}, "telescoping must be true or false, got 'yes'"),
        ({"metrics": "psnr"}, "metrics must be a list of names, got 'psnr'"),
        ({"metrics": ["fvd"]}, "unknown metric 'fvd'"),
        ({"num_clips": 2.5}, "num_clips must be a whole number or None, got 2.5"),
        ({"precision": "half"}, "unknown precision 'half'; use auto, float32 or bfloat16"),
        ({"memo_bytes": -1}, "memo_bytes must be a whole number of at least 0, got -1"),
        ({"signals": "attn_mass"}, "signals must be a list of names, got 'attn_mass'"),
        ({"signals": ["attn_mas"]}, "unknown signal 'attn_mas'; did you mean 'attn_mass'"),
        ({"feedback": "ture"}, "unknown feedback 'ture'; did you mean 'true'"),
        ({"clip_options": {"host": "embedded"}}, "clip_options has 'host', which is no option of a clip source"),
        ({"clip_options": "data"}, "clip_options must be a mapping of names to values, got 'data'"),
    ],
)
def test_bad_values_are_refused_before_anything_is_loaded(arguments, message, monkeypatch):
    monkeypatch.setattr("far_env.envs.config.make_workload", lambda *args, **options: pytest.fail("loads a host"))
    with pytest.raises(ValueError, match=message):
        EpisodeConfig(**arguments)
    for env_class in (FrameRetentionEnv, FrameRetentionVectorEnv):
        with pytest.raises(ValueError, match=message):
            env_class(**arguments)


def test_unknown_arguments_are_refused_with_the_nearest_name():
    for make in (FrameRetentionEnv, FrameRetentionVectorEnv, lambda **options: gym.make("far_env/Pan-v0", **options)):
        with pytest.raises(TypeError, match="unknown argument 'num_clip'; did you mean 'num_clips'"):
            make(num_clip=3)
    with pytest.raises(TypeError, match="unknown argument 'relative_to'"):
        FrameRetentionEnv(relative_to="recent_fill")


def test_it_is_frozen_and_the_same_for_both_environments(tiny_workload):
    arguments = {"budget": [8, 4], "reward": {"psnr": 0.5}, "telescoping": True, "num_clips": 3, "metrics": ("ssim",)}
    single, vector = FrameRetentionEnv(tiny_workload, **arguments), FrameRetentionVectorEnv(2, tiny_workload, **arguments)
    assert single.config == vector.config == EpisodeConfig(tiny_workload, **arguments)
    assert single.config.budgets == (4, 8) and single.config.scoring.weights == {"psnr": 0.5}
    with pytest.raises(dataclasses.FrozenInstanceError):
        single.config.budget = 2


def test_draws_are_the_given_values_or_random_ones_with_the_benchmarks_seed(tiny_workload):
    config = EpisodeConfig(tiny_workload, budget=(2, 4), num_clips=5)
    assert config.draw(np.random.default_rng(0), tiny_workload, clip_id=3, noise_seed=9, budget=4) == (3, 9, 4)
    drawn = [config.draw(np.random.default_rng(seed), tiny_workload) for seed in range(50)]
    assert {clip for clip, _, _ in drawn} == set(range(5)) and {budget for _, _, budget in drawn} == {2, 4}
    assert all(seed == 42 + clip for clip, seed, _ in drawn)
    with pytest.raises(ValueError, match="budget 8 is none of those that the environment was made with: 2, 4"):
        config.draw(np.random.default_rng(0), tiny_workload, budget=8)
