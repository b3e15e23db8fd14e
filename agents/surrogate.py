"""A surrogate of the host that is much cheaper: rollouts of true frames, and an estimate of the errors a host would make.

A video model can only reproduce content that its history contains. So the error of a frame is estimated from the kept frames:
each latent cell could be copied from the most similar cell anywhere in a kept frame, and inherits that cell's error, unless the
workload feeds back true frames, whose cells have none. Error that even the whole history would leave is not counted. No host
generates a frame, and no constant of one enters. PPO trains on the surrogate before it trains with the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from far_env.agents.expert import COST_FLOOR
from far_env.agents.histories import TrueHistories
from far_env.clips.clip import Clip
from far_env.envs.episodes import EpisodeBatch, Reward
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.frame_meta import FEATURES, frame_features
from far_env.latent_cells import nearest_cells
from far_env.rollout.context import true_units
from far_env.rollout.memo import ENTRY_BYTES, FrameMemo, content_key
from far_env.rollout.signals import latent_cosines
from far_env.workload import Workload

ESTIMATE = "estimated_psnr"
DRIFT, SIMILARITY = FEATURES.index("feature_drift"), FEATURES.index("temporal_similarity")
TOLERANCE = 0.04
"""Squared distance up to which two cells have the same content, as a share of the squared distance of unrelated cells."""
MEMO_BYTES = 2**30


@dataclass(frozen=True)
class FrameDistances:
    """Distances and other comparisons of every two frames of a clip.

    Attributes:
        distance: float32 (T, T, cells), of each cell of frame i the squared distance to the nearest cell in frame j.
        nearest: int16 (T, T, cells), the index of that cell.
        features: float32 (T, T, 4), `frame_features` of frame i where frame j is both the one before it and the oldest.
        lat_cos: float32 (T, T), see `far_env.contract.SIGNALS`.
    """

    distance: np.ndarray
    nearest: np.ndarray
    features: np.ndarray
    lat_cos: np.ndarray

    @staticmethod
    def of(latents: Tensor) -> FrameDistances:
        """Compare the frames of a clip (T, C, h, w)."""
        distance, nearest = (part[0] for part in nearest_cells(latents[None], latents[None]))
        count = len(latents)
        pairs = torch.stack([latents.repeat(count, 1, 1, 1), latents.repeat_interleave(count, dim=0)], dim=1)
        features = frame_features(pairs)[:, 1].unflatten(0, (count, count))
        parts = distance, nearest.to(torch.int16), features, latent_cosines(latents[None])[0]
        return FrameDistances(*(part.contiguous().numpy() for part in parts))


def comparison_bytes(workload: Workload) -> int:
    """What is kept in memory of one clip: its latents and its `FrameDistances`."""
    channels, height, width = workload.unit_shape
    frames, cells = workload.num_units, height * width
    numbers = 4 * frames * channels * cells + frames**2 * ((4 + 2) * cells + 4 * len(FEATURES) + 4)
    return numbers + 5 * ENTRY_BYTES


class SurrogateRollouts(TrueHistories):
    """In place of `far_env.rollout.engine.RolloutBatch`: frames are the clip's true ones, with an estimated error of each cell.

    Attributes:
        errors: float32 (rows, T, cells), expected squared error of each cell of each frame, in units of the clip's: 1 where
            nothing is known of it.
    """

    def __init__(self, workload: Workload, num_rows: int) -> None:
        self.workload = workload
        self.memo = FrameMemo(MEMO_BYTES)
        shape = workload.unit_shape
        super().__init__(torch.zeros(num_rows, workload.num_units, *shape), workload.context_units)
        self.next = [workload.num_units] * num_rows
        self.errors = np.zeros((num_rows, workload.num_units, shape[1] * shape[2]), dtype=np.float32)
        self._units = np.ones(num_rows)
        self._distances = [FrameDistances(*[np.zeros(0)] * 4)] * num_rows

    def begin(self, rows: Sequence[int], clips: Sequence[Clip], noise_seeds: Sequence[int]) -> None:
        """Start rollouts of these clips; noise seeds have no effect."""
        self.assign_clips(rows, clips)
        for row in rows:
            self.kept[row] = list(range(self.num_context))
            self.next[row] = self.num_context
            self.errors[row] = 0

    def assign_clips(self, rows: Sequence[int], clips: Sequence[Clip]) -> None:
        """Assign clips to rows: their latents and the comparisons of their frames."""
        for row, clip in zip(rows, clips, strict=True):
            self.latents[row], self._distances[row] = self._comparisons(clip)
            self._units[row] = max(float(self.latents[row].var()) * self.latents.shape[2], 1e-12)

    def advance(self, rows: Sequence[int]) -> None:
        """Append the next true frame of each row, with the error expected from the history."""
        for row in rows:
            kept, frame, distances = self.kept[row], self.next[row], self._distances[row]
            unit = self._units[row]
            sources = distances.distance[frame, kept] / unit
            if not self.workload.true_feedback:
                nearest = distances.nearest[frame, kept].astype(np.int64)
                sources = sources + np.take_along_axis(self.errors[row, kept], nearest, axis=-1)
            missing = sources.min(axis=0)
            missing -= distances.distance[frame, :frame].min(axis=0) / unit
            # Two unrelated cells are twice the variance apart.
            self.errors[row, frame] = np.maximum(missing - 2 * TOLERANCE, 0)
        super().advance(rows)

    def features(self, rows: Sequence[int]) -> np.ndarray:
        """`frame_features` of the kept histories, float32 (R, K, 4), from the comparisons of frames."""
        values = np.zeros((len(rows), max(len(self.kept[row]) for row in rows), len(FEATURES)), dtype=np.float32)
        for index, row in enumerate(rows):
            kept, pairs = self.kept[row], self._distances[row].features
            values[index, 0, SIMILARITY] = 1
            values[index, 1 : len(kept)] = pairs[kept[1:], kept[:-1]]
            values[index, 1 : len(kept), DRIFT] = pairs[kept[1:], kept[0], DRIFT]
        return values

    def signals(self, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """lat_cos of each row's history, from the comparisons of frames."""
        return [{"lat_cos": self._distances[row].lat_cos[np.ix_(self.kept[row], self.kept[row])]} for row in rows]

    def step(self, row: int) -> int:
        """Predicted frames in the row so far."""
        return self.next[row] - self.num_context

    def finished(self, row: int) -> bool:
        """Return whether the row's clip has ended, or none has begun."""
        return self.next[row] >= self.workload.num_units

    def frame_numbers(self, row: int) -> list[int]:
        """True numbers of the row's history, oldest first."""
        return list(self.kept[row])

    def state_dict(self) -> dict[str, Any]:
        """The state that does not follow from the clips."""
        return {
            "kept": [list(kept) for kept in self.kept],
            "next": list(self.next),
            "errors": torch.from_numpy(self.errors.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore rows saved by `state_dict`; afterwards call `assign_clips` with their clips."""
        self.kept, self.next = [list(kept) for kept in state["kept"]], list(state["next"])
        self.errors = state["errors"].numpy().copy()

    @torch.no_grad()
    def _comparisons(self, clip: Clip) -> tuple[Tensor, FrameDistances]:
        """A clip's latents (T, C, h, w), and the comparisons of its frames."""
        names = [content_key(clip.clip_id, part) for part in range(5)]  # the clips of an environment are of one split
        parts = [self.memo.get(name) for name in names]
        if any(part is None for part in parts):
            latents = true_units(self.workload, [clip])[0].float().cpu()
            parts = [latents, *map(torch.from_numpy, vars(FrameDistances.of(latents)).values())]
            for name, part in zip(names, parts, strict=True):
                self.memo.put(name, part)
        return parts[0], FrameDistances(*(part.numpy() for part in parts[1:]))


class SurrogateEpisodes(EpisodeBatch):
    """Episodes with surrogate rollouts, whose reward is the estimated PSNR.

    Raises:
        ValueError: on a reward other than PSNR alone, or on signals that only a host has.
    """

    def __init__(self, workload: Workload, budgets: Sequence[int], num_rows: int, reward: Reward, *options: Any) -> None:
        if set(reward.weights) != {"psnr"}:
            raise ValueError("the surrogate estimates PSNR alone: set reward.metric to psnr")
        super().__init__(workload, budgets, num_rows, reward, *options)

    def new_rollouts(self, num_rows: int) -> SurrogateRollouts:
        """Make rollouts of true frames in place of generated ones."""
        if unknown := sorted({*self.signals} - {*SurrogateRollouts.SIGNALS}):
            raise ValueError(f"the surrogate has no {', '.join(unknown)}: set surrogate.total_timesteps to 0")
        return SurrogateRollouts(self.workload, num_rows)

    def rewards(self, rows: Sequence[int]) -> tuple[np.ndarray, list[dict[str, float] | None]]:
        """Each row's reward since the last call, and the final estimate of rows that ended (else None)."""
        earned, finals = np.zeros(len(rows)), []
        for index, row in enumerate(rows):
            ended = self.ended(row)
            if ended or self.reward.telescoping:
                estimate = self.estimate(row)
                score = self.reward.score({"psnr": estimate})
                earned[index] = score - self._rewarded[row]
                self._rewarded[row] = score
            finals.append({ESTIMATE: estimate} if ended else None)
        return earned, finals

    def estimate(self, row: int) -> float:
        """Expected PSNR in dB of the frames so far: of the estimated errors and `COST_FLOOR` of the clip's variance."""
        errors = self.rollouts.errors[row, self.workload.context_units : self.rollouts.next[row]]
        variance = float(self.clips[row].frames[: self.workload.num_frames].var())
        return -10 * float(np.log10(max(variance, 1e-12) * (COST_FLOOR + float(errors.mean()))))

    def load_state_dict(self, state: dict) -> None:
        """Restore rows saved by `state_dict`."""
        super().load_state_dict(state)
        begun = [row for row, clip in enumerate(self.clips) if clip is not None]
        self.rollouts.assign_clips(begun, [self.clips[row] for row in begun])


class SurrogateVectorEnv(FrameRetentionVectorEnv):
    """`FrameRetentionVectorEnv` with surrogate rollouts."""

    episode_class = SurrogateEpisodes
