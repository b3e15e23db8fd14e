"""The Gymnasium environment over a token memory: one streaming rollout per episode; frames are kept, compressed or dropped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch

from far_env.device import use_one_thread_in_child_process
from far_env.envs.config import RESET_OPTIONS, EpisodeConfig, check_reset_options
from far_env.envs.rendering import render_workload_episode
from far_env.envs.token_episode import TokenEpisode
from far_env.errors import unknown_name
from far_env.workload import Workload

NOT_TAKEN = ("memo_bytes", "signals")
"""Arguments of the environment of frames that this one has no use for."""


class TokenRetentionEnv(gym.Env):
    """Choose which past frames stay in a video model's token memory whole, which compressed, and which not at all.

    ## Description
    As in `far_env.envs.retention_env.FrameRetentionEnv` a video model continues a clip, but its memory is keys and values of
    tokens that are computed once. Every frame enters with its tokens; whenever a head then has more than ``budget``, the agent
    says for each frame whether it stays whole, is compressed to a quarter of its tokens (means of 2×2 of them, without
    training), or leaves. Nothing comes back. This is not the benchmark.

    ## Action Space
    ``MultiDiscrete([3] * N)``: 0 drops, 1 compresses, 2 keeps, for each of the N frames that can be in the memory. They are
    right-aligned, the newest in the last slot. Every vector is legal: padding is ignored, the newest frame stays whole, and
    where tokens are short, newer frames come first: one that does not fit is compressed, or else dropped.
    ``info["repaired"]`` counts the entries that this changed.

    ## Observation Space
    A ``Dict`` of float32 boxes in [0, 1]:

    | key | shape | content |
    |---|---|---|
    | frames | (N, 8) | the six columns of the environment of frames, whether the frame is compressed, and its share of the |
    | | | attention of the newest frame's queries, mean over layers and heads; padding is zero |
    | mask | (N,) | 1 where a frame is |
    | budget | (3,) | the budget and the tokens as shares of N whole frames; between them the share of frames so far |

    ## Starting State
    ``reset`` draws a clip of the split, and lets given frames enter until there are too many tokens. Decisions are made while
    given frames enter, too; their ``step`` is negative.

    ## Reward
    By default the clip's PSNR in dB at the end of the episode, else 0; see the arguments.

    ## Episode End
    ``terminated`` after the last decision that can influence a frame. Episodes are not truncated, unless a number of steps is
    given to Gymnasium: ``gym.make(…, max_episode_steps=…)``.

    ## Information
    ``clip_id``, ``noise_seed``, ``step``, ``total_steps``, ``token_budget``, ``tokens``, ``action_mask`` (bool (N, 3), what may
    be chosen), ``kept_frames`` (true frame numbers), ``frame_features`` (N, 4), ``repaired``, and at the end the metrics.

    ## Rendering
    As in the environment of frames; decisions made while given frames enter have no line.

    ## Arguments
    Those of `far_env.envs.retention_env.FrameRetentionEnv` but ``memo_bytes`` and ``signals``; ``budget`` is a number of
    tokens, or several, of which each episode draws one. ``gym.make_vec`` runs several environments in turn or in processes.

    ## References
    Budgets in tokens: PackForcing, arXiv 2603.25730. The host: Gu et al., arXiv 2503.19325.

    ## Version History
    - v0: first version
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}

    def __init__(
        self,
        workload: str | Workload = "maze_retrieval",
        budget: int | Sequence[int] = 256,
        *,
        render_mode: str | None = None,
        **arguments: Any,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(unknown_name("render_mode", str(render_mode), self.metadata["render_modes"]))
        for name in NOT_TAKEN:
            if name in arguments:
                raise TypeError(f"the environment of a token memory takes no {name}")
        use_one_thread_in_child_process()
        self.render_mode = render_mode
        self.config = EpisodeConfig.from_arguments({"workload": workload, "budget": budget, **arguments})
        self.episode = TokenEpisode(
            self.config.make_workload(), self.config.budgets, self.config.scoring, tuple(self.config.metrics)
        )
        self.action_space = self.episode.action_space
        self.observation_space = self.episode.observation_space
        self._actions: list[np.ndarray] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Begin an episode. Options: ``clip_id``, ``noise_seed``, ``budget``. Raises ClipIdError on a clip id out of range."""
        super().reset(seed=seed)
        options = check_reset_options(options)
        requested = {key: options.get(key) for key in RESET_OPTIONS}
        clip_id, noise_seed, budget = self.config.draw(self.np_random, self.episode.workload, **requested)
        self.episode.begin(self.config.split, clip_id, noise_seed, budget)
        self._actions = []
        self.episode.run()
        return self.episode.observe(), self.episode.info()

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Keep, compress and drop frames, and generate until the next decision or the end."""
        if self.episode.clip is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        if self.episode.ended:
            raise gym.error.ResetNeeded("the episode is over; call reset() before the next step()")
        action = np.asarray(action)
        if action.shape != self.action_space.shape:
            raise ValueError(f"an action has shape {self.action_space.shape}, got {action.shape}")
        if not np.isin(action, range(3)).all():
            raise ValueError(f"an action holds 0 (drop), 1 (compress) and 2 (keep), got {sorted(set(action.tolist()))}")
        self._actions.append(action)
        repaired = self.episode.retain(action)
        self.episode.run()
        reward, metrics = self.episode.earned()
        info = self.episode.info() | {"repaired": repaired} | metrics
        return self.episode.observe(), reward, self.episode.ended, False, info

    def state_dict(self) -> dict[str, Any]:
        """What the episode began with and its actions so far, as tensors and plain values; and the random state."""
        episode, actions = self.episode, np.array(self._actions, dtype=np.int64).reshape(-1, self.episode.num_slots)
        return {
            "options": {"clip_id": episode.clip.clip_id, "noise_seed": episode.noise_seed, "budget": episode.budget},
            "actions": torch.from_numpy(actions),
            "rng": json.dumps(self.np_random.bit_generator.state),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Return to the state that `state_dict` returned, by playing the episode again."""
        self.reset(options=state["options"])
        for action in state["actions"].numpy():
            self.step(action)
        self.np_random.bit_generator.state = json.loads(state["rng"])

    def action_masks(self) -> np.ndarray:
        """sb3-contrib's form of the mask: bool (3N,), drop, compress and keep of each slot in turn."""
        return self.episode.action_mask().reshape(-1)

    def render(self) -> np.ndarray | None:
        """The episode so far as a picture, uint8 (height, width, 3); None without a render_mode."""
        if self.render_mode is None:
            gym.logger.warn('render() was called without a render_mode; make the environment with render_mode="rgb_array"')
            return None
        if self.episode.clip is None:
            raise gym.error.ResetNeeded("call reset() before render()")
        workload, decisions = self.episode.workload, [each for each in self.episode.decisions if each[0] >= 0]
        frames = self.episode.clip.frames[: workload.num_frames]
        return render_workload_episode(workload, frames, self.episode.predicted().cpu().numpy(), decisions)
