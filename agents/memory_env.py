"""The environment as an agent with memory sees it: each row's observation also holds what a `HistoryMemory` recalls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from agents.memory import HistoryMemory
from far_env.episodes import ROW_FEATURES


class MemoryVecEnv(VecEnvWrapper):
    """Appends the memory's columns to ``observation["frames"]``: (slots, 6) becomes (slots, 13), zero on padding.

    Args:
        venv: an `SB3VecEnv` or several joined, possibly monitored.
        total_steps: per row, the predicted frames of an episode.
    """

    def __init__(self, venv: VecEnv, total_steps: Sequence[int]) -> None:
        parts = dict(venv.observation_space.spaces)
        self.num_slots = parts["frames"].shape[0]
        self.total_steps = np.asarray(total_steps)
        width = len(ROW_FEATURES) + HistoryMemory.WIDTH
        # Logarithms of ages pass 1 after 50 frames.
        parts["frames"] = spaces.Box(0.0, 4.0, (self.num_slots, width), np.float32)
        super().__init__(venv, observation_space=spaces.Dict(parts))
        self.memories = [HistoryMemory() for _ in range(self.num_envs)]
        self._shown = [(0, 0)] * self.num_envs

    def reset(self) -> dict[str, np.ndarray]:
        """Begin all rows with empty memories."""
        self.memories = [HistoryMemory() for _ in range(self.num_envs)]
        return self._remember(self.venv.reset())

    def step_async(self, actions: np.ndarray) -> None:
        """Remember what stays, by the benchmark's rule, and pass the actions on."""
        for memory, action, (num_frames, max_frames) in zip(self.memories, actions, self._shown, strict=True):
            wanted = np.asarray(action[self.num_slots - num_frames :]) > 0
            wanted[-1] = True
            memory.keep(np.flatnonzero(wanted)[-max_frames:].tolist())
        self.venv.step_async(actions)

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """As the wrapped environment's; ended rows begin with an empty memory."""
        observations, rewards, dones, infos = self.venv.step_wait()
        for row in np.flatnonzero(dones):
            self.memories[row] = HistoryMemory()
            last = infos[row]["terminal_observation"]
            # Nothing is decided there, so nothing is recalled.
            padding = np.zeros((self.num_slots, HistoryMemory.WIDTH), dtype=np.float32)
            infos[row]["terminal_observation"] = {**last, "frames": np.concatenate([last["frames"], padding], axis=1)}
        return self._remember(observations), rewards, dones, infos

    def state_dict(self) -> list[dict[str, Any]]:
        """The memories as plain values."""
        return [dict(vars(memory)) for memory in self.memories]

    def load_state_dict(self, state: list[dict[str, Any]], observations: dict[str, np.ndarray]) -> None:
        """Restore memories saved by `state_dict`, which had just seen these observations."""
        for memory, own in zip(self.memories, state, strict=True):
            vars(memory).update(own)
        self._shown = self._counts(observations)

    def _counts(self, observations: dict[str, np.ndarray]) -> list[tuple[int, int]]:
        """Per row the frames in the history and the budget."""
        budgets = np.rint(observations["budget"][:, 0] * self.num_slots).astype(int)
        lengths = observations["mask"].sum(axis=1).astype(int)
        return list(zip(lengths.tolist(), budgets.tolist(), strict=True))

    def _remember(self, observations: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        self._shown = self._counts(observations)
        steps = np.rint(observations["budget"][:, 1] * self.total_steps).astype(int)
        recalled = np.zeros((self.num_envs, self.num_slots, HistoryMemory.WIDTH), dtype=np.float32)
        for row, (memory, (num_frames, _)) in enumerate(zip(self.memories, self._shown, strict=True)):
            looks = observations["frames"][row, self.num_slots - num_frames :, 2 : len(ROW_FEATURES)]
            recalled[row, self.num_slots - num_frames :] = memory.recall(looks, int(steps[row]))
        return {**observations, "frames": np.concatenate([observations["frames"], recalled], axis=2)}
