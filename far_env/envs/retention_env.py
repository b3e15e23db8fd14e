"""The Gymnasium environment: one rollout of the frozen video model per episode, one retention decision per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from far_env.device import use_one_thread_in_child_process
from far_env.envs.config import RESET_OPTIONS, EpisodeConfig, check_reset_options
from far_env.envs.episodes import MUST_KEEP
from far_env.workload import Workload


def flat_action_mask(mask: np.ndarray) -> np.ndarray:
    """sb3-contrib's form of an int8 mask (…, slots) of 0 must drop, 1 must keep, 2 free: bool (…, 2·slots), drop_ok and
    keep_ok of each slot in turn."""
    pairs = np.stack([mask != MUST_KEEP, mask > 0], axis=-1)
    return pairs.reshape(*mask.shape[:-1], -1)


class FrameRetentionEnv(gym.Env):
    """Choose which past frames a video model keeps in its history.

    ## Description
    FAR, a frame-autoregressive video model, continues a clip frame by frame. Its history may hold at most ``budget`` frames.
    Whenever a new frame makes the history too long, the agent marks the frames to keep; dropped frames do not come back. At
    the end the predicted frames are compared with the true continuation. Rules and quirks are those of the benchmark
    ``ar-video-kv-temporal-policy``, so a policy learned here can be exported to it.

    A host may generate chunks of several frames instead (`far_env.host.protocol`). Then all of this is about chunks: the
    budget, a slot, an age, a step and ``kept_frames`` count them, and the features are those of their latents. AnyFlow-FAR sees
    the newest ``full_chunk_limit`` chunks, the one that is generated among them, at full resolution, and older kept ones
    coarsely. Which these are follows from how many are kept, not from the action: dropping a chunk lets an older one become
    full again, "demote" means keep, and under a budget below the limit (3 in the released models) nothing is coarse.

    ## Action Space
    ``MultiBinary(N)`` with N = max(context frames, budget) + 1 slots: 1 keeps, 0 drops. Histories are right-aligned, the newest
    frame in the last slot. Every vector is legal: padding is ignored, the newest frame always stays, and of too many frames
    the newest stay; ``info["repaired"]`` counts the bits this changed.

    ## Observation Space
    A ``Dict`` of float32 boxes, in [0, 1] but for signals:

    | key | shape | content |
    |---|---|---|
    | frames | (N, 6) | per slot age / N, recentness 1 / (1 + age), boundary score, feature drift, temporal similarity, |
    | | | motion strength m as m / (1 + m); padding is zero. Age is a position in the kept history, not time |
    | mask | (N,) | 1 where a frame is |
    | budget | (3,) | budget / N, step / predicted frames, frames / N |
    | one per name in ``signals`` | (N, …) | see `far_env.contract.SIGNALS`; slots in place of frames, padding is zero |

    ## Starting State
    ``reset`` draws a clip of the split, encodes its context and generates frames until the history exceeds the budget.
    The noise is a function of a seed, by default 42 + clip id as in the benchmark.

    ## Reward
    By default the clip's PSNR in dB at the end of the episode, else 0; see the arguments.

    ## Episode End
    ``terminated`` after the last decision that can influence a frame. Episodes are not truncated, unless a number of steps is
    given to Gymnasium: ``gym.make(…, max_episode_steps=…)`` wraps the environment in `gymnasium.wrappers.TimeLimit`.

    ## Information
    ``clip_id``, ``noise_seed``, ``step``, ``total_steps``, ``max_frames``, ``capacity_mb``, ``action_mask`` (int8 (N,):
    0 must drop, 1 must keep, 2 free), ``kept_frames`` (true frame numbers of the history), ``frame_features`` (N, 4) as
    the benchmark gives them to a policy, ``repaired``, and at the end the clip's metrics under their names.

    ## Rendering
    ``render_mode="rgb_array"`` renders the episode so far as a picture (height, width, 3): the true frames, the context and
    predicted frames below them, and one line of marks per decision, green under frames that stayed and grey under frames that
    did not. All pictures of an environment have one size. ``gym.make(…, render_mode="human")`` shows them in a window, by
    Gymnasium's `HumanRendering`, which needs pygame.

    ## Arguments
    - ``workload``: a registered name ("pan", "cuts", …) or a `far_env.workload.Workload`.
    - ``budget``: frames that may be kept, or one of the benchmark's budget names; of several, each episode draws one.
    - ``reward``: "psnr", "ssim", "lpips" (negated), or a dict of weights such as {"psnr": 0.1, "lpips": -1}.
    - ``telescoping``: pay the change of the running clip score at every decision; the sum is the same.
    - ``metrics``: further metrics for ``info`` at the end.
    - ``split``, ``num_clips``: which clips reset draws from, the first ``num_clips`` of the split.
    - ``host``: "embedded", a released transformer, a host folder or that of a diffusers pipeline, or the name of an installed
      host; None for the workload's default.
    - ``device``, ``precision``: "auto" uses a GPU where there is one; "float32", "bfloat16" or "auto". Neither a surrounding
      ``torch.autocast`` nor torch's default device or dtype changes them.
    - ``memo_bytes``: memory for frames that are generated again, 0 for none. Drawing the same few clips often becomes cheaper;
      results then depend in their last bits on what was computed before.
    - ``signals``: what the agent observes beyond the benchmark's features, names of `far_env.contract.SIGNALS`: of the
      latents ("lat_cos", "column_gap", …) or of the host's attention ("attn_mass", …). Such an agent cannot be exported.
    - ``clip_options``: arguments of the clip source, such as a data folder or the options of a world.
    - ``feedback``: "generated", or "true": after each generated frame the clip's true frame, encoded, enters the history in its
      place, so that errors do not accumulate. Observations are then those of true frames; the reward is still that of the
      generated ones. None for the workload's, "generated" unless it says otherwise.
    - ``render_mode``: None or "rgb_array"; with ``gym.make`` also "human".

    ``reset(options={"clip_id": …, "noise_seed": …, "budget": …})`` plays a given clip. An environment that is made in a child
    process, as by ``gym.make_vec(…, vectorization_mode="async")``, lets torch use one thread there.

    ## References
    Gu et al., Long-Context Autoregressive Video Modeling with Next-Frame Prediction, arXiv 2503.19325.

    ## Version History
    - v0: first version
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 2}

    def __init__(
        self,
        workload: str | Workload = "pan",
        budget: int | str | Sequence[int | str] = 4,
        *,
        render_mode: str | None = None,
        **arguments: Any,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(
                f"unknown render_mode {render_mode!r}; use 'rgb_array' or None, and for a window gym.make or "
                "gymnasium.wrappers.HumanRendering"
            )
        use_one_thread_in_child_process()
        self.render_mode = render_mode
        self.config = EpisodeConfig.from_arguments({"workload": workload, "budget": budget, **arguments})
        self.episodes = self.config.make_episodes(num_rows=1)
        self.action_space = self.episodes.action_space
        self.observation_space = self.episodes.observation_space

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Begin an episode. Options: ``clip_id``, ``noise_seed``, ``budget``. Raises ClipIdError on a clip id out of range."""
        super().reset(seed=seed)
        options = check_reset_options(options)
        requested = {key: options.get(key) for key in RESET_OPTIONS}
        clip_id, noise_seed, budget = self.config.draw(self.np_random, self.episodes.workload, **requested)
        self.episodes.begin([0], [self.config.split], [clip_id], [noise_seed], [budget])
        self.episodes.run([0])
        return self._observation(), self.episodes.info(0)

    def step(self, action: np.ndarray) -> tuple[dict, float, bool, bool, dict]:
        """Keep the marked frames and generate until the next decision or the end."""
        if self.episodes.clips[0] is None:
            raise gym.error.ResetNeeded("call reset() before step()")
        if self.episodes.ended(0):
            raise gym.error.ResetNeeded("the episode is over; call reset() before the next step()")
        action = np.asarray(action)
        if action.shape != self.action_space.shape:
            raise ValueError(f"an action has shape {self.action_space.shape}, got {action.shape}")
        repaired = self.episodes.retain(0, action)
        self.episodes.run([0])
        rewards, finals = self.episodes.rewards([0])
        observation = self._observation()
        info = self.episodes.info(0) | {"repaired": repaired} | (finals[0] or {})
        return observation, float(rewards[0]), self.episodes.ended(0), False, info

    def action_masks(self) -> np.ndarray:
        """sb3-contrib's form of the mask: bool (2N,), drop_ok and keep_ok of each slot in turn."""
        return flat_action_mask(self.episodes.action_mask(0))

    def render(self) -> np.ndarray | None:
        """The episode so far as a picture, uint8 (height, width, 3); None without a render_mode."""
        if self.render_mode is None:
            gym.logger.warn('render() was called without a render_mode; make the environment with render_mode="rgb_array"')
            return None
        if self.episodes.clips[0] is None:
            raise gym.error.ResetNeeded("call reset() before render()")
        return self.episodes.picture(0)

    def _observation(self) -> dict[str, np.ndarray]:
        return {key: value[0] for key, value in self.episodes.observe([0]).items()}
