"""Metrics of rollouts against the true continuation, those under interventions on the memory included."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.metrics import clip_metrics, psnr
from far_env.rollout.intervention import SWAP, IntervenedFrames, interventions_of, metric_of, partner_of
from far_env.workloads import Workload


def scores_of(
    workload: Workload, clips: Sequence[Clip], predicted: Tensor, metrics: Sequence[str], intervened: IntervenedFrames
) -> tuple[list[dict[str, float]], list[list[float]]]:
    """`all_metrics` of every clip's predicted frames (B, n_predict, 3, H, W), and the PSNR of each frame."""
    truth = np.stack([clip.frames[workload.num_context : workload.num_frames] for clip in clips])
    truth = torch.from_numpy(truth).to(predicted.device)
    return all_metrics(predicted, truth, metrics, intervened), frame_psnr(predicted, truth).tolist()


def all_metrics(
    predicted: Tensor, truth: Tensor, metrics: Sequence[str], intervened: IntervenedFrames
) -> list[dict[str, float]]:
    """`clip_metrics` of every clip, and PSNR under the interventions that are among ``metrics``."""
    scores = clip_metrics(predicted, truth, undisturbed(metrics))
    for name in interventions_of(metrics):
        disturbed = psnr(intervened.decode(name).float(), truth).tolist()
        for values, value in zip(scores, disturbed, strict=True):
            values[metric_of(name)] = value
    return scores


def undisturbed(metrics: Sequence[str]) -> tuple[str, ...]:
    """The metrics that are not measured under an intervention."""
    return tuple(name for name in metrics if not interventions_of([name]))


def frame_psnr(predicted: Tensor, truth: Tensor) -> Tensor:
    """PSNR in dB of every frame: (B, F, 3, H, W) in [0, 1] to (B, F)."""
    return psnr(predicted[:, :, None], truth[:, :, None])


def partner_clip(workload: Workload, split: str, clip_id: int, metrics: Sequence[str]) -> Clip | None:
    """The other clip that a swap needs, None if no swap is measured. Raises VideoError if its file is damaged."""
    if metric_of(SWAP) not in metrics:
        return None
    return workload.clips.clip(split, partner_of(workload.clips, split, clip_id))
