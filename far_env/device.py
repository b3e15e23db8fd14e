"""Where to compute and in which precision: "auto" is turned into a device and a dtype here, and only here."""

from __future__ import annotations

import time

import torch

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(device: str) -> torch.device:
    """``"auto"`` is CUDA where there is one, else the CPU. Raises ValueError on a device torch cannot use here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no CUDA device here; use auto or cpu")
    return resolved


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """``"auto"`` is bfloat16 where matrix products are clearly faster in it, else float32. Raises ValueError if unknown.

    On a CPU that is measured, which takes a few hundredths of a second: features that a CPU claims do not tell it.
    """
    if precision == "auto":
        fast = device.type == "cuda" or _product_seconds(torch.float32) > 1.5 * _product_seconds(torch.bfloat16)
        return torch.bfloat16 if fast else torch.float32
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; use auto, {' or '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def _product_seconds(dtype: torch.dtype) -> float:
    """The fastest of five matrix products on the CPU, of a size that the embedded host has."""
    a, b = torch.ones(2048, 192, dtype=dtype), torch.ones(192, 768, dtype=dtype)
    durations = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        durations.append(time.perf_counter() - start)
    return min(durations)
