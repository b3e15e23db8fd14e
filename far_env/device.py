"""Where to compute and in which precision: "auto" is turned into a device and a dtype here, and only here."""

from __future__ import annotations

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
    """``"auto"`` is bfloat16 where matrix units make it fast (CUDA, AMX CPUs), else float32. Raises ValueError if unknown."""
    if precision == "auto":
        fast = device.type == "cuda" or torch.cpu.get_capabilities().get("amx_tile", False)
        return torch.bfloat16 if fast else torch.float32
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; use auto, {' or '.join(PRECISIONS)}")
    return PRECISIONS[precision]
