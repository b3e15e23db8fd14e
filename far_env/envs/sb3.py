"""The vector environment as a Stable-Baselines3 `VecEnv`: SB3 takes no native Gymnasium vector environments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode
from stable_baselines3.common.vec_env import VecEnv

from far_env.envs.vector_env import FrameRetentionVectorEnv


class RowsVecEnv(VecEnv):
    """What SB3 asks of an environment whose rows are not environments of their own: they share attributes and methods."""

    @property
    def _shared(self) -> Any:
        """The object whose attributes and methods these are."""
        return self

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        """The shared attribute, once per index."""
        return [getattr(self._shared, attr_name) for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        """Set an attribute for all rows. Raises ValueError for some of them only."""
        if len(list(self._get_indices(indices))) != self.num_envs:
            raise ValueError(f"the rows share one environment: {attr_name} can only be set for all of them")
        setattr(self._shared, attr_name, value)

    def env_method(self, method_name: str, *args: Any, indices: int | Iterable[int] | None = None, **kwargs: Any) -> list[Any]:
        """Call a batched method once and return one row of the result per index."""
        results = getattr(self._shared, method_name)(*args, **kwargs)
        return [results[row] for row in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: int | Iterable[int] | None = None) -> list[bool]:
        """False for every index: rows are not single environments that could be wrapped."""
        return [False for _ in self._get_indices(indices)]


class SB3VecEnv(RowsVecEnv):
    """Adapter over a `FrameRetentionVectorEnv` whose autoreset mode is SAME_STEP, as SB3's convention is.

    ``infos`` become one dict per row; the last observation of an ended episode is in ``terminal_observation``.

    Raises:
        ValueError: if the environment has another autoreset mode.
    """

    def __init__(self, env: FrameRetentionVectorEnv) -> None:
        require_same_step(env)
        self.env = env
        self._actions: np.ndarray | None = None
        super().__init__(env.num_envs, env.single_observation_space, env.single_action_space)

    @property
    def _shared(self) -> Any:
        return self.env

    def reset(self) -> dict[str, np.ndarray]:
        """Begin all rows with the seeds and options that were set; `reset_infos` holds their infos."""
        observations, infos = rows_reset(self.env, self._seeds, self._options)
        self.reset_infos = [row_info(infos, row) for row in range(self.num_envs)]
        self._reset_seeds()
        self._reset_options()
        return observations

    def step_async(self, actions: np.ndarray) -> None:
        """Remember the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray, list[dict[str, Any]]]:
        """Observations, float32 rewards, dones, and one info per row."""
        observations, rewards, terminations, truncations, infos = self.env.step(self._actions)
        rows = []
        for row in range(self.num_envs):
            if terminations[row] or truncations[row]:
                info = row_info(infos["final_info"], row)
                info["terminal_observation"] = infos["final_obs"][row]
                info["TimeLimit.truncated"] = bool(truncations[row] and not terminations[row])
            else:
                info = row_info(infos, row)
            rows.append(info)
        return observations, rewards.astype(np.float32), terminations | truncations, rows

    def close(self) -> None:
        """Close the environment."""
        self.env.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """Return one picture per row, uint8 (height, width, 3); None per row without a render_mode."""
        return [None] * self.num_envs if self.render_mode is None else list(self.env.render())


def require_same_step(env: FrameRetentionVectorEnv) -> None:
    """Raise ValueError unless ended rows are reset within the step, as SB3 expects."""
    if env.autoreset_mode != AutoresetMode.SAME_STEP:
        raise ValueError(
            f"SB3 resets within a step: make the environment with autoreset_mode='SAME_STEP', not {env.autoreset_mode.name}"
        )


def rows_reset(env: FrameRetentionVectorEnv, seeds: Sequence[int | None], options: Sequence[dict]) -> tuple[dict, dict]:
    """Reset all rows with the seeds and options that SB3 has for each of them."""
    keys = {key for row in options for key in row}
    by_key = {key: [row.get(key) for row in options] for key in keys}
    return env.reset(seed=None if all(seed is None for seed in seeds) else list(seeds), options=by_key)


def concatenated(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The observations of several environments as those of one, rows after rows."""
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def row_info(infos: dict[str, Any], row: int) -> dict[str, Any]:
    """Return one row's part of Gymnasium's dict of arrays."""
    row_info = {}
    for key, values in infos.items():
        if key.startswith("_") or key in ("final_obs", "final_info") or not infos[f"_{key}"][row]:
            continue
        value = values[row]
        row_info[key] = value.item() if isinstance(value, np.generic) else value
    return row_info
