"""The environment of a token memory as a scorer learns in it: an action drops or compresses one frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from far_env.agents.config import NetworkConfig
from far_env.agents.eviction_env import EvictionVecEnv
from far_env.agents.observation import FrameGraph
from far_env.agents.token_reductions import REDUCTIONS, Reductions
from far_env.envs.token_env import TokenRetentionEnv
from far_env.rollout.frame_actions import DROP


class ReductionVecEnv(EvictionVecEnv):
    """Environments of token memories, also of several workloads, for Stable-Baselines3.

    An action is ``Discrete(2N)``: 2i drops and 2i + 1 compresses the frame of node i. A decision is complete, and its episode
    goes on, when the tokens fit the budget; until then it is asked again, with a reward of zero. Observations are as of
    `EvictionVecEnv`; ``remaining`` is the share of its tokens that a frame has left.

    Args:
        envs: one for each row.
        config: of the scorer.
    """

    def __init__(self, envs: Sequence[TokenRetentionEnv], config: NetworkConfig) -> None:
        self.envs, self.config = list(envs), config
        self.num_nodes = min(FrameGraph.MAX_NODES, max(env.episode.workload.num_frames - 1 for env in self.envs))
        self.num_nodes = max(self.num_nodes, max(env.episode.num_slots for env in self.envs))
        self._rows = [(env, 0) for env in self.envs]
        self.graphs = [FrameGraph(config.dropped_frames) for _ in self._rows]
        self.reductions: list[Reductions] = []
        self.observations: list[dict] = [{} for _ in self._rows]
        self._actions = np.zeros(len(self._rows), dtype=np.int64)
        self.render_mode = None
        space = spaces.Discrete(len(REDUCTIONS) * self.num_nodes)
        VecEnv.__init__(self, len(self._rows), self._space(), space)

    @property
    def remaining(self) -> list[np.ndarray]:
        """The share of its tokens that each frame has left, of every row."""
        return [reductions.shares for reductions in self.reductions]

    def reset(self) -> dict[str, np.ndarray]:
        """Begin all episodes with the seeds and options that were set; `reset_infos` holds their infos."""
        chosen = zip(self._seeds, self._options, strict=True)
        self.reductions = [self._begun(index, seed, options) for index, (seed, options) in enumerate(chosen)]
        self._reset_seeds()
        self._reset_options()
        return self._stacked()

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Drop or compress a frame in every row; rows whose tokens fit go on to their next decision."""
        rewards, dones = np.zeros(self.num_envs, dtype=np.float32), np.zeros(self.num_envs, dtype=bool)
        infos: list[dict[str, Any]] = [{} for _ in self._rows]
        for index, env in enumerate(self.envs):
            reductions = self.reductions[index]
            self._reduce(index, int(self._actions[index]))
            if not reductions.done:
                continue
            actions = reductions.actions()
            action = np.full(env.action_space.shape, DROP)
            action[len(action) - len(actions) :] = actions
            kept = np.flatnonzero(reductions.sizes)
            self.graphs[index].keep(kept.tolist())
            reductions.sizes = reductions.sizes[kept]
            _, rewards[index], dones[index], _, info = env.step(action)
            if dones[index]:
                infos[index] = info | {"TimeLimit.truncated": False}
                self.reductions[index] = self._begun(index)
            else:
                self.reductions[index] = self._observed(index)
        return self._stacked(), rewards, dones, infos

    def action_masks(self) -> np.ndarray:
        """bool (num_envs, 2N), the reductions that are allowed."""
        masks = np.zeros((self.num_envs, self.num_nodes, len(REDUCTIONS)), dtype=bool)
        for mask, graph, reductions in zip(masks, self.graphs, self.reductions, strict=True):
            mask[graph.rows()] = reductions.allowed()
        return masks.reshape(self.num_envs, -1)

    def load_env_states(self, states: Sequence[Any]) -> None:
        """Restore what `env_states` returned; `load_state_dict` follows."""
        super().load_env_states(states)
        self.reductions = [self._reductions(env) for env in self.envs]

    def _set_remaining(self, index: int, remaining: np.ndarray) -> None:
        reductions = self.reductions[index]
        reductions.sizes = (remaining * reductions.full).round().astype(np.int64)

    def _begun(self, index: int, seed: int | None = None, options: dict[str, Any] | None = None) -> Reductions:
        """Begin a row's next episode, and observe it."""
        _, self.reset_infos[index] = self.envs[index].reset(seed=seed, options=options)
        self._begin(index)
        return self._observed(index)

    def _reduce(self, index: int, action: int) -> None:
        """Apply an action, or drop the oldest frame that remains where it is not allowed."""
        reductions, rows = self.reductions[index], self.graphs[index].rows()
        allowed = reductions.allowed()
        node, reduction = divmod(action, len(REDUCTIONS))
        chosen = np.flatnonzero(rows == node)
        if not len(chosen) or not allowed[chosen[0], reduction]:
            chosen, reduction = np.flatnonzero(allowed[:, 0]), 0
        reductions.reduce(int(chosen[0]), REDUCTIONS[reduction])

    def _observed(self, index: int) -> Reductions:
        """Tell a row's graph about its memory, as it is before a decision."""
        episode, graph = self.envs[index].episode, self.graphs[index]
        step, total = episode.newest - episode.workload.num_context, episode.workload.num_predict
        graph.observe_frames(episode.features(), step)
        self.observations[index] = graph.arrays(total - step - 1, episode.budget / episode.tokens_per_frame)
        return self._reductions(self.envs[index])

    @staticmethod
    def _reductions(env: TokenRetentionEnv) -> Reductions:
        return Reductions(env.episode.sizes(), env.episode.tokens_per_frame, env.episode.budget)
