"""The batched environment: many episodes, one host forward for all of them, in Gymnasium's vector form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from far_env.contract import RetentionPolicy
from far_env.envs.episodes import EpisodeBatch
from far_env.envs.retention_env import RESET_OPTIONS, EpisodeSettings, check_reset_options, flat_action_mask
from far_env.workloads import Workload


class FrameRetentionVectorEnv(VectorEnv):
    """``num_envs`` copies of `FrameRetentionEnv` that share every forward of the host.

    Takes the arguments of `FrameRetentionEnv` (without render_mode) and

    - ``num_envs``: rows.
    - ``autoreset_mode``: NEXT_STEP (Gymnasium's default), SAME_STEP (what SB3 expects) or DISABLED, where finished rows are
      begun again by ``reset(options={"reset_mask": …})``. An `AutoresetMode` or its name.

    Row i seeded with s equals a single environment seeded with s + i. ``reset`` options ``clip_id``, ``noise_seed`` and
    ``budget`` are numbers or one number per row.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.NEXT_STEP}
    episode_class = EpisodeBatch

    def __init__(
        self,
        num_envs: int = 1,
        workload: str | Workload = "pan",
        budget: int | str | Sequence[int | str] = 4,
        reward: str | dict[str, float] = "psnr",
        relative_to: str | RetentionPolicy | None = None,
        telescoping: bool = False,
        metrics: Sequence[str] = (),
        split: str = "train",
        num_clips: int | None = None,
        host: str | None = None,
        device: str = "auto",
        precision: str = "float32",
        memo_bytes: int = 0,
        signals: Sequence[str] = (),
        clip_options: dict[str, Any] | None = None,
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: None = None,
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        if render_mode is not None:
            raise ValueError("the vector environment does not render; use FrameRetentionEnv with render_mode='rgb_array'")
        self.num_envs = num_envs
        self.render_mode = None
        self._settings = EpisodeSettings(
            num_envs,
            workload,
            budget,
            reward,
            relative_to,
            telescoping,
            metrics,
            split,
            num_clips,
            host,
            device,
            precision,
            memo_bytes,
            signals,
            clip_options,
            self.episode_class,
        )
        self.episodes = self._settings.episodes
        self.autoreset_mode = _autoreset_mode(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.single_action_space = self._settings.action_space
        self.single_observation_space = self._settings.observation_space
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self._generators = [np.random.default_rng() for _ in range(num_envs)]
        self._done = np.zeros(num_envs, dtype=bool)
        self._begun = np.zeros(num_envs, dtype=bool)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin episodes in all rows, or in those of ``options["reset_mask"]`` (bool (num_envs,)).

        Observations and infos are those of all rows that have been begun, now or before.
        """
        options = check_reset_options(options, (*RESET_OPTIONS, "reset_mask"))
        rows = np.flatnonzero(_reset_mask(options.pop("reset_mask", None), self.num_envs)).tolist()
        given = {key: self._per_row(key, value) for key, value in options.items()}
        self._seed_rows(seed, rows)
        self._begin(rows, given)
        self.episodes.run(rows)
        self._done[rows] = False
        self._begun[rows] = True
        begun = np.flatnonzero(self._begun).tolist()
        observations = self._observe(begun)
        infos: dict[str, Any] = {}
        for row in begun:
            infos = self._add_info(infos, self.episodes.info(row), row)
        return observations, infos

    def step(self, actions: np.ndarray) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """One decision in every row; see the class for what happens to rows whose episode ended."""
        actions = np.asarray(actions)
        if actions.shape != self.action_space.shape:
            raise ValueError(f"actions have shape {self.action_space.shape}, got {actions.shape}")
        if not self._begun.all():
            raise gym.error.ResetNeeded("call reset() for all rows before step()")
        waiting = np.flatnonzero(self._done).tolist()
        if waiting and self.autoreset_mode != AutoresetMode.NEXT_STEP:
            raise gym.error.ResetNeeded(f"rows {waiting} have ended; reset them with options={{'reset_mask': …}} before step()")
        rows = range(self.num_envs)
        acting = [row for row in rows if not self._done[row]]
        repaired = {row: self.episodes.retain(row, actions[row]) for row in acting}
        self._begin(waiting, {})
        self.episodes.run(rows)

        earned, finals = self.episodes.rewards(acting)
        rewards = np.zeros(self.num_envs)
        rewards[acting] = earned
        ended = [row for row in acting if self.episodes.ended(row)]
        terminations = np.zeros(self.num_envs, dtype=bool)
        terminations[ended] = True

        observations = self._observe(rows)
        own = [self.episodes.info(row) | {"repaired": repaired.get(row, 0)} for row in rows]
        for row, metrics in zip(acting, finals, strict=True):
            own[row] |= metrics or {}
        infos: dict[str, Any] = {}
        if self.autoreset_mode == AutoresetMode.SAME_STEP and ended:
            for row in ended:
                final = {key: value[row].copy() for key, value in observations.items()}
                infos = self._add_info(infos, {"final_obs": final, "final_info": own[row]}, row)
            self._begin(ended, {})
            self.episodes.run(ended)
            for key, value in self.episodes.observe(ended).items():
                observations[key][ended] = value
            for row in ended:
                own[row] = self.episodes.info(row)
        if self.autoreset_mode != AutoresetMode.SAME_STEP:
            self._done = terminations.copy()
        for row in rows:
            infos = self._add_info(infos, own[row], row)
        return observations, rewards, terminations, np.zeros(self.num_envs, dtype=bool), infos

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to go on mid-episode: tensors and plain values."""
        generators = [json.dumps(generator.bit_generator.state) for generator in self._generators]
        flags = {"done": self._done.tolist(), "begun": self._begun.tolist()}
        return {"episodes": self.episodes.state_dict(), "generators": generators, **flags}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, into an environment made with the same arguments."""
        self.episodes.load_state_dict(state["episodes"])
        for generator, saved in zip(self._generators, state["generators"], strict=True):
            generator.bit_generator.state = json.loads(saved)
        self._done, self._begun = np.array(state["done"]), np.array(state["begun"])

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
        """One generator per row, as single environments would have; None leaves a row's generator as it is."""
        if seed is None:
            return
        seeds = [seed + row for row in range(self.num_envs)] if isinstance(seed, int | np.integer) else list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"a list of seeds needs one per row: {self.num_envs}, got {len(seeds)}")
        for row in rows:
            if seeds[row] is not None:
                self._generators[row] = gym.utils.seeding.np_random(int(seeds[row]))[0]

    def _begin(self, rows: list[int], given: dict[str, list[int | None]]) -> None:
        """Draw clips for rows and put their episodes in place; does not run them."""
        drawn = [
            self._settings.draw(self._generators[row], *(given[key][row] if key in given else None for key in RESET_OPTIONS))
            for row in rows
        ]
        if drawn:
            clip_ids, seeds, budgets = zip(*drawn, strict=True)
            self.episodes.begin(rows, [self._settings.split] * len(rows), clip_ids, seeds, budgets)


def _autoreset_mode(mode: AutoresetMode | str) -> AutoresetMode:
    if isinstance(mode, AutoresetMode):
        return mode
    try:
        return AutoresetMode[mode.upper()]
    except (KeyError, AttributeError):
        names = ", ".join(known.name for known in AutoresetMode)
        raise ValueError(f"unknown autoreset_mode {mode!r}; use one of {names}") from None


def _reset_mask(mask: np.ndarray | None, num_envs: int) -> np.ndarray:
    if mask is None:
        return np.ones(num_envs, dtype=bool)
    mask = np.asarray(mask)
    if mask.shape != (num_envs,) or mask.dtype != bool or not mask.any():
        raise ValueError(f"reset_mask must be a bool array of shape ({num_envs},) with at least one True, got {mask!r}")
    return mask
