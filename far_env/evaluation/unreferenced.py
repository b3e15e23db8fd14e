"""Metrics of generated videos that need no true continuation: likeness to what was kept, and drift over time.

They are far-env's own. High likeness is no quality by itself, since a video that stands still has the highest; they compare
policies on the same prompts and noise. Of every unit the last frame counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.metrics import COLOUR_DRIFT, KEPT_LPIPS, KEPT_SSIM, lpips, ssim
from far_env.workload import Workload

DRIFT_SHARE = 0.1
"""The share of a video at its beginning and at its end whose colours are compared."""


def unreferenced_metrics(
    workload: Workload, clips: Sequence[Clip], predicted: Tensor, plans: Sequence[Sequence[Mapping]], names: Sequence[str]
) -> list[dict[str, float]]:
    """The named metrics of every clip.

    kept_ssim and kept_lpips: SSIM (highest) or LPIPS (lowest) between a generated unit and any of the units that were in the
    history when it was generated, mean over the generated units that had a history. colour_drift: see `colour_drift`.

    Args:
        predicted: frames (B, F, 3, H, W) in [0, 1].
        plans: of each clip, entries with step, kept and demoted, as in a record.
    """
    scores = []
    for clip, frames, plan in zip(clips, predicted.float().cpu(), plans, strict=True):
        video = torch.cat([torch.from_numpy(clip.frames[: workload.num_context]), frames])
        ends = np.cumsum([unit.frames for unit in workload.units]) - 1
        history = torch.from_numpy(clip.frames[: workload.num_frames]) if workload.true_feedback else video
        pairs = kept_pairs(workload, plan) if {KEPT_SSIM, KEPT_LPIPS} & {*names} else []
        values: dict[str, float] = {}
        for name in names:
            if name == COLOUR_DRIFT:
                values[name] = colour_drift(video)
                continue
            new, kept = (of[ends[[pair[side] for pair in pairs]]] for side, of in enumerate((video, history)))
            if name == KEPT_SSIM:
                likeness = np.array([ssim(a[None], b[None]) for a, b in zip(new, kept, strict=True)])
                best = np.maximum
            else:
                pairs_there = (frames[:, None].to(predicted.device) for frames in (new, kept))
                likeness, best = lpips(*pairs_there).cpu().numpy(), np.minimum
            of_unit = np.array([unit for unit, _ in pairs])
            values[name] = float(np.mean([best.reduce(likeness[of_unit == unit]) for unit in np.unique(of_unit)]))
        scores.append(values)
    return scores


def kept_pairs(workload: Workload, plan: Sequence[Mapping]) -> list[tuple[int, int]]:
    """Each generated unit with each one in the history that it was generated from, by their true numbers.

    Raises:
        ValueError: if no unit had a history.
    """
    kept_after = {entry["step"]: sorted({*entry["kept"], *entry["demoted"]}) for entry in plan}
    history, pairs = list(range(workload.context_units)), []
    for step in range(workload.predict_units):
        new = workload.context_units + step
        pairs += [(new, kept) for kept in history]
        history = kept_after.get(step, [*history, new])
    if not pairs:
        raise ValueError(f"{workload.name} generates a single unit from nothing, so there is nothing it could be like")
    return pairs


def colour_drift(video: Tensor) -> float:
    """How far the colours at the end of a video (F, 3, H, W) in [0, 1] are from those at its beginning.

    The Euclidean distance of (mean, standard deviation) of each channel, six numbers, over the first and the last tenth of the
    frames, at least one.
    """
    count = max(1, int(len(video) * DRIFT_SHARE))
    first, last = (
        torch.cat([part.transpose(0, 1).flatten(1).mean(dim=1), part.transpose(0, 1).flatten(1).std(dim=1, correction=0)])
        for part in (video[:count], video[-count:])
    )
    return float((first - last).norm())
