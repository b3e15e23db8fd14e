"""The environment as a scorer learns in it: an action drops one frame, and observations are frame graphs."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from gymnasium import spaces

from far_env.agents.config import NetworkConfig
from far_env.agents.graph_batches import stacked
from far_env.agents.observation import FrameGraph, signal_arrays
from far_env.contract import OF_PAIRS
from far_env.envs.sb3 import RowsVecEnv, require_same_step, row_info, rows_reset
from far_env.envs.vector_env import FrameRetentionVectorEnv


class EvictionVecEnv(RowsVecEnv):
    """Rows of one or more `FrameRetentionVectorEnv`, also of several workloads, for Stable-Baselines3.

    An action is the node of a frame to drop, ``Discrete(N)``. A row's decision is complete, and its episode goes on, when its
    history fits the budget; until then it is asked again, with a reward of zero. Observations are the arrays of
    `FrameGraph.arrays`, padded to N nodes, with ``mask``, 1 at nodes, and ``remaining``, 1 at frames that were not dropped yet.

    Args:
        envs: with autoreset mode SAME_STEP; they may differ in workload, budgets and slots.
        config: of the scorer: its signals, and whether it sees dropped frames.
        num_nodes: N; by default as many as these environments need.

    Raises:
        ValueError: if an environment has another autoreset mode or a limit of steps.
    """

    def __init__(self, envs: Sequence[FrameRetentionVectorEnv], config: NetworkConfig, num_nodes: int | None = None) -> None:
        for env in envs:
            require_same_step(env)
            if env.max_episode_steps is not None:
                raise ValueError("an agent learns in whole episodes: make the environment without max_episode_steps")
        self.envs, self.config = list(envs), config
        sizes = [(env.episodes.num_slots, env.episodes.workload.num_units) for env in envs]
        needed = max(max(slots, min(units, FrameGraph.MAX_NODES)) for slots, units in sizes)
        self.num_nodes = needed if num_nodes is None else num_nodes
        self._rows = [(env, row) for env in self.envs for row in range(env.num_envs)]
        self.graphs = [FrameGraph(config.dropped_frames) for _ in self._rows]
        self.remaining: list[np.ndarray] = [np.zeros(0, dtype=bool) for _ in self._rows]
        self.observations: list[dict] = [{} for _ in self._rows]
        self._actions = np.zeros(len(self._rows), dtype=np.int64)
        self.render_mode = None
        super().__init__(len(self._rows), self._space(), spaces.Discrete(self.num_nodes))

    def reset(self) -> dict[str, np.ndarray]:
        """Begin all episodes with the seeds and options that were set; `reset_infos` holds their infos."""
        start, self.reset_infos = 0, []
        for env in self.envs:
            rows = slice(start, start + env.num_envs)
            observations, infos = rows_reset(env, self._seeds[rows], self._options[rows])
            for row in range(env.num_envs):
                self.reset_infos.append(row_info(infos, row))
                self._begin(start + row)
                self._observe(start + row, observations, infos, row)
            start += env.num_envs
        self._reset_seeds()
        self._reset_options()
        return self._stacked()

    def step_async(self, actions: np.ndarray) -> None:
        """Remember the actions for `step_wait`."""
        self._actions = np.asarray(actions)

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Drop a frame in every row; rows whose history fits go on to their next decision."""
        rewards, dones = np.zeros(self.num_envs, dtype=np.float32), np.zeros(self.num_envs, dtype=bool)
        row_infos: list[dict[str, Any]] = [{} for _ in self._rows]
        start = 0
        for env in self.envs:
            ready = []
            actions = np.zeros(env.action_space.shape, dtype=np.int8)
            for row in range(env.num_envs):
                index = start + row
                self._drop(index, int(self._actions[index]))
                kept = np.flatnonzero(self.remaining[index])
                if len(kept) <= env.episodes.max_frames[row]:
                    ready.append(row)
                    actions[row, env.episodes.num_slots - len(self.remaining[index]) + kept] = 1
                    self.graphs[index].keep(kept.tolist())
                    self.remaining[index] = np.ones(len(kept), dtype=bool)
            if ready:
                observations, earned, ended, _, infos = env.step(actions, rows=ready)
                for row in ready:
                    index = start + row
                    rewards[index], dones[index] = earned[row], ended[row]
                    if ended[row]:
                        row_infos[index] = row_info(infos["final_info"], row)
                        self._begin(index)
                    self._observe(index, observations, infos, row)
            start += env.num_envs
        return self._stacked(), rewards, dones, row_infos

    def action_masks(self) -> np.ndarray:
        """bool (num_envs, N), the nodes that may be dropped: remaining frames but the newest."""
        masks = np.zeros((self.num_envs, self.num_nodes), dtype=bool)
        for mask, graph, remaining in zip(masks, self.graphs, self.remaining, strict=True):
            mask[graph.rows()[np.flatnonzero(remaining)[:-1]]] = True
        return masks

    def state_dict(self) -> list[dict[str, Any]]:
        """The graphs and what remains of the histories, as tensors and plain values."""
        return [
            {
                "graph": {name: _plain(value) for name, value in vars(graph).items()},
                "remaining": torch.from_numpy(remaining.copy()),
                "arrays": {name: torch.from_numpy(value.copy()) for name, value in arrays.items()},
            }
            for graph, remaining, arrays in zip(self.graphs, self.remaining, self.observations, strict=True)
        ]

    def load_state_dict(self, state: list[dict[str, Any]]) -> None:
        """Restore what `state_dict` returned; the environments are restored separately."""
        for index, saved in enumerate(state):
            values = {
                name: value.numpy().copy() if torch.is_tensor(value) else deepcopy(value)
                for name, value in saved["graph"].items()
            }
            vars(self.graphs[index]).update(values)
            self._set_remaining(index, saved["remaining"].numpy().copy())
            self.observations[index] = {name: value.numpy().copy() for name, value in saved["arrays"].items()}

    def env_states(self) -> list[Any]:
        """The states of the environments, see `FrameRetentionVectorEnv.state_dict`."""
        return [env.state_dict() for env in self.envs]

    def load_env_states(self, states: Sequence[Any]) -> None:
        """Restore what `env_states` returned."""
        for env, state in zip(self.envs, states, strict=True):
            env.load_state_dict(state)

    def close(self) -> None:
        """Close the environments."""
        for env in self.envs:
            env.close()

    def _set_remaining(self, index: int, remaining: np.ndarray) -> None:
        """Restore what remains of a row's history."""
        self.remaining[index] = remaining

    def _begin(self, index: int) -> None:
        """Forget a row's episode."""
        self.graphs[index] = FrameGraph(self.config.dropped_frames)

    def _drop(self, index: int, node: int) -> None:
        """Drop the frame at a node, or the oldest that remains where it is none that may be dropped."""
        remaining, rows = self.remaining[index], self.graphs[index].rows()
        allowed = np.flatnonzero(remaining)[:-1]
        chosen = allowed[rows[allowed] == node]
        remaining[chosen[0] if len(chosen) else allowed[0]] = False

    def _observe(self, index: int, observations: dict[str, np.ndarray], infos: dict[str, Any], row: int) -> None:
        """Tell a row's graph about its present history."""
        env, _ = self._rows[index]
        count = int(observations["mask"][row].sum())
        step, total_steps, max_frames = (int(infos[key][row]) for key in ("step", "total_steps", "max_frames"))
        slots = env.episodes.num_slots
        features = infos["frame_features"][row][slots - count :]
        graph = self.graphs[index]
        # Observations have zeros where a signal is NaN, which a policy is told.
        graph.observe_frames(features, step, *signal_arrays(env.episodes.raw_signals[row], self.config.signals))
        self.remaining[index] = np.ones(count, dtype=bool)
        self.observations[index] = graph.arrays(total_steps - step - 1, max_frames)

    def _stacked(self, rows: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """The padded observations of these rows, by default of all, float32."""
        rows = range(self.num_envs) if rows is None else rows
        batch, mask = stacked([self.observations[row] for row in rows], self.num_nodes)
        remaining = np.zeros(mask.shape, dtype=np.float32)
        for index, row in enumerate(rows):
            remaining[index, self.graphs[row].rows()] = self.remaining[row]
        parts = {**batch, "mask": mask, "remaining": remaining}
        return {name: parts[name].astype(np.float32) for name in self.observation_space.spaces}

    def _space(self) -> spaces.Dict:
        """The arrays of `FrameGraph.arrays` by name, those of signals only where there are any, mask and remaining."""
        example = FrameGraph(self.config.dropped_frames)
        of_pairs = [name in OF_PAIRS for name in self.config.signals]
        example.observe_frames(np.zeros((1, 4)), 0, [np.zeros(1)] * of_pairs.count(False), [np.zeros((1, 1))] * sum(of_pairs))
        batch, mask = stacked([example.arrays(1, 1)], self.num_nodes)
        parts = {**batch, "mask": mask, "remaining": mask}
        shapes = {name: values.shape[1:] for name, values in parts.items() if values.size}
        return spaces.Dict({name: spaces.Box(-np.inf, np.inf, shape, np.float32) for name, shape in shapes.items()})


def _plain(value: Any) -> Any:
    """A copy, of an array as a tensor."""
    return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else deepcopy(value)
