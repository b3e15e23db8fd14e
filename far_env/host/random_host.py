"""A released host's exact architecture with seeded random weights, for tests and timings that do not need quality."""

from __future__ import annotations

import torch
from torch import nn

from far_env.host.far_host import FARHost
from far_env.host.zoo import find_released

DEVIATION = 0.05
"""Standard deviation of the layers that a new FAR initialises with zeros, which would make every velocity zero."""


def random_host(name: str, device: torch.device, dtype: torch.dtype, seed: int = 0) -> FARHost:
    """A host like the released transformer ``name`` and its autoencoder, the same on every device.

    Raises:
        ValueError: if there is no released transformer of this name.
    """
    released = find_released(name)
    if released.autoencoder is None:
        raise ValueError(f"{name} is an autoencoder; name a transformer, whose autoencoder is included")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        modules = [
            _without_zeros(part.model_class(**part.config)).eval().requires_grad_(False).to(device, dtype)
            for part in (released, find_released(released.autoencoder))
        ]
    transformer, autoencoder = modules
    side = released.frame_size // autoencoder.compression
    shape = (released.config.get("in_channels", 32), side, side)
    return FARHost(f"{name}, random weights", transformer, autoencoder, f"seed{seed}", shape, released.frame_size)


def _without_zeros(model: nn.Module) -> nn.Module:
    """Draw normal values for parameters that are initialised with zeros."""
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=DEVIATION)
    return model
