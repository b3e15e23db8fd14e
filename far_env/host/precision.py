"""The dtype in which a host computes. The precision "auto" is resolved here, and only here."""

from __future__ import annotations

import time

import torch
from torch.nn import functional as F

from far_env.device import PRECISIONS, torch_defaults
from far_env.host.linear import linear

BFLOAT16_CAPABILITY = 8
"""Of the NVIDIA GPUs that multiply matrices in bfloat16 (Ampere and later); older ones emulate it."""
_ROWS, _WIDTH = 2048, 192
"""Of the timed layer, which widens the tokens of a batch as the embedded host's MLP does."""
_REPEATS = 5
_CLEARLY = 1.5


@torch_defaults()
def resolve_precision(precision: str, device: torch.device, training: bool = False) -> torch.dtype:
    """``"auto"`` is bfloat16 where linear layers are clearly faster in it, else float32.

    On a CPU the speed is measured, which takes a few hundredths of a second; its advertised features do not determine it.

    Args:
        training: whether the layers are trained. They are torch's then, and those of a frozen host oneDNN's, whose float32 can
            be twice as fast.

    Raises:
        ValueError: if the precision is unknown.
    """
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.get_device_capability(device)[0] >= BFLOAT16_CAPABILITY
        else:
            fast = _layer_seconds(torch.float32, training) > _CLEARLY * _layer_seconds(torch.bfloat16, training)
        return torch.bfloat16 if fast else torch.float32
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; use auto, {' or '.join(PRECISIONS)}")
    return PRECISIONS[precision]


@torch.no_grad()
def _layer_seconds(dtype: torch.dtype, training: bool) -> float:
    """The fastest of a few calls of one linear layer on the CPU."""
    layer = F.linear if training else linear
    x, weight, bias = (torch.ones(shape, dtype=dtype) for shape in ((_ROWS, _WIDTH), (4 * _WIDTH, _WIDTH), (4 * _WIDTH,)))
    durations = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        layer(x, weight, bias)
        durations.append(time.perf_counter() - start)
    return min(durations)
