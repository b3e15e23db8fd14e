"""A retention problem without a video model, whose answer is known: the reward is the kept share of the drift on offer."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

SLOTS, BUDGET = 6, 3


class ToyRetentionEnv(gym.Env):
    """One decision per episode over six rows of random features; the best three are those with the largest drift."""

    observation_space = spaces.Dict(
        {
            "frames": spaces.Box(0, 1, (SLOTS, 6), np.float32),
            "mask": spaces.Box(0, 1, (SLOTS,), np.float32),
            "budget": spaces.Box(0, 1, (3,), np.float32),
        }
    )
    action_space = spaces.MultiBinary(SLOTS)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        frames = self.np_random.random((SLOTS, 6)).astype(np.float32)
        frames[:, 0] = np.arange(SLOTS - 1, -1, -1) / SLOTS
        self.drift = frames[:-1, 3].copy()
        budget = np.array([BUDGET / SLOTS, 0, 1], dtype=np.float32)
        return {"frames": frames, "mask": np.ones(SLOTS, dtype=np.float32), "budget": budget}, {}

    def step(self, action):
        kept = np.flatnonzero(np.append(action[:-1], 1))[-BUDGET:]
        best = np.sort(self.drift)[-(BUDGET - 1) :].sum()
        reward = float(self.drift[kept[:-1]].sum() / best)
        return self.reset()[0], reward, True, False, {}

    def action_masks(self):
        pairs = np.ones((SLOTS, 2), dtype=bool)
        pairs[-1, 0] = False
        return pairs.reshape(-1)

    @staticmethod
    def mean_reward(policy, episodes: int = 500) -> float:
        env = ToyRetentionEnv()
        total = 0.0
        for seed in range(episodes):
            obs, _ = env.reset(seed=seed)
            action, _ = policy.predict(obs, deterministic=True, action_masks=env.action_masks())
            total += env.step(action)[1]
        return total / episodes


class ToyVecEnv(DummyVecEnv):
    """SB3's loop over toy environments."""

    def __init__(self, num_envs: int, seed: int) -> None:
        super().__init__([ToyRetentionEnv for _ in range(num_envs)])
        self.seed(seed)
