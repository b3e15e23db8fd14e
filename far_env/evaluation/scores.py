"""Metrics of rollouts against the true continuation, those under interventions on the memory included."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.device import upload
from far_env.evaluation.unreferenced import unreferenced_metrics
from far_env.metrics import UNREFERENCED, clip_metrics, psnr
from far_env.rollout.intervention import SWAP, IntervenedFrames, interventions_of, metric_of, partner_of
from far_env.workload import Workload


def scores_of(
    workload: Workload,
    clips: Sequence[Clip],
    predicted: Tensor,
    metrics: Sequence[str],
    intervened: IntervenedFrames,
    plans: Sequence[Sequence[Mapping]],
) -> tuple[list[dict[str, float]], list[list[float]]]:
    """The metrics of every clip's predicted frames (B, n_predict, 3, H, W), and the PSNR of each frame.

    Without true frames there are `UNREFERENCED` metrics alone, and no PSNR.

    Args:
        plans: of each clip, as in a record.
    """
    alone = tuple(name for name in metrics if name in UNREFERENCED)
    without = unreferenced_metrics(workload, clips, predicted, plans, alone) if alone else [{} for _ in clips]
    if not workload.has_truth:
        return without, [[] for _ in clips]
    truth = np.stack([clip.frames[workload.num_context : workload.num_frames] for clip in clips])
    truth = upload(torch.from_numpy(truth), predicted.device)
    against = all_metrics(predicted, truth, [name for name in metrics if name not in UNREFERENCED], intervened)
    return [a | b for a, b in zip(against, without, strict=True)], frame_psnr(predicted, truth).tolist()


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
    """The metrics that are not measured under an intervention, those without a reference included."""
    return tuple(name for name in metrics if not interventions_of([name]))


def frame_psnr(predicted: Tensor, truth: Tensor) -> Tensor:
    """PSNR in dB of every frame: (B, F, 3, H, W) in [0, 1] to (B, F)."""
    return psnr(predicted[:, :, None], truth[:, :, None])


def partner_clip(workload: Workload, split: str, clip_id: int, metrics: Sequence[str]) -> Clip | None:
    """The other clip that a swap needs, None if no swap is measured. Raises VideoError if its file is damaged."""
    if metric_of(SWAP) not in metrics:
        return None
    return workload.clips.clip(split, partner_of(workload.clips, split, clip_id))
