"""The features of kept frames that a policy receives, computed from their latents."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from far_env.contract import FrameMeta
from far_env.device import torch_defaults

FEATURES = ("boundary_score", "feature_drift", "temporal_similarity", "motion_strength")
EPS = 1e-8


@torch_defaults()
def frame_features(latents: Tensor, lengths: Tensor | None = None) -> Tensor:
    """Content features of every kept frame, by the benchmark's formulas (float32).

    Args:
        latents: kept history (B, K, C, h, w), oldest first; shorter rows padded at the end.
        lengths: (B,) real frames per row, or None where all are real.

    Returns:
        (B, K, 4) in the order of `FEATURES`, with x_i the flattened latent i; padding rows are zero:
        boundary = min(1, ‖x_i − x_{i−1}‖ / (‖x_{i−1}‖ + 1e-8) / 0.5), drift = min(1, ‖x_i − x_0‖ / (‖x_0‖ + 1e-8)),
        similarity = max(0, cos(x_i, x_{i−1})), motion = mean|x_i − x_{i−1}|; for i = 0: 0, 0, 1 and 0.
    """
    x = latents.float().flatten(2)
    previous = torch.cat([x[:, :1], x[:, :-1]], dim=1)
    change = x - previous
    boundary = (change.norm(dim=-1) / (previous.norm(dim=-1) + EPS) / 0.5).clamp(max=1)
    oldest = x[:, :1]
    drift = ((x - oldest).norm(dim=-1) / (oldest.norm(dim=-1) + EPS)).clamp(max=1)
    similarity = F.cosine_similarity(x, previous, dim=-1, eps=EPS).clamp(min=0)
    similarity[:, 0] = 1
    features = torch.stack([boundary, drift, similarity, change.abs().mean(dim=-1)], dim=-1)
    if lengths is not None:
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        features = features.masked_fill(padding[..., None], 0.0)
    return features


def frame_size_mb(latent_shape: tuple[int, ...]) -> float:
    """MiB that one latent (C, h, w) takes in float32."""
    channels, height, width = latent_shape
    return channels * height * width * 4 / 2**20


def frame_meta_list(features: Tensor, step: int, size_mb: float | Sequence[float]) -> list[FrameMeta]:
    """One row of `frame_features` (N, 4), without padding, as the dataclasses a policy receives.

    Args:
        size_mb: of every frame, or one for each.
    """
    num_frames = len(features)
    sizes = [float(size_mb)] * num_frames if isinstance(size_mb, int | float) else list(size_mb)
    metas = []
    for index, (boundary, drift, similarity, motion) in enumerate(features.tolist()):
        age = num_frames - 1 - index
        metas.append(
            FrameMeta(
                chunk_id=index,
                age=age,
                dynamic_age=age,
                recentness=1.0 / (1.0 + age),
                size_mb=sizes[index],
                access_count=1,
                recent_hit_count=1,
                last_access_step=step,
                boundary_score=boundary,
                feature_drift=drift,
                temporal_similarity=similarity,
                motion_strength=motion,
                keyframe_score=motion,
            )
        )
    return metas
