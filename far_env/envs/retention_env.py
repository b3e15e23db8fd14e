"""The Gymnasium environment: one rollout of the frozen video model per episode, one retention decision per step."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from far_env.clips.clip import SPLITS, check_clip_id
from far_env.contract import RetentionPolicy
from far_env.envs.episodes import MUST_KEEP, ROW_FEATURES, EpisodeBatch, Reward
from far_env.envs.rendering import render_episode
from far_env.errors import unknown_name
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.workloads import Workload, make_workload, resolve_budgets

RESET_OPTIONS = ("clip_id", "noise_seed", "budget")


class EpisodeSettings:
    """What the single and the vector environment share: arguments to an `EpisodeBatch`, its spaces, and drawing clips."""

    def __init__(
        self,
        num_rows: int,
        workload: str | Workload,
        budget: int | str | Sequence[int | str],
        reward: str | dict[str, float],
        relative_to: str | RetentionPolicy | None,
        telescoping: bool,
        metrics: Sequence[str],
        split: str,
        num_clips: int | None,
        host: str | None,
        device: str,
        precision: str,
        memo_bytes: int,
        signals: Sequence[str],
        clip_options: dict[str, Any] | None,
        episode_class: type[EpisodeBatch] = EpisodeBatch,
    ) -> None:
        if isinstance(workload, str):
            workload = make_workload(workload, host=host, device=device, precision=precision, **(clip_options or {}))
        if split not in SPLITS:
            raise ValueError(unknown_name("split", split, SPLITS))
        available = workload.clips.num_clips(split)
        if available == 0:
            raise ValueError(f"{workload.name}/{split} has no clips; use another split or more data")
        if num_clips is not None and not 1 <= num_clips <= available:
            raise ValueError(f"num_clips must lie in 1 to {available}, the clips of {workload.name}/{split}; got {num_clips}")
        self.budgets = resolve_budgets(budget)
        self.split = split
        self.num_clips = available if num_clips is None else num_clips
        scoring = Reward.make(reward, relative_to, telescoping)
        self.episodes = episode_class(workload, self.budgets, num_rows, scoring, metrics, memo_bytes, signals)
        slots = self.episodes.num_slots
        self.action_space = spaces.MultiBinary(slots)
        self.observation_space = spaces.Dict(
            {
                "frames": spaces.Box(0.0, 1.0, (slots, len(ROW_FEATURES)), np.float32),
                "mask": spaces.Box(0.0, 1.0, (slots,), np.float32),
                "budget": spaces.Box(0.0, 1.0, (3,), np.float32),
                **{
                    name: spaces.Box(-np.inf, np.inf, self.episodes.signal_shape(name), np.float32)
                    for name in self.episodes.signals
                },
            }
        )

    def draw(
        self, rng: np.random.Generator, clip_id: int | None, noise_seed: int | None, budget: int | None
    ) -> tuple[int, int, int]:
        """A clip id, a noise seed and a budget: the given ones, else random ones and the benchmark's seed for the clip."""
        if clip_id is None:
            clip_id = int(rng.integers(self.num_clips))
        clip_id = operator.index(clip_id)
        check_clip_id(self.episodes.workload.clips, self.split, clip_id)
        if budget is None:
            # Nothing is drawn where there is no choice.
            budget = self.budgets[0] if len(self.budgets) == 1 else int(rng.choice(self.budgets))
        elif budget not in self.budgets:
            known = ", ".join(map(str, self.budgets))
            raise ValueError(f"budget {budget} is none of those that the environment was made with: {known}")
        return clip_id, BENCHMARK_SEED + clip_id if noise_seed is None else operator.index(noise_seed), operator.index(budget)


def check_reset_options(options: dict[str, Any] | None, known: Sequence[str] = RESET_OPTIONS) -> dict[str, Any]:
    """The options as a dict; raises ValueError on a key that reset does not know."""
    options = dict(options or {})
    for key in options:
        if key not in known:
            raise ValueError(unknown_name("reset option", key, known))
    return options


def flat_action_mask(mask: np.ndarray) -> np.ndarray:
    """sb3-contrib's form of an int8 mask (…, slots) of 0 must drop, 1 must keep, 2 free: bool (…, 2·slots), drop_ok and
    keep_ok of each slot in turn."""
    pairs = np.stack([mask != MUST_KEEP, mask > 0], axis=-1)
    return pairs.reshape(*mask.shape[:-1], -1)


class FrameRetentionEnv(gym.Env):
    """Which past frames may a video model still see?

    ## Description
    FAR, a frame-autoregressive video model, continues a clip frame by frame. Its history may hold at most ``budget`` frames.
    Whenever a new frame makes the history too long, the agent marks the frames to keep; what is dropped is gone. At the end
    the predicted frames are compared with the true continuation. Rules and quirks are those of the benchmark
    ``ar-video-kv-temporal-policy``, so a policy learned here can be exported to it.

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
    ``terminated`` after the last decision that can influence a frame. Episodes are never truncated.

    ## Information
    ``clip_id``, ``noise_seed``, ``step``, ``total_steps``, ``max_frames``, ``capacity_mb``, ``action_mask`` (int8 (N,):
    0 must drop, 1 must keep, 2 free), ``kept_frames`` (true frame numbers of the history), ``frame_features`` (N, 4) as
    the benchmark hands them to a policy, ``repaired``, and at the end the clip's metrics under their names.

    ## Arguments
    - ``workload``: a registered name ("pan", "cuts", …) or a `far_env.workloads.Workload`.
    - ``budget``: frames that may be kept, or one of the benchmark's budget names; of several, each episode draws one.
    - ``reward``: "psnr", "ssim", "lpips" (negated), or a dict of weights such as {"psnr": 0.1, "lpips": -1}.
    - ``relative_to``: subtract the score of "recent_fill", "full_history" or a policy object on the same clip and noise.
    - ``telescoping``: pay the change of the running clip score at every decision; the sum is the same.
    - ``metrics``: further metrics for ``info`` at the end.
    - ``split``, ``num_clips``: which clips reset draws from, the first ``num_clips`` of the split.
    - ``host``: "embedded", a released transformer or a host folder; None for the workload's own.
    - ``device``, ``precision``: "auto" uses a GPU where there is one; "float32", "bfloat16" or "auto".
    - ``memo_bytes``: memory for frames that come up again, 0 for none. Drawing the same few clips often becomes cheaper;
      results then depend on what came before in their last bits.
    - ``signals``: what the agent may see beyond the benchmark's matrix, names of `far_env.contract.SIGNALS`: of the
      latents ("lat_cos", "column_gap", …) or of the host's attention ("attn_mass", …). Such an agent cannot be exported.
    - ``clip_options``: arguments of the clip source, such as a data folder.
    - ``render_mode``: None or "rgb_array".

    ``reset(options={"clip_id": …, "noise_seed": …, "budget": …})`` plays a given clip.

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
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, *self.metadata["render_modes"]):
            raise ValueError(f"unknown render_mode {render_mode!r}; use 'rgb_array' or None")
        self.render_mode = render_mode
        self._settings = EpisodeSettings(
            1,
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
        )
        self.episodes = self._settings.episodes
        self.action_space = self._settings.action_space
        self.observation_space = self._settings.observation_space
        self._history: list[tuple[int, list[int]]] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[dict, dict]:
        """Begin an episode. Options: ``clip_id``, ``noise_seed``, ``budget``. Raises ClipIdError on a clip id out of range."""
        super().reset(seed=seed)
        options = check_reset_options(options)
        clip_id, noise_seed, budget = self._settings.draw(self.np_random, *(options.get(key) for key in RESET_OPTIONS))
        self.episodes.begin([0], [self._settings.split], [clip_id], [noise_seed], [budget])
        self.episodes.run([0])
        self._history = []
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
        self._history.append((self.episodes.last_step(0), list(self.episodes.rollouts.frame_numbers(0))))
        self.episodes.run([0])
        rewards, finals = self.episodes.rewards([0])
        observation = self._observation()
        info = self.episodes.info(0) | {"repaired": repaired} | (finals[0] or {})
        return observation, float(rewards[0]), self.episodes.ended(0), False, info

    def action_masks(self) -> np.ndarray:
        """sb3-contrib's form of the mask: bool (2N,), drop_ok and keep_ok of each slot in turn."""
        return flat_action_mask(self.episodes.action_mask(0))

    def render(self) -> np.ndarray | None:
        """The episode so far as a picture (height, width, 3) uint8: truth, prediction, and below each step the kept frames."""
        if self.render_mode is None:
            gym.logger.warn('render() was called without a render_mode; make the environment with render_mode="rgb_array"')
            return None
        if self.episodes.clips[0] is None:
            raise gym.error.ResetNeeded("call reset() before render()")
        workload = self.episodes.workload
        clip = self.episodes.clips[0].frames[: workload.num_frames]
        predicted = self.episodes.predicted([0])[0].cpu().numpy()
        return render_episode(clip, predicted, self._history, workload.num_context)

    def _observation(self) -> dict[str, np.ndarray]:
        return {key: value[0] for key, value in self.episodes.observe([0]).items()}
