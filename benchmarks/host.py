"""Seconds per generated frame and peak memory of the benchmark's two hosts at full size, with random weights.

python -m benchmarks.host [--json -] [--device cpu]

FAR-B on 5 context frames and FAR-B-Long on 36, budget 8; the newest frames are kept, so that every eviction re-encodes the
whole history; decoding is not included. On a GPU batches of 1, 16 and 64 in bfloat16 with the workload's 20 ODE steps, and the
peak of what was allocated; on a CPU smaller batches and fewer frames and steps, which the output states, and the peak of the
process so far.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.command import run_benchmark
from far_env.cli import run_guarded
from far_env.clips.worlds import WORLDS
from far_env.contract import NewestFrames
from far_env.device import peak_memory_mib, resolve_device, resolve_precision, timed
from far_env.evaluation.selftest import full_size_workload
from far_env.provenance import git_commit, machine, versions
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.memo import DEFAULT_BYTES, FrameMemo
from far_env.rollout.play import play
from far_env.workloads import BUDGETS, Workload

NAMES = ("ucf101_short_prediction", "dmlab_long_prediction")
BUDGET = BUDGETS["medium_history_budget"]


@dataclass(frozen=True)
class MeasuredLoad:
    """Batch sizes, frames, precision and ODE steps that are measured."""

    batches: tuple[int, ...]
    num_frames: int
    precision: str
    num_steps: int | None


LOADS = {"cuda": MeasuredLoad((1, 16, 64), 8, "bfloat16", None), "cpu": MeasuredLoad((1, 2), 2, "float32", 2)}


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    json: str | None = None
    """ "-" prints one JSON object instead of text."""
    device: str = "auto"
    precision: str | None = None
    """float32, bfloat16 or auto; by default bfloat16 on a GPU, float32 on a CPU."""


def time_batch(workload: Workload, size: int) -> dict[str, float]:
    """Seconds to encode the context of one clip and to generate one frame of it, in a batch, and the peak memory."""
    device = workload.host.device
    clips, seeds = [WORLDS["orbit"].clip("test", i) for i in range(size)], list(range(size))
    if device.type == "cuda":
        play(replace(workload, num_predict=1), clips, seeds, None, BUDGET)  # the first use of a kernel is slower
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    seconds: dict[str, float] = {}
    memo = FrameMemo(DEFAULT_BYTES)
    with timed(seconds, "context_seconds", device):
        RolloutBatch(workload, size, memo).begin(range(size), clips, seeds)
    with timed(seconds, "frame_seconds", device):
        play(workload, clips, seeds, NewestFrames(), BUDGET, memo=memo)
    return {
        "context_seconds": seconds["context_seconds"] / size,
        "frame_seconds": seconds["frame_seconds"] / (size * workload.num_predict),
        "peak_memory_mib": peak_memory_mib(device),
    }


def measure(options: Options, say: Callable[[str], None]) -> dict[str, object]:
    """All measurements; ``say`` receives each line of text as soon as it is measured."""
    device = resolve_device(options.device)
    load = LOADS[device.type]
    precision = str(resolve_precision(options.precision or load.precision, device)).removeprefix("torch.")
    result: dict[str, object] = {
        "machine": machine(device),
        "dtype": precision,
        "threads": torch.get_num_threads(),
        "frames": load.num_frames,
        "budget": BUDGET,
        "reduced": device.type == "cpu",
        "commit": git_commit(),
        "versions": versions(),
        "hosts": {},
    }
    say("{machine}, {dtype}, {frames} frames generated, budget {budget}".format(**result))
    if result["reduced"]:
        say(f"on a CPU: batches of {' and '.join(map(str, load.batches))} only, {load.num_steps} ODE steps")
    say(f"\n{'host':<20}{'context':>8}{'steps':>6}{'batch':>6}{'s / frame':>11}{'s / context':>12}{'peak MiB':>10}")
    for name in NAMES:
        workload, _ = full_size_workload(
            name, device=str(device), precision=precision, num_frames=load.num_frames, num_steps=load.num_steps
        )
        entry = {"workload": name, "context": workload.num_context, "ode_steps": workload.num_steps, "batches": {}}
        host = workload.host.name.split(",")[0]
        result["hosts"][host] = entry
        for size in load.batches:
            try:
                row = time_batch(workload, size)
            except torch.OutOfMemoryError:
                entry["batches"][size] = {"error": "out of memory"}
                say(f"{host:<20}{workload.num_context:>8}{workload.num_steps:>6}{size:>6}  out of memory")
                continue
            entry["batches"][size] = row
            say(
                f"{host:<20}{workload.num_context:>8}{workload.num_steps:>6}{size:>6}{row['frame_seconds']:>11.4f}"
                f"{row['context_seconds']:>12.4f}{row['peak_memory_mib']:>10.0f}"
            )
        del workload
    return result


def run() -> None:
    """Measure and print."""
    run_benchmark(Options, measure, __doc__)


if __name__ == "__main__":
    sys.exit(run_guarded("benchmarks.host", run))
