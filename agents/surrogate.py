"""A stand-in for the host that costs next to nothing: rollouts of true frames, and an estimate of what a host would get wrong.

A video model can only show what it remembers. So the error of a frame is estimated by what the kept frames hold of it: each
latent cell could be copied from the most similar cell of the same row in a kept frame, and inherits that cell's error. What
even the whole history does not hold counts for nothing. PPO can practise on it before it meets the host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from far_env.agents.expert_data import TrueHistories, true_frames
from far_env.agents.oracle import pixel_error_scale, rows_of_cells
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.envs.episodes import EpisodeBatch, Reward
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.frame_meta import FEATURES, frame_features
from far_env.metrics import clip_metrics
from far_env.rollout.memo import FrameMemo, content_key
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.rollout.play import play
from far_env.rollout.signals import column_gaps, latent_cosines
from far_env.workloads import Workload

ESTIMATE = "estimated_psnr"
DRIFT, SIMILARITY = FEATURES.index("feature_drift"), FEATURES.index("temporal_similarity")
NUM_MEASURED = 32
"""Train clips on which the host's own error is measured."""
TOLERANCE = 0.04
"""Share of the squared distance of unrelated cells that two cells of the same content may differ by."""
MEMO_BYTES = 2**30


@dataclass(frozen=True)
class SurrogateCalibration:
    """Constants of the estimate, for one host and world.

    Attributes:
        host_error: mean squared pixel error of a frame when nothing was dropped.
        pixel_scale: mean squared pixel error per summed squared latent error of a frame.
        tolerance: squared distance that two cells of the same content may differ by.
    """

    host_error: float
    pixel_scale: float
    tolerance: float

    @staticmethod
    def of(workload: Workload) -> SurrogateCalibration:
        """Roll the first train clips out with full history."""
        clips = [
            workload.clips.clip("train", clip_id) for clip_id in range(min(NUM_MEASURED, workload.clips.num_clips("train")))
        ]
        rollouts, _ = play(workload, clips, [BENCHMARK_SEED + clip.clip_id for clip in clips], None, 1)
        frames = torch.stack([true_frames(workload, clip) for clip in clips])
        scores = clip_metrics(rollouts.decode(range(len(clips))).float(), frames[:, workload.num_context :], ("psnr",))
        latents = workload.host.autoencoder.encode(frames.to(workload.host.dtype))
        return SurrogateCalibration(
            host_error=float(10 ** -(np.mean([own["psnr"] for own in scores]) / 10)),
            pixel_scale=pixel_error_scale(frames, latents),
            tolerance=TOLERANCE * 2 * float(latents.float().var()) * latents.shape[2],
        )


@dataclass(frozen=True)
class FrameDistances:
    """How alike every two frames of a clip are.

    Attributes:
        distance: float32 (T, T, h, w), of each cell of frame i the squared distance to the nearest cell of its row in frame j.
        nearest: int8 (T, T, h, w), the place of that cell in the row.
        features: float32 (T, T, 4), `frame_features` of frame i where frame j is both the one before it and the oldest.
        lat_cos, column_gap: float32 (T, T) and (T, T, w), see `far_env.contract.SIGNALS`.
    """

    distance: np.ndarray
    nearest: np.ndarray
    features: np.ndarray
    lat_cos: np.ndarray
    column_gap: np.ndarray

    @staticmethod
    def of(latents: Tensor) -> FrameDistances:
        """Compare the frames of a clip (T, C, h, w)."""
        cells = rows_of_cells(latents)
        distance, nearest = torch.cdist(cells[:, :, None], cells[:, None]).square().min(dim=-1)
        count = len(latents)
        pairs = torch.stack([latents.repeat(count, 1, 1, 1), latents.repeat_interleave(count, dim=0)], dim=1)
        features = frame_features(pairs)[:, 1].unflatten(0, (count, count))
        signals = latent_cosines(latents[None])[0], column_gaps(latents[None])[0]
        parts = (distance.permute(1, 2, 0, 3), nearest.permute(1, 2, 0, 3).to(torch.int8), features, *signals)
        return FrameDistances(*(part.contiguous().numpy() for part in parts))


class SurrogateRollouts(TrueHistories):
    """Takes the place of a `far_env.rollout.engine.RolloutBatch`: frames are the clip's own, errors are kept beside them.

    Attributes:
        errors: float32 (rows, T, h, w), squared error that each cell of each frame is expected to have.
    """

    def __init__(self, workload: Workload, num_rows: int, tolerance: float) -> None:
        self.workload = workload
        self.tolerance = tolerance
        self.memo = FrameMemo(MEMO_BYTES)
        shape = workload.host.latent_shape
        super().__init__(torch.zeros(num_rows, workload.num_frames, *shape), workload.num_context)
        self.next = [workload.num_frames] * num_rows
        self.errors = np.zeros((num_rows, workload.num_frames, *shape[1:]), dtype=np.float32)
        self._known = [FrameDistances(*[np.zeros(0)] * 5)] * num_rows

    def begin(self, rows: Sequence[int], clips: Sequence[Clip], noise_seeds: Sequence[int]) -> None:
        """Start rollouts of these clips; there is no noise in them."""
        self.look_up(rows, clips)
        for row in rows:
            self.kept[row] = list(range(self.num_context))
            self.next[row] = self.num_context
            self.errors[row] = 0

    def look_up(self, rows: Sequence[int], clips: Sequence[Clip]) -> None:
        """Let these be the clips of these rows."""
        for row, clip in zip(rows, clips, strict=True):
            self.latents[row], self._known[row] = self._looked_up(clip)

    def advance(self, rows: Sequence[int]) -> None:
        """Append the next true frame of each row, with the error that the history lets one expect of it."""
        for row in rows:
            kept, frame, known = self.kept[row], self.next[row], self._known[row]
            inherited = np.take_along_axis(self.errors[row, kept], known.nearest[frame, kept].astype(np.int64), axis=-1)
            missing = (known.distance[frame, kept] + inherited).min(axis=0) - known.distance[frame, :frame].min(axis=0)
            self.errors[row, frame] = np.maximum(missing - self.tolerance, 0)
        super().advance(rows)

    def features(self, rows: Sequence[int]) -> np.ndarray:
        """`frame_features` of the kept histories, looked up."""
        found = np.zeros((len(rows), max(len(self.kept[row]) for row in rows), len(FEATURES)), dtype=np.float32)
        for place, row in enumerate(rows):
            kept, pairs = self.kept[row], self._known[row].features
            found[place, 0, SIMILARITY] = 1
            found[place, 1 : len(kept)] = pairs[kept[1:], kept[:-1]]
            found[place, 1 : len(kept), DRIFT] = pairs[kept[1:], kept[0], DRIFT]
        return found

    def signals(self, rows: Sequence[int]) -> list[dict[str, np.ndarray]]:
        """lat_cos and column_gap of each row's history, looked up."""
        chosen = [(self._known[row], np.ix_(self.kept[row], self.kept[row])) for row in rows]
        return [{"lat_cos": known.lat_cos[kept], "column_gap": known.column_gap[kept]} for known, kept in chosen]

    def step(self, row: int) -> int:
        """How many frames the row has been given."""
        return self.next[row] - self.num_context

    def finished(self, row: int) -> bool:
        """Whether the row has come to the end (or was never begun)."""
        return self.next[row] >= self.workload.num_frames

    def frame_numbers(self, row: int) -> list[int]:
        """True numbers of the row's history, oldest first."""
        return list(self.kept[row])

    def state_dict(self) -> dict[str, Any]:
        """What is not known from the clips."""
        return {
            "kept": [list(own) for own in self.kept],
            "next": list(self.next),
            "errors": torch.from_numpy(self.errors.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put rows where `state_dict` left them; their clips have to be looked up besides."""
        self.kept, self.next = [list(own) for own in state["kept"]], list(state["next"])
        self.errors = state["errors"].numpy().copy()

    @torch.no_grad()
    def _looked_up(self, clip: Clip) -> tuple[Tensor, FrameDistances]:
        """A clip's latents (T, C, h, w), and how alike its frames are."""
        names = [content_key(clip.clip_id, part) for part in range(6)]  # the clips of an environment are of one split
        parts = [self.memo.get(name) for name in names]
        if any(part is None for part in parts):
            host = self.workload.host
            latents = host.autoencoder.encode(true_frames(self.workload, clip)[None].to(host.dtype))[0].float().cpu()
            parts = [latents, *map(torch.from_numpy, vars(FrameDistances.of(latents)).values())]
            for name, part in zip(names, parts, strict=True):
                self.memo.put(name, part)
        return parts[0], FrameDistances(*(part.numpy() for part in parts[1:]))


class SurrogateEpisodes(EpisodeBatch):
    """Episodes with stand-in rollouts; what they earn is the estimate of the PSNR so far.

    Raises:
        ValueError: on a reward other than PSNR alone, on a reference, or on signals that only a host can tell.
    """

    def __init__(self, workload: Workload, budgets: Sequence[int], num_rows: int, reward: Reward, *options: Any) -> None:
        if set(reward.weights) != {"psnr"} or reward.relative_to is not None:
            raise ValueError("the stand-in estimates PSNR alone: set reward.metric to psnr and reward.relative_to to null")
        super().__init__(workload, budgets, num_rows, reward, *options)

    def new_rollouts(self, num_rows: int) -> SurrogateRollouts:
        """True frames in place of generated ones."""
        if unknown := sorted({*self.signals} - {*SurrogateRollouts.SIGNALS}):
            raise ValueError(f"the stand-in has no {', '.join(unknown)}: set surrogate.total_timesteps to 0")
        self.measured = SurrogateCalibration.of(self.workload)
        return SurrogateRollouts(self.workload, num_rows, self.measured.tolerance)

    def rewards(self, rows: Sequence[int]) -> tuple[np.ndarray, list[dict[str, float] | None]]:
        """What each row earned since the last call, and the final estimate of rows that ended (else None)."""
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
        """PSNR in dB that a host is expected to have so far."""
        frames = self.rollouts.errors[row, self.workload.num_context : self.rollouts.next[row]]
        error = self.measured.host_error + self.measured.pixel_scale * float(frames.sum(axis=(1, 2)).mean())
        return -10 * float(np.log10(error))

    def load_state_dict(self, state: dict) -> None:
        """Restore rows saved by `state_dict`."""
        super().load_state_dict(state)
        begun = [row for row, clip in enumerate(self.clips) if clip is not None]
        self.rollouts.look_up(begun, [self.clips[row] for row in begun])


class SurrogateVectorEnv(FrameRetentionVectorEnv):
    """`FrameRetentionVectorEnv` with stand-in rollouts."""

    episode_class = SurrogateEpisodes
