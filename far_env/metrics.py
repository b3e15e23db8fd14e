"""Quality of predicted frames against the true continuation, per clip, as the benchmark and as FAR's authors compute it."""

from __future__ import annotations

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from far_env.device import torch_defaults
from far_env.errors import MetricUnavailable, unknown_name
from far_env.perceptual import alexnet_path, perceptual_network

METRICS = ("psnr", "ssim", "lpips")
"""As the benchmark computes them."""
FAR_METRICS = ("far_psnr", "far_lpips")
"""As the program of FAR's authors (github.com/showlab/FAR) computes them, to compare with their tables; its SSIM is ours."""
LOWER_IS_BETTER = ("lpips", "far_lpips")
NEED_ALEXNET = frozenset({"lpips", "far_lpips"})
_SSIM_RADIUS, _SSIM_SIGMA = 5, 1.5
_SSIM_C1, _SSIM_C2 = 0.01**2, 0.03**2
_LPIPS_FRAMES = 256
"""Frames that LPIPS compares at once, so that its memory does not grow with the number of clips and their length."""


def psnr(predicted: Tensor, truth: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB, one MSE over all frames of a clip.

    Args:
        predicted, truth: (..., F, 3, H, W) in [0, 1]; compared in float32.

    Returns:
        float32 (...); equal clips give infinity.
    """
    mse = (predicted.float() - truth.float()).square().flatten(-4).mean(dim=-1)
    return -10 * mse.log10()


def far_psnr(predicted: Tensor, truth: Tensor) -> Tensor:
    """The mean over frames of every frame's PSNR in dB, (..., F, 3, H, W) to (...); never below `psnr`."""
    return psnr(predicted.unsqueeze(-4), truth.unsqueeze(-4)).mean(dim=-1)


def ssim(predicted: Tensor, truth: Tensor) -> float:
    """Structural similarity of one clip (F, 3, H, W) in [0, 1], the mean over frames.

    Gaussian window 11, σ 1.5, K1 0.01, K2 0.03, population covariance, averaged over the whole image with mirrored borders
    (Wang et al. 2004). All frames at once; bit for bit what scikit-image finds for frames mirrored by the 5 pixels it crops.
    """
    margin = ((0, 0), (0, 0), *[(_SSIM_RADIUS, _SSIM_RADIUS)] * 2)
    a, b = (np.pad(clip.float().cpu().numpy(), margin, mode="reflect") for clip in (predicted, truth))
    mean_a, mean_b = _blurred(a), _blurred(b)
    variance_a, variance_b = _blurred(a * a) - mean_a * mean_a, _blurred(b * b) - mean_b * mean_b
    covariance = _blurred(a * b) - mean_a * mean_b
    alike = (2 * mean_a * mean_b + _SSIM_C1) * (2 * covariance + _SSIM_C2)
    similarity = alike / ((mean_a**2 + mean_b**2 + _SSIM_C1) * (variance_a + variance_b + _SSIM_C2))
    inside = slice(_SSIM_RADIUS, -_SSIM_RADIUS)
    scores = [[channel[inside, inside].mean(dtype=np.float64) for channel in image] for image in similarity]
    return float(np.mean(np.array(scores, dtype=np.float32).mean(axis=1)))


def _blurred(images: np.ndarray) -> np.ndarray:
    """Images (F, 3, H, W) weighted by a Gaussian window of 11 by 11 pixels."""
    return gaussian_filter(images, (0, 0, _SSIM_SIGMA, _SSIM_SIGMA), radius=_SSIM_RADIUS)


def lpips_unavailable() -> str | None:
    """None where LPIPS can be computed, else one sentence: why not and which command helps. Never touches the network."""
    path = alexnet_path()
    if path.exists():
        return None
    return (
        f"LPIPS needs AlexNet's ImageNet weights, which are not at {path}; far-env weights download lpips fetches them (233 MB)"
    )


def require_metrics(names: tuple[str, ...] | list[str]) -> None:
    """Raise ValueError for an unknown metric and `MetricUnavailable` for one that cannot be computed here."""
    for name in names:
        if name not in (*METRICS, *FAR_METRICS):
            raise ValueError(unknown_name("metric", name, (*METRICS, *FAR_METRICS)))
    if not NEED_ALEXNET.isdisjoint(names) and (reason := lpips_unavailable()):
        raise MetricUnavailable(reason)


@torch.no_grad()
def lpips(predicted: Tensor, truth: Tensor) -> Tensor:
    """Learned perceptual distance (arXiv 1801.03924; AlexNet, version 0.1), lower is better, the mean over a clip's frames.

    Args:
        predicted, truth: (..., F, 3, H, W) in [0, 1].

    Returns:
        float32 (...).

    Raises:
        MetricUnavailable: where AlexNet's weights are not on disk.
    """
    require_metrics(["lpips"])
    network = perceptual_network(predicted.device, alexnet_path())
    shape = predicted.shape[:-3]
    frames = zip(predicted.flatten(0, -4).split(_LPIPS_FRAMES), truth.flatten(0, -4).split(_LPIPS_FRAMES), strict=True)
    distances = torch.cat([network(images.float(), others.float()) for images, others in frames])
    return distances.view(shape).mean(dim=-1)


def far_lpips(predicted: Tensor, truth: Tensor) -> Tensor:
    """`lpips` of pixels that are left in [0, 1], where the network expects [−1, 1]: the published numbers were measured so."""
    return lpips((predicted + 1) / 2, (truth + 1) / 2)


@torch_defaults()
def clip_metrics(predicted: Tensor, truth: Tensor, names: tuple[str, ...]) -> list[dict[str, float]]:
    """The named metrics of every clip in a batch (B, F, 3, H, W), one dict per clip."""
    require_metrics(names)
    columns: dict[str, list[float]] = {}
    for name, function in (("psnr", psnr), ("far_psnr", far_psnr), ("lpips", lpips), ("far_lpips", far_lpips)):
        if name in names:
            columns[name] = function(predicted, truth).tolist()
    if "ssim" in names:
        columns["ssim"] = [ssim(a, b) for a, b in zip(predicted, truth, strict=True)]
    ordered = {name: columns[name] for name in (*METRICS, *FAR_METRICS) if name in columns}
    return [{name: values[row] for name, values in ordered.items()} for row in range(len(predicted))]
