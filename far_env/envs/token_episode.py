"""One episode over a token memory: a streaming rollout that pauses whenever the memory holds more tokens than the budget."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.device import torch_defaults
from far_env.envs.episodes import ROW_FEATURES, Reward
from far_env.frame_meta import frame_features
from far_env.host.compressor import SPACING
from far_env.host.far_host import require_far
from far_env.metrics import clip_metrics, require_metrics
from far_env.rollout.frame_actions import ACTIONS, COMPRESS, DROP, KEEP, compressed_size, granted, regrouping
from far_env.rollout.streaming import StreamingBatch, check_token_budget
from far_env.rollout.token_cache import CacheView
from far_env.rollout.token_policy import TokenSizes
from far_env.workload import Workload

TOKEN_FEATURES = (*ROW_FEATURES, "compressed", "attention")
"""Columns of ``observation["frames"]``: those of the environment of frames, whether the frame is compressed, and its share of
the attention of the newest frame's queries, mean over layers and heads."""


def check_token_decides(workload: Workload, budget: int) -> None:
    """Raise ValueError if a budget does not hold a frame of the workload, or holds all of them."""
    host = workload.host
    check_token_budget(host, budget)
    full = host.tokens_per_frame
    if budget >= (workload.num_frames - 1) * full:
        raise ValueError(
            f"a budget of {budget} tokens leaves nothing to decide in {workload.name}, whose {workload.num_frames - 1} "
            f"frames before the last have {full} each"
        )


class _NeverAsked:
    """In place of a policy: nothing becomes coarse by itself. It is never asked, as the batch's budget holds everything."""

    attention_frames = 1

    def coarse_frames(self, frames: list[int], sizes: TokenSizes) -> list[int]:
        """None."""
        return []

    def retain(self, view: CacheView) -> Tensor:
        """Never called."""
        raise AssertionError("the budget of an episode's batch holds all frames")


class TokenEpisode:
    """An episode: begun with a clip, run to its next decision, answered, run again, and scored at the end.

    Args:
        workload: clips, host and lengths of the rollouts.
        budgets: tokens that a head may be allowed to keep.
        reward: the scoring.
        metrics: reported at the end, besides those of the reward.

    Raises:
        ValueError: if a budget does not hold a frame, or holds all of them.

    Attributes:
        clip: None before the first episode.
        budget: of this episode.
        num_slots: frames that can be in the memory when a decision is made; they are right-aligned in observations and actions.
        decisions: (step, numbers of the frames that stayed), of this episode.
    """

    def __init__(self, workload: Workload, budgets: Sequence[int], reward: Reward, metrics: Sequence[str] = ()) -> None:
        host = require_far(workload.host, "a memory of tokens")
        self.tokens_per_frame = host.tokens_per_frame
        if any(side // host.transformer.patch_size % SPACING for side in host.latent_shape[1:]):
            raise ValueError(f"a frame of {host.name} has an odd number of rows or columns of tokens, which is not compressed")
        small = compressed_size(self.tokens_per_frame)
        for budget in budgets:
            check_token_decides(workload, budget)
        self.workload, self.reward = workload, reward
        self.metric_names = tuple(dict.fromkeys([*reward.weights, *metrics]))
        require_metrics(self.metric_names)
        self.num_slots = min(workload.num_frames - 1, max(budgets) // small + 1)
        self.clip: Clip | None = None
        self.noise_seed = self.budget = 0
        self.decisions: list[tuple[int, list[int]]] = []
        self._batch: StreamingBatch | None = None
        self._latents: dict[int, Tensor] = {}
        self._generated: list[Tensor] = []
        self._pixels: list[Tensor] = []
        self._rewarded = 0.0
        self._features = np.zeros((self.num_slots, 4), dtype=np.float32)

    @property
    def action_space(self) -> spaces.MultiDiscrete:
        """Drop, compress or keep, per slot."""
        return spaces.MultiDiscrete([len(ACTIONS)] * self.num_slots)

    @property
    def observation_space(self) -> spaces.Dict:
        """See `observe`."""
        shapes = {"frames": (self.num_slots, len(TOKEN_FEATURES)), "mask": (self.num_slots,), "budget": (3,)}
        return spaces.Dict({key: spaces.Box(0.0, 1.0, shape, np.float32) for key, shape in shapes.items()})

    @property
    def ended(self) -> bool:
        """Whether all frames are generated."""
        return self._batch is not None and self._batch.step >= self.workload.num_predict

    @property
    def newest(self) -> int:
        """Number of the newest frame, given ones first; −1 before any."""
        return self._batch.entered + self._batch.step - 1

    @property
    def tokens(self) -> int:
        """Tokens of a head."""
        return self._batch.cache.num_slots

    def begin(self, split: str, clip_id: int, noise_seed: int, budget: int) -> None:
        """Start an episode; nothing of it is run. Raises ClipIdError on a clip id out of range."""
        self.clip = self.workload.clips.clip(split, clip_id)
        self.noise_seed, self.budget = noise_seed, budget
        self.decisions, self._latents, self._generated, self._pixels, self._rewarded = [], {}, [], [], 0.0
        whole = self.workload.num_frames * self.tokens_per_frame
        self._batch = StreamingBatch(self.workload, [self.clip], [noise_seed], _NeverAsked(), whole, enter=False)

    def run(self) -> None:
        """Let frames enter, and generate them, until a decision or the end."""
        batch = self._batch
        while not self.ended and self.tokens <= self.budget:
            if batch.entered < self.workload.num_context:
                batch.enter()
                self._latents[self.newest] = batch.given[0, self.newest]
            else:
                frame = batch.advance()[0]
                self._generated.append(frame)
                self._latents[self.newest] = batch.given[0, self.newest] if self.workload.true_feedback else frame

    def frames(self) -> list[int]:
        """Numbers of the frames in the memory."""
        return self._batch.cache.kept_frames(0)

    def sizes(self) -> list[int]:
        """Tokens of every frame in the memory."""
        frame = self._batch.cache.frame[0, 0, 0]
        return [int((frame == number).sum()) for number in self.frames()]

    def latents(self) -> Tensor:
        """Of the frames in the memory (n, C, h, w)."""
        return torch.stack([self._latents[number] for number in self.frames()])

    def features(self) -> np.ndarray:
        """`far_env.frame_meta.frame_features` of the frames in the memory (n, 4)."""
        return frame_features(self.latents()[None])[0].cpu().numpy()

    def retain(self, action: np.ndarray) -> int:
        """Apply an action (slots,); returns how many of its entries were changed, see `granted`. Padding must be dropped."""
        frames, sizes = self.frames(), self.sizes()
        own = action[self.num_slots - len(frames) :].tolist()
        actions = granted(own, sizes, self.tokens_per_frame, self.budget)
        cache = self._batch.cache
        cache.regroup(regrouping(cache.view(self.newest, self.budget), [dict(zip(frames, actions, strict=True))]))
        kept = [number for number, each in zip(frames, actions, strict=True) if each != DROP]
        self._latents = {number: self._latents[number] for number in kept}
        self.decisions.append((self.newest - self.workload.num_context, kept))
        small = compressed_size(self.tokens_per_frame)
        same = [
            want == got or (size == small and DROP not in (want, got))
            for want, got, size in zip(own, actions, sizes, strict=True)
        ]
        return same.count(False) + int((action[: self.num_slots - len(frames)] != DROP).sum())

    def observe(self) -> dict[str, np.ndarray]:
        """``frames`` (slots, 8), see `TOKEN_FEATURES`, ``mask`` (slots,) and ``budget`` (3,), float32 in [0, 1].

        ``budget`` is the budget and the tokens as shares of all slots' tokens, and between them the frames so far as a share.
        """
        frames = self.frames()
        count, slots = len(frames), self.num_slots
        rows = np.zeros((slots, len(TOKEN_FEATURES)), dtype=np.float32)
        mask = np.zeros(slots, dtype=np.float32)
        ages = np.arange(count - 1, -1, -1, dtype=np.float32)
        content = self.features()
        sizes, attention = self.sizes(), self._attention()
        small = compressed_size(self.tokens_per_frame)
        motion = content[:, -1:] / (1 + content[:, -1:])
        compressed = np.array(sizes) == small
        columns = (ages[:, None] / slots, 1 / (1 + ages[:, None]), content[:, :-1], motion)
        rows[slots - count :] = np.concatenate([*columns, compressed[:, None], np.array(attention)[:, None]], axis=1)
        mask[slots - count :] = 1
        self._features[:] = 0
        self._features[slots - count :] = content
        whole = slots * self.tokens_per_frame
        budget = [self.budget / whole, (self.newest + 1) / self.workload.num_frames, self.tokens / whole]
        return {"frames": rows.clip(0, 1), "mask": mask, "budget": np.clip(budget, 0, 1).astype(np.float32)}

    def action_mask(self) -> np.ndarray:
        """bool (slots, 3): whether a slot may be dropped, compressed and kept; of compressed frames KEEP is COMPRESS."""
        mask = np.zeros((self.num_slots, len(ACTIONS)), dtype=bool)
        mask[:, DROP] = True
        sizes = self.sizes()
        start = self.num_slots - len(sizes)
        mask[start:, COMPRESS] = True
        mask[start:, KEEP] = np.array(sizes) == self.tokens_per_frame
        mask[-1] = [False, False, True]
        return mask

    def earned(self) -> tuple[float, dict[str, float]]:
        """The reward since the last call, and the metrics if the episode has ended."""
        if not self._generated or not (self.ended or self.reward.telescoping):
            return 0.0, {}
        names = self.metric_names if self.ended else tuple(self.reward.weights)
        predicted = self.predicted()[None]
        start = self.workload.num_context
        truth = torch.from_numpy(self.clip.frames[start : start + len(self._generated)])[None].to(predicted.device)
        (metrics,) = clip_metrics(predicted, truth, names)
        score = self.reward.score(metrics)
        reward, self._rewarded = score - self._rewarded, score
        return reward, metrics if self.ended else {}

    @torch_defaults()
    def predicted(self) -> Tensor:
        """Frames generated so far, decoded, float32 (n, 3, H, W)."""
        if new := self._generated[len(self._pixels) :]:
            self._pixels += self.workload.host.autoencoder.decode(torch.stack(new)[None])[0].float()
        side = self.workload.host.frame_size
        return torch.stack(self._pixels) if self._pixels else torch.zeros(0, 3, side, side)

    def info(self) -> dict:
        """The ``info``, as of the last `observe`."""
        return {
            "clip_id": self.clip.clip_id,
            "noise_seed": self.noise_seed,
            "step": self.newest - self.workload.num_context,
            "total_steps": self.workload.num_predict,
            "token_budget": self.budget,
            "tokens": self.tokens,
            "action_mask": self.action_mask(),
            "kept_frames": self.frames(),
            "frame_features": self._features.copy(),
        }

    def _attention(self) -> list[float]:
        """Share of the newest frame's attention that every frame in the memory received."""
        cache = self._batch.cache
        received = cache.received[-1, :, 0].mean(dim=(0, 1)) / self.tokens_per_frame
        frame = cache.frame[0, 0, 0]
        return [float(received[frame == number].sum()) for number in self.frames()]
