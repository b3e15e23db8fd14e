"""The network of LPIPS (arXiv 1801.03924, AlexNet, version 0.1), and AlexNet's ImageNet weights, which are fetched once.

The package lpips is not called, only its calibration file is read: it builds AlexNet with arguments that torchvision deprecated
in 0.13 and may remove. tests/test_metrics.py compares the two.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn

from far_env.errors import MetricUnavailable, WeightsError, first_line
from far_env.hub import HubError, fetch_url
from far_env.tensor_files import file_hash

ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
ALEXNET_HASH = "7be5be79"
"""First hex digits of the file's SHA-256, which torchvision puts into its name."""
ALEXNET_URL = f"https://download.pytorch.org/models/{ALEXNET_FILE}"
_SLICES = (0, 2, 5, 8, 10, 12)
"""Bounds of the layers of AlexNet after which features are compared: each part ends with one of its five ReLUs."""
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and spread of ImageNet's colours, for pixels in [−1, 1]."""
_EPSILON = 1e-10


class PerceptualDistance(nn.Module):
    """Σ over five layers of the mean over positions of the weighted squared difference of features of unit length.

    Args:
        features: the convolutional part of AlexNet.
        weights: per layer float32 (C,), one weight for each of its channels.
    """

    def __init__(self, features: nn.Sequential, weights: list[Tensor]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(features[start:end] for start, end in pairwise(_SLICES))
        for number, weight in enumerate(weights):
            self.register_buffer(f"weight{number}", weight.view(-1, 1, 1))
        self.register_buffer("shift", torch.tensor(_SHIFT).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor(_SCALE).view(3, 1, 1))

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Distances (N,) of images (N, 3, H, W) in [0, 1]."""
        distance = images.new_zeros(len(images))
        images, others = ((2 * batch - 1 - self.shift) / self.scale for batch in (images, others))
        for number, part in enumerate(self.parts):
            images, others = part(images), part(others)
            difference = (_unit(images) - _unit(others)).square()
            distance = distance + (difference * getattr(self, f"weight{number}")).sum(dim=1).mean(dim=(1, 2))
        return distance


def _unit(features: Tensor) -> Tensor:
    """Features (N, C, H, W) whose length over the channels is 1."""
    return features / (features.square().sum(dim=1, keepdim=True).sqrt() + _EPSILON)


def alexnet_path() -> Path:
    """Where the file is or would be: torch's folder of downloaded checkpoints, which torchvision and lpips use too."""
    return Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_FILE


def verify_alexnet() -> Path:
    """The file, after comparing its hash with its name. Raises WeightsError if it is missing or another."""
    path = alexnet_path()
    if not path.exists():
        raise WeightsError(f"AlexNet's weights for LPIPS are not at {path}; far-env weights download lpips fetches them")
    digest = file_hash(path)
    if not digest.startswith(ALEXNET_HASH):
        raise WeightsError(
            f"{path} has SHA-256 {digest[:8]}…, {ALEXNET_HASH}… is expected: delete it and fetch it again with far-env weights "
            "download lpips"
        )
    return path


def download_alexnet() -> Path:
    """Fetch the file (233 MB), with resume, unless it is there; then verify it. Raises WeightsError if that cannot be done."""
    path = alexnet_path()
    try:
        fetch_url(ALEXNET_URL, path, ALEXNET_HASH)
    except HubError as error:
        raise WeightsError(f"{error}; or put the file at {path}") from error
    return verify_alexnet()


@lru_cache(maxsize=2)
def perceptual_network(device: torch.device, path: Path) -> PerceptualDistance:
    """The network on a device, without gradients.

    Raises:
        MetricUnavailable: if AlexNet's file at ``path`` or the calibration in the package lpips cannot be used.
    """
    from torchvision.models import alexnet  # slow to import, and not needed for PSNR

    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        with torch.device("meta"):
            trunk = alexnet(weights=None)
        trunk.load_state_dict(state, assign=True)
    except Exception as error:
        reason = first_line(error)
        raise MetricUnavailable(
            f"LPIPS: the AlexNet weights at {path} cannot be used ({reason}); delete and fetch them again with far-env weights "
            "download lpips"
        ) from error
    return PerceptualDistance(trunk.features, _calibration()).float().eval().to(device).requires_grad_(False)


def _calibration() -> list[Tensor]:
    """The channels' weights from the package lpips, which is found but not imported."""
    spec = importlib.util.find_spec("lpips")
    try:
        (folder,) = spec.submodule_search_locations
        state = torch.load(Path(folder) / "weights" / "v0.1" / "alex.pth", map_location="cpu", weights_only=True)
        return [state[f"lin{number}.model.1.weight"].flatten() for number in range(len(_SLICES) - 1)]
    except Exception as error:
        raise MetricUnavailable(
            f"LPIPS: the calibration of the package lpips cannot be used ({first_line(error)}); "
            "pip install --force-reinstall lpips"
        ) from error
