"""Where to compute and in which precision: "auto" is turned into a device and a dtype here, and only here; what that costs."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(device: str) -> torch.device:
    """``"auto"`` is CUDA where there is one, else the CPU; a GPU comes with its number.

    Raises:
        ValueError: on anything but the CPU and a GPU that torch sees.
    """
    available = torch.cuda.is_available()
    if device == "auto":
        device = "cuda" if available else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; use auto, cpu, cuda or cuda:N") from error
    if resolved.type == "cpu":
        return resolved
    if resolved.type != "cuda":
        raise ValueError(f"device {device!r} is not supported; use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if available else 0
    index = resolved.index
    if index is None and count:
        index = torch.cuda.current_device()
    if index is None or index >= count:
        raise ValueError(f"device {device!r} was asked for, but torch sees {count} CUDA devices here; use auto or cpu")
    return torch.device("cuda", index)


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """``"auto"`` is bfloat16 where matrix products are clearly faster in it, else float32. Raises ValueError if unknown.

    On a CPU that is measured, which takes a few hundredths of a second: features that a CPU claims do not tell it.
    """
    if precision == "auto":
        if device.type == "cuda":
            fast = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            fast = _product_seconds(torch.float32) > 1.5 * _product_seconds(torch.bfloat16)
        return torch.bfloat16 if fast else torch.float32
    if precision not in PRECISIONS:
        raise ValueError(f"unknown precision {precision!r}; use auto, {' or '.join(PRECISIONS)}")
    return PRECISIONS[precision]


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mib(device: torch.device) -> float:
    """Highest memory so far: of the process, or allocated on the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@contextmanager
def timed(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Write down how long the block takes, on the device too."""
    synchronize(device)
    start = time.perf_counter()
    yield
    synchronize(device)
    seconds[name] = time.perf_counter() - start


def _product_seconds(dtype: torch.dtype) -> float:
    """The fastest of five matrix products on the CPU, of a size that the embedded host has."""
    a, b = torch.ones(2048, 192, dtype=dtype), torch.ones(192, 768, dtype=dtype)
    durations = []
    for _ in range(5):
        start = time.perf_counter()
        a @ b
        durations.append(time.perf_counter() - start)
    return min(durations)
