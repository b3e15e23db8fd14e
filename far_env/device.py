"""Where to compute and with how many threads, and what it costs. The device "auto" is resolved here, and only here."""

from __future__ import annotations

import math
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_device(device: str) -> torch.device:
    """``"auto"`` is CUDA where there is one, else the CPU; a GPU comes with its number.

    Raises:
        ValueError: on anything but the CPU and a GPU that torch finds, or on a GPU in a process that was forked from one that
            used it.
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
        raise ValueError(f"device {device!r} is not available: torch finds {count} CUDA devices here; use auto or cpu")
    if torch.cuda._is_in_bad_fork():
        raise ValueError(
            f"device {device!r} cannot be used in a process forked from one that used the GPU; start processes with "
            "context='spawn' (Gymnasium) or start_method='spawn' (Stable-Baselines3), or use device='cpu'"
        )
    return torch.device("cuda", index)


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Treat denormal floats as zero during the block, or the function that this decorates; afterwards as before.

    Training drives many values towards zero, and denormal floats make CPU kernels three times slower. The setting is the
    thread's: what is left on changes the floats of whatever runs next in the process, Python's too.
    """
    before = sys.float_info.min / 2 == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def use_one_thread_in_child_process() -> None:
    """Let torch use one thread if this is a child process started by multiprocessing, as torch's own data loaders do.

    Vectorised environments run one process per environment. With torch's default, as many threads as cores in each, the
    threads wait for one another: two such environments on two cores are about a hundred times slower than with one thread each.
    And in a forked process, more than one would wait indefinitely for the parent's.
    """
    if multiprocessing.parent_process() is not None:
        torch.set_num_threads(1)


@contextmanager
def torch_defaults() -> Iterator[None]:
    """Compute as if torch.autocast, torch.set_default_device and torch.set_default_dtype had not been called.

    The precision of a host is an argument, and what its code creates without a device belongs on the CPU in float32. Usable as
    a decorator.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        for device_type in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        # PyTorch 2.9's get_default_device raises after set_default_device(None).
        if torch.empty(0).device.type != "cpu":
            # Entered only where needed, because it makes every call of torch slower.
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


def upload(values: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Values on the device, in another dtype if one is given.

    To a GPU they go through pinned memory, so that the program prepares its next work while they are copied.
    """
    if device.type == "cuda" and values.device.type == "cpu":
        values = values.pin_memory().to(device, non_blocking=True)
    return values.to(device=device, dtype=dtype)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, where there is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mib(device: torch.device) -> float:
    """Highest memory so far: of the process, or what torch took of the GPU, used or not; NaN where the system does not count it
    (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device) / 2**20
    try:
        import resource
    except ImportError:
        return math.nan
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * bytes_per_unit / 2**20


def free_bytes(device: torch.device) -> int | None:
    """Memory that new tensors can take: of the GPU, with what torch holds unused, or of the system; None if it does not say.

    What CUDA graphs need when they are repeated is held unused, too, but nothing else can have it.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        of_graphs = sum(
            block["size"]
            for segment in torch.cuda.memory_snapshot()
            if segment["device"] == device.index and tuple(segment["segment_pool_id"]) != (0, 0)
            for block in segment["blocks"]
            if block["state"] == "inactive"
        )
        return torch.cuda.mem_get_info(device)[0] + unused - of_graphs
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


@contextmanager
def timed(seconds: dict[str, float], name: str, device: torch.device) -> Iterator[None]:
    """Record the duration of the block, work on the device included."""
    synchronize(device)
    start = time.perf_counter()
    yield
    synchronize(device)
    seconds[name] = time.perf_counter() - start


def _use_one_thread_after_fork() -> None:
    """The threads of OpenMP do not survive a fork: a child that relies on them waits indefinitely."""
    torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_use_one_thread_after_fork)
