"""The batched environment: many episodes, one host forward for all of them, in Gymnasium's vector form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from far_env.device import use_one_thread_in_child_process
from far_env.envs.config import RESET_OPTIONS, EpisodeConfig, check_reset_options
from far_env.envs.episodes import EpisodeBatch
from far_env.envs.retention_env import FrameRetentionEnv, flat_action_mask
from far_env.workload import Workload


class FrameRetentionVectorEnv(VectorEnv):
    """A batch of `FrameRetentionEnv` that share every forward pass of the host.

    ## Description
    ``num_envs`` rows; each plays the episodes of `FrameRetentionEnv`. Row i seeded with s has the clips, noise and budgets of a
    single environment seeded with s + i. Shorter histories of a batch are padded, so that what is generated, and with it
    observations and rewards, may differ from those of the single environment in the last bits.

    ## Action Space
    ``MultiBinary(N)`` of the single environment, batched: (num_envs, N).

    ## Observation Space
    The ``Dict`` of the single environment, batched: (num_envs, …).

    ## Starting State
    As in the single environment, for each row. ``reset`` options ``clip_id``, ``noise_seed`` and ``budget`` are one number for
    all rows or one per row; ``reset_mask``, bool (num_envs,), limits a reset to some rows.

    ## Reward
    As in the single environment: float64 (num_envs,).

    ## Episode End
    As in the single environment. Rows are truncated only where ``max_episode_steps`` is given.

    ## Information
    The single environment's ``info`` in Gymnasium's form for vector environments: one array per key, and under ``_key`` a mask
    of the rows that have it.

    ## Rendering
    With ``render_mode="rgb_array"``, `render` returns a tuple of one picture per row, all of the same size.

    ## Arguments
    Those of `FrameRetentionEnv`, and

    - ``num_envs``: rows.
    - ``autoreset_mode``: NEXT_STEP (Gymnasium's default), SAME_STEP (Stable-Baselines3's convention) or DISABLED, where rows
      that ended wait for ``reset(options={"reset_mask": …})``. An `AutoresetMode` or its name.
    - ``max_episode_steps``: truncate a row after so many steps, as `gymnasium.wrappers.TimeLimit` does for a single
      environment; None (or −1) for never. ``gym.make_vec(…, max_episode_steps=…)`` passes it here.
    - ``render_mode``: None or "rgb_array".

    ## Version History
    - v0: first version
    """

    metadata = {
        "render_modes": ["rgb_array"],
        "render_fps": FrameRetentionEnv.metadata["render_fps"],
        "autoreset_mode": AutoresetMode.NEXT_STEP,
    }
    episode_class = EpisodeBatch

    def __init__(
        self,
        num_envs: int = 1,
        workload: str | Workload = "pan",
        budget: int | str | Sequence[int | str] = 4,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        **arguments: Any,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(
                f"the vector environment has no render_mode {render_mode!r}; use 'rgb_array', and "
                "gymnasium.wrappers.vector.HumanRendering for a window"
            )
        use_one_thread_in_child_process()
        self.num_envs = num_envs
        self.render_mode = render_mode
        self.max_episode_steps = _step_limit(max_episode_steps)
        self.config = EpisodeConfig.from_arguments({"workload": workload, "budget": budget, **arguments})
        self.episodes = self.config.make_episodes(num_envs, self.episode_class)
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.single_action_space = self.episodes.action_space
        self.single_observation_space = self.episodes.observation_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._generators = [np.random.default_rng() for _ in range(num_envs)]
        self._done = np.zeros(num_envs, dtype=bool)
        self._begun = np.zeros(num_envs, dtype=bool)
        self._elapsed_steps = np.zeros(num_envs, dtype=int)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin episodes in all rows, or in those of ``options["reset_mask"]``, bool (num_envs,).

        Returns the observations and infos of all rows that have been begun, by this call or an earlier one.
        """
        options = check_reset_options(options, (*RESET_OPTIONS, "reset_mask"))
        rows = np.flatnonzero(_reset_mask(options.pop("reset_mask", None), self.num_envs)).tolist()
        requested = {key: self._per_row(key, value) for key, value in options.items()}
        self._seed_rows(seed, rows)
        self._begin(rows, requested)
        self.episodes.run(rows)
        self._done[rows] = False
        self._begun[rows] = True
        begun = np.flatnonzero(self._begun).tolist()
        observations = self._observe(begun)
        infos: dict[str, Any] = {}
        for row in begun:
            infos = self._add_info(infos, self.episodes.info(row), row)
        return observations, infos

    def step(
        self, actions: np.ndarray, *, rows: Sequence[int] | None = None
    ) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Apply one decision in every row; ``autoreset_mode`` determines what happens to rows whose episode ended.

        Args:
            actions: keep masks (num_envs, N).
            rows: only these rows decide; the others are unchanged, with a reward of zero and their actions ignored.
        """
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions have shape {self.action_space.shape}, got {actions.shape}")
        if not self._begun.all():
            raise gym.error.ResetNeeded("call reset() for all rows before step()")
        waiting = np.flatnonzero(self._done).tolist()
        if waiting and self.autoreset_mode != AutoresetMode.NEXT_STEP:
            raise gym.error.ResetNeeded(f"rows {waiting} have ended; reset them with options={{'reset_mask': …}} before step()")
        deciding = set(range(self.num_envs) if rows is None else rows)
        waiting = [row for row in waiting if row in deciding]
        rows = range(self.num_envs)
        acting = [row for row in rows if row in deciding and not self._done[row]]
        repaired = {row: self.episodes.retain(row, actions[row]) for row in acting}
        self._begin(waiting, {})
        self.episodes.run(rows)

        earned, finals = self.episodes.rewards(acting)
        rewards = np.zeros(self.num_envs)
        rewards[acting] = earned
        self._elapsed_steps[acting] += 1
        terminations = np.array([row in repaired and self.episodes.ended(row) for row in rows])
        truncations = np.zeros(self.num_envs, dtype=bool)
        if self.max_episode_steps is not None:
            truncations[acting] = self._elapsed_steps[acting] >= self.max_episode_steps
        done = terminations | truncations

        observations = self._observe(rows)
        row_infos = [self.episodes.info(row) | {"repaired": repaired.get(row, 0)} for row in rows]
        for row, metrics in zip(acting, finals, strict=True):
            row_infos[row] |= metrics or {}
        infos: dict[str, Any] = {}
        if self.autoreset_mode == AutoresetMode.SAME_STEP and done.any():
            ended = np.flatnonzero(done).tolist()
            for row in ended:
                final = {key: value[row].copy() for key, value in observations.items()}
                infos = self._add_info(infos, {"final_obs": final, "final_info": row_infos[row]}, row)
            self._begin(ended, {})
            self.episodes.run(ended)
            for key, value in self.episodes.observe(ended).items():
                observations[key][ended] = value
            for row in ended:
                row_infos[row] = self.episodes.info(row)
        if self.autoreset_mode != AutoresetMode.SAME_STEP:
            self._done[list(deciding)] = done[list(deciding)]
        for row in rows:
            infos = self._add_info(infos, row_infos[row], row)
        return observations, rewards, terminations, truncations, infos

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return one picture per row, uint8 (height, width, 3); None without a render_mode."""
        if self.render_mode is None:
            gym.logger.warn('render() was called without a render_mode; make the environment with render_mode="rgb_array"')
            return None
        if not self._begun.all():
            raise gym.error.ResetNeeded("call reset() for all rows before render()")
        return tuple(self.episodes.picture(row) for row in range(self.num_envs))

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to resume in the middle of an episode: tensors and plain values."""
        return {
            "episodes": self.episodes.state_dict(),
            "generators": [json.dumps(generator.bit_generator.state) for generator in self._generators],
            "done": self._done.tolist(),
            "begun": self._begun.tolist(),
            "elapsed_steps": self._elapsed_steps.tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, into an environment made with the same arguments."""
        self.episodes.load_state_dict(state["episodes"])
        for generator, saved in zip(self._generators, state["generators"], strict=True):
            generator.bit_generator.state = json.loads(saved)
        self._done, self._begun = np.array(state["done"]), np.array(state["begun"])
        self._elapsed_steps = np.array(state["elapsed_steps"])

    def action_masks(self) -> np.ndarray:
        """sb3-contrib's form of the masks, bool (num_envs, 2N)."""
        return flat_action_mask(np.stack([self.episodes.action_mask(row) for row in range(self.num_envs)]))

    def _observe(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        """Observations (num_envs, …) of the given rows; those of rows that were never begun are zero."""
        observed = self.episodes.observe(rows)
        full = {key: np.zeros((self.num_envs, *value.shape[1:]), dtype=np.float32) for key, value in observed.items()}
        for key, value in observed.items():
            full[key][list(rows)] = value
        return full

    def _per_row(self, key: str, value: Any) -> list[int | None]:
        """A reset option as one value per row."""
        if isinstance(value, int | np.integer):
            return [value] * self.num_envs
        values = list(value)
        if len(values) != self.num_envs:
            raise ValueError(f"a list of {key} needs one per row: {self.num_envs}, got {len(values)}")
        return values

    def _seed_rows(self, seed: int | Sequence[int | None] | None, rows: Sequence[int]) -> None:
        """Give each row the generator that a single environment with its seed would have; None leaves a row's unchanged."""
        if seed is None:
            return
        seeds = [seed + row for row in range(self.num_envs)] if isinstance(seed, int | np.integer) else list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"a list of seeds needs one per row: {self.num_envs}, got {len(seeds)}")
        for row in rows:
            if seeds[row] is not None:
                self._generators[row] = gym.utils.seeding.np_random(int(seeds[row]))[0]

    def _begin(self, rows: list[int], requested: dict[str, list[int | None]]) -> None:
        """Draw a clip for each row and begin its episode; does not run them."""
        drawn = [
            self.config.draw(self._generators[row], self.episodes.workload, **{key: requested[key][row] for key in requested})
            for row in rows
        ]
        self._elapsed_steps[rows] = 0
        if drawn:
            clip_ids, seeds, budgets = zip(*drawn, strict=True)
            self.episodes.begin(rows, [self.config.split] * len(rows), clip_ids, seeds, budgets)


def _step_limit(max_episode_steps: int | None) -> int | None:
    if max_episode_steps is None or max_episode_steps == -1:
        return None
    if isinstance(max_episode_steps, bool) or not isinstance(max_episode_steps, int | np.integer) or max_episode_steps < 1:
        raise ValueError(f"max_episode_steps must be a whole number of at least 1, or None, got {max_episode_steps!r}")
    return int(max_episode_steps)


def _autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    if isinstance(mode, AutoresetMode):
        return mode
    try:
        return AutoresetMode[mode.upper()]
    except (KeyError, AttributeError):
        names = ", ".join(autoreset.name for autoreset in AutoresetMode)
        raise ValueError(f"unknown autoreset_mode {mode!r}; use one of {names}") from None


def _reset_mask(mask: np.ndarray | None, num_envs: int) -> np.ndarray:
    if mask is None:
        return np.ones(num_envs, dtype=bool)
    mask = np.asarray(mask)
    if mask.shape != (num_envs,) or mask.dtype != bool or not mask.any():
        raise ValueError(f"reset_mask must be a bool array of shape ({num_envs},) with at least one True, got {mask!r}")
    return mask
