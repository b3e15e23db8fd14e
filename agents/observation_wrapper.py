"""The environment as an agent sees it: each row's observation also holds what a `HistoryMemory` recalls, and signals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from far_env.agents import observation_spec
from far_env.agents.memory import HistoryMemory
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv, VecEnvWrapper

from far_env.envs.episodes import ROW_FEATURES


class AgentVecEnv(VecEnvWrapper):
    """Appends columns to ``observation["frames"]``, (slots, 6), all zero on padding: those of memory, then those of signals.

    Args:
        venv: an `SB3VecEnv` or several joined, possibly monitored.
        total_steps: per row, the predicted frames of an episode.
        view: what the agent's scorer sees; its signals are some of the environment's.
    """

    def __init__(self, venv: VecEnv, total_steps: Sequence[int], view: observation_spec.ObservationSpec) -> None:
        parts = dict(venv.observation_space.spaces)
        self.num_slots = parts["frames"].shape[0]
        self.total_steps = np.asarray(total_steps)
        self.view = view
        shapes = {name: parts.pop(name).shape for name in view.signals}
        # Logarithms of ages pass 1 after 50 frames; cosines are not below -1.
        low = np.zeros((self.num_slots, view.num_told), dtype=np.float32)
        told = np.full((self.num_slots, observation_spec.num_columns(shapes)), -1.0, dtype=np.float32)
        low = np.concatenate([low, told], axis=1)
        high = np.full_like(low, 4.0)
        if view.path:  # which may lead anywhere
            ahead = view.num_told - HistoryMemory.PATH_WIDTH
            low[:, ahead], high[:, ahead : view.num_told] = -np.inf, np.inf
        parts["frames"] = spaces.Box(low, high, dtype=np.float32)
        super().__init__(venv, observation_space=spaces.Dict(parts))
        self.memories: list[HistoryMemory] = [view.new_memory() for _ in range(self.num_envs)] if view.memory else []
        self._shown = [(0, 0)] * self.num_envs

    def reset(self) -> dict[str, np.ndarray]:
        """Begin all rows with empty memories."""
        self.memories = [self.view.new_memory() for _ in self.memories]
        return self._told(self.venv.reset(), self._recalled)

    def step_async(self, actions: np.ndarray) -> None:
        """Remember what stays, by the benchmark's rule, and pass the actions on."""
        if self.memories:
            for memory, action, (num_frames, max_frames) in zip(self.memories, actions, self._shown, strict=True):
                wanted = np.asarray(action[self.num_slots - num_frames :]) > 0
                wanted[-1] = True
                memory.keep(np.flatnonzero(wanted)[-max_frames:].tolist())
        self.venv.step_async(actions)

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """As the wrapped environment's; ended rows begin with an empty memory."""
        observations, rewards, dones, infos = self.venv.step_wait()
        for row in np.flatnonzero(dones):
            if self.memories:
                self.memories[row] = self.view.new_memory()
            last = {key: value[None] for key, value in infos[row]["terminal_observation"].items()}
            # Nothing is decided there, so nothing is recalled.
            last = self._told(last, lambda own: np.zeros((1, self.num_slots, self.view.num_remembered), dtype=np.float32))
            infos[row]["terminal_observation"] = {key: value[0] for key, value in last.items()}
        return self._told(observations, self._recalled), rewards, dones, infos

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

    def _told(
        self, observations: dict[str, np.ndarray], recall: Callable[[dict[str, np.ndarray]], np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Observations with all columns in ``frames``, and nothing told twice."""
        parts = [observations["frames"]]
        if self.memories:
            parts.append(recall(observations))
        if self.view.signals:
            parts.append(observation_spec.columns(observations, self.view.signals))
        rest = {key: value for key, value in observations.items() if key not in self.view.signals}
        return {**rest, "frames": np.concatenate(parts, axis=2)}

    def _recalled(self, observations: dict[str, np.ndarray]) -> np.ndarray:
        """The memories' columns (num_envs, slots, remembered)."""
        self._shown = self._counts(observations)
        steps = np.rint(observations["budget"][:, 1] * self.total_steps).astype(int)
        recalled = np.zeros((self.num_envs, self.num_slots, self.view.num_remembered), dtype=np.float32)
        for row, (memory, (num_frames, _)) in enumerate(zip(self.memories, self._shown, strict=True)):
            looks = observations["frames"][row, self.num_slots - num_frames :, 2 : len(ROW_FEATURES)]
            recalled[row, self.num_slots - num_frames :] = memory.recall(looks, int(steps[row]))
        return recalled
