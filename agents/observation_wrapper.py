"""The environment with an agent's observations: each row also contains what a `HistoryMemory` recalls, and signals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from far_env.agents import observation_spec
from far_env.agents.memory import HistoryMemory
from far_env.contract import newest_within_budget
from far_env.envs.episodes import ROW_FEATURES


class AgentVecEnv(VecEnvWrapper):
    """Appends columns to ``observation["frames"]``, (slots, 6), all zero on padding: those of memory, then those of signals.

    Args:
        venv: an `SB3VecEnv` or several joined, possibly monitored.
        total_steps: per environment, the predicted frames of an episode.
        spec: what the agent's observations contain; its signals are some of the environment's.
    """

    def __init__(self, venv: VecEnv, total_steps: Sequence[int], spec: observation_spec.ObservationSpec) -> None:
        parts = dict(venv.observation_space.spaces)
        self.num_slots = parts["frames"].shape[0]
        self.total_steps = np.asarray(total_steps)
        self.spec = spec
        shapes = {name: parts.pop(name).shape for name in spec.signals}
        # Logarithms of ages pass 1 after 50 frames; cosines are not below -1.
        low = np.zeros((self.num_slots, spec.num_row_columns), dtype=np.float32)
        low_signals = np.full((self.num_slots, observation_spec.num_columns(shapes)), -1.0, dtype=np.float32)
        low = np.concatenate([low, low_signals], axis=1)
        high = np.full_like(low, 4.0)
        if spec.path:  # distances along the path are unbounded
            path = slice(spec.num_row_columns - HistoryMemory.PATH_WIDTH, spec.num_row_columns)
            low[:, path], high[:, path] = -np.inf, np.inf
        parts["frames"] = spaces.Box(low, high, dtype=np.float32)
        super().__init__(venv, observation_space=spaces.Dict(parts))
        self.memories: list[HistoryMemory] = [spec.new_memory() for _ in range(self.num_envs)] if spec.memory else []
        self._counts = [(0, 0)] * self.num_envs

    def reset(self) -> dict[str, np.ndarray]:
        """Begin all episodes with empty memories."""
        self.memories = [self.spec.new_memory() for _ in self.memories]
        observations = self.venv.reset()
        return self._with_columns(observations, self._recall(observations))

    def step_async(self, actions: np.ndarray) -> None:
        """Record in the memories which frames stay, and pass the actions on."""
        for row, memory in enumerate(self.memories):
            num_frames, max_frames = self._counts[row]
            wanted = np.asarray(actions[row][self.num_slots - num_frames :]) > 0
            memory.keep(np.flatnonzero(newest_within_budget(wanted, max_frames)).tolist())
        self.venv.step_async(actions)

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """The wrapped environment's results; after an episode's end the next one begins with an empty memory."""
        observations, rewards, dones, infos = self.venv.step_wait()
        for row in np.flatnonzero(dones):
            if self.memories:
                self.memories[row] = self.spec.new_memory()
            last = {key: value[None] for key, value in infos[row]["terminal_observation"].items()}
            # Nothing is decided about the last observation, so the memory is not asked.
            last = self._with_columns(last, np.zeros((1, self.num_slots, self.spec.num_memory_columns), dtype=np.float32))
            infos[row]["terminal_observation"] = {key: value[0] for key, value in last.items()}
        return self._with_columns(observations, self._recall(observations)), rewards, dones, infos

    def state_dict(self) -> list[dict[str, Any]]:
        """The memories as plain values."""
        return [dict(vars(memory)) for memory in self.memories]

    def load_state_dict(self, state: list[dict[str, Any]], observations: dict[str, np.ndarray]) -> None:
        """Restore memories saved by `state_dict` after these observations."""
        for memory, values in zip(self.memories, state, strict=True):
            vars(memory).update(values)
        self._counts = self._count(observations)

    def _count(self, observations: dict[str, np.ndarray]) -> list[tuple[int, int]]:
        """Per environment the frames in the history and the budget."""
        budgets = np.rint(observations["budget"][:, 0] * self.num_slots).astype(int)
        lengths = observations["mask"].sum(axis=1).astype(int)
        return list(zip(lengths.tolist(), budgets.tolist(), strict=True))

    def _with_columns(self, observations: dict[str, np.ndarray], recalled: np.ndarray) -> dict[str, np.ndarray]:
        """Observations whose ``frames`` contain all columns, and which have no separate signals."""
        parts = [observations["frames"]]
        if self.memories:
            parts.append(recalled)
        if self.spec.signals:
            parts.append(observation_spec.columns(observations, self.spec.signals))
        benchmark_inputs = {key: value for key, value in observations.items() if key not in self.spec.signals}
        return {**benchmark_inputs, "frames": np.concatenate(parts, axis=2)}

    def _recall(self, observations: dict[str, np.ndarray]) -> np.ndarray:
        """The memories' columns (num_envs, slots, columns), float32."""
        recalled = np.zeros((self.num_envs, self.num_slots, self.spec.num_memory_columns), dtype=np.float32)
        if not self.memories:
            return recalled
        self._counts = self._count(observations)
        steps = np.rint(observations["budget"][:, 1] * self.total_steps).astype(int)
        for row, (memory, (num_frames, _)) in enumerate(zip(self.memories, self._counts, strict=True)):
            features = observations["frames"][row, self.num_slots - num_frames :, 2 : len(ROW_FEATURES)]
            recalled[row, self.num_slots - num_frames :] = memory.recall(features, int(steps[row]))
        return recalled
