"""Frames per second of the benchmark's two hosts at full size, with random weights, against the loop without cache and batch.

python -m benchmarks.host [--json -] [--device cpu]

FAR-B on 5 context frames and FAR-B-Long on 36, budget 8; the newest frames are kept, so that every eviction re-encodes the
whole history. Frames per second are those of the second half of a rollout, decisions included, decoding not. Beside them:

- how many times that is the plain loop, which computes one frame of one clip from the same number of kept frames, all of
  them at every ODE step, in the same precision;
- the share of the speed of a large matrix product in this precision, measured in this run; operations of products and of
  attention are counted;
- seconds to encode a clip's context, and the peak memory: of what was allocated on a GPU, of the process so far on a CPU;
- the mean PSNR of the first clips less that of the reference rollout in float32.

On a GPU batches of 1 to 64 in bfloat16 with the workload's 20 ODE steps, after a rollout in which CUDA graphs are recorded;
on a CPU smaller batches and fewer frames and steps, which the output states.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.command import run_benchmark
from benchmarks.rollout import matmul_rate
from far_env.agents.run_costs import counted, on_meta
from far_env.cli import run_guarded
from far_env.clips.clip import Clip
from far_env.clips.worlds import WORLDS
from far_env.contract import NewestFrames
from far_env.device import peak_memory_mib, resolve_device, synchronize, timed
from far_env.evaluation.selftest import full_size_workload
from far_env.host.precision import resolve_precision
from far_env.metrics import psnr
from far_env.provenance import git_commit, machine, versions
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.memo import DEFAULT_BYTES, FrameMemo
from far_env.rollout.play import play
from far_env.rollout.reference import reference_rollout
from far_env.workload import Workload
from far_env.workloads import BUDGETS

NAMES = ("ucf101_short_prediction", "dmlab_long_prediction")
BUDGET = BUDGETS["medium_history_budget"]


@dataclass(frozen=True)
class MeasuredLoad:
    """What is measured on one kind of device.

    Attributes:
        batches: sizes.
        num_frames: that are generated in a rollout, at least 2.
        precision, num_steps: None is the workload's number of ODE steps.
        num_compared: clips whose PSNR is compared.
        product_size: side of the matrices whose product is timed.
    """

    batches: tuple[int, ...]
    num_frames: int
    precision: str
    num_steps: int | None
    num_compared: int
    product_size: int


LOADS = {
    "cuda": MeasuredLoad((1, 4, 16, 64), 12, "bfloat16", None, 2, 8192),
    "cpu": MeasuredLoad((1, 2), 2, "float32", 2, 1, 2048),
}


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    json: str | None = None
    """ "-" prints one JSON object instead of text."""
    device: str = "auto"
    precision: str | None = None
    """float32, bfloat16 or auto; by default bfloat16 on a GPU, float32 on a CPU."""


def made_clips(count: int) -> tuple[list[Clip], list[int]]:
    """Clips and their noise seeds."""
    return [WORLDS["orbit"].clip("test", i) for i in range(count)], list(range(count))


def time_batch(workload: Workload, size: int, plain_psnr: Sequence[float]) -> dict[str, float]:
    """Seconds to encode a clip's context and to generate one of its frames in a batch, peak memory, and the change of PSNR.

    Args:
        plain_psnr: of the first clips by the reference rollout.
    """
    device, (clips, seeds) = workload.host.device, made_clips(size)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        play(workload, clips, seeds, NewestFrames(), BUDGET)  # records graphs; the first use of a kernel is slower, too
    seconds: dict[str, float] = {}
    memo = FrameMemo(DEFAULT_BYTES)
    with timed(seconds, "context_seconds", device):
        RolloutBatch(workload, size, memo).begin(range(size), clips, seeds)
    ends: list[float] = []

    def note(_: int) -> None:
        synchronize(device)
        ends.append(time.perf_counter())

    batch, _ = play(workload, clips, seeds, NewestFrames(), BUDGET, memo=memo, on_frame=note)
    half = workload.num_predict // 2
    compared = range(min(size, len(plain_psnr)))
    found = psnr_of(workload, clips, batch.decode(compared))
    return {
        "context_seconds": seconds["context_seconds"] / size,
        "frame_seconds": (ends[-1] - ends[half - 1]) / (size * (workload.num_predict - half)),
        "peak_memory_mib": peak_memory_mib(device),
        "psnr_change_db": sum(found[i] - plain_psnr[i] for i in compared) / len(compared),
    }


def psnr_of(workload: Workload, clips: Sequence[Clip], frames: Tensor) -> list[float]:
    """PSNR in dB of predicted frames (B, n_predict, 3, H, W) of the first clips."""
    first = slice(workload.num_context, workload.num_frames)
    truth = torch.stack([torch.from_numpy(clip.frames[first]) for clip in clips[: len(frames)]])
    return psnr(frames, truth.to(frames.device)).tolist()


def plain_psnr(workload: Workload, count: int) -> list[float]:
    """PSNR in dB of the first clips by the reference rollout."""
    clips, seeds = made_clips(count)
    rollouts = [
        reference_rollout(workload, clip, NewestFrames(), BUDGET, seed) for clip, seed in zip(clips, seeds, strict=True)
    ]
    return psnr_of(workload, clips, torch.stack([rollout.frames for rollout in rollouts]))


def kept_at_the_end(workload: Workload) -> int:
    """Frames from which the last one of a rollout is generated."""
    return min(BUDGET, workload.num_frames - 1)


def plain_seconds(workload: Workload) -> float:
    """Seconds for the last frame of a rollout of one clip by the plain loop; the latents are random."""
    host, num_kept, seconds = workload.host, kept_at_the_end(workload), {}
    latents = torch.randn(num_kept + 1, *host.latent_shape, generator=torch.Generator().manual_seed(0))
    *kept, noise = latents.to(host.device, host.dtype)
    if host.device.type == "cuda":
        host.generate(kept, noise, workload.conditions())
    with timed(seconds, "frame", host.device):
        host.generate(kept, noise, workload.conditions())
    return seconds["frame"]


def frame_flops(workload: Workload) -> int:
    """Mean floating-point operations of a frame in the second half of a rollout, counted without computing them."""
    batch, counts = RolloutBatch(on_meta(workload), 1), []
    batch.begin([0], *made_clips(1))
    while not batch.finished(0):
        counts.append(counted(lambda: batch.advance([0])))
        if (length := batch.history_length(0)) > BUDGET:
            batch.retain(0, range(length - BUDGET, length))
    counts = counts[len(counts) // 2 :]
    return sum(counts) // len(counts)


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
    rate = matmul_rate(resolve_precision(precision, device), device, load.product_size)
    result["product_flops_per_second"] = rate
    say(f"a product of matrices of {load.product_size} rows and columns: {rate / 1e12:.2f} TFLOP/s")
    say(
        f"\n{'host':<18}{'context':>8}{'steps':>6}{'batch':>6}{'frames/s':>10}{'x plain':>9}{'of product':>11}"
        f"{'s / context':>12}{'peak MiB':>10}{'PSNR dB':>10}"
    )
    for name in NAMES:
        lengths = {"num_frames": load.num_frames, "num_steps": load.num_steps}
        workload, _ = full_size_workload(name, device=str(device), precision="float32", **lengths)
        expected = plain_psnr(workload, load.num_compared)
        plain = {"float32": plain_seconds(workload)}
        if precision != "float32":
            workload, _ = full_size_workload(name, device=str(device), precision=precision, **lengths)
            plain[precision] = plain_seconds(workload)
        flops = frame_flops(workload)
        entry = {
            "workload": name,
            "context": workload.num_context,
            "ode_steps": workload.num_steps,
            "plain_frame_seconds": plain,
            "plain_psnr_db": expected,
            "frame_flops": flops,
            "batches": {},
        }
        host = workload.host.name.split(",")[0]
        result["hosts"][host] = entry
        for size in load.batches:
            start = f"{host:<18}{workload.num_context:>8}{workload.num_steps:>6}{size:>6}"
            try:
                row = time_batch(workload, size, expected)
            except torch.OutOfMemoryError:
                entry["batches"][size] = {"error": "out of memory"}
                say(f"{start}  out of memory")
                continue
            row["speedup"] = plain[precision] / row["frame_seconds"]
            row["share_of_product"] = flops / row["frame_seconds"] / rate
            entry["batches"][size] = row
            say(
                f"{start}{1 / row['frame_seconds']:>10.2f}{row['speedup']:>9.1f}{row['share_of_product']:>11.0%}"
                f"{row['context_seconds']:>12.4f}{row['peak_memory_mib']:>10.0f}{row['psnr_change_db']:>+10.4f}"
            )
        seconds = ", ".join(f"{value:.3f} s in {dtype}" for dtype, value in plain.items())
        say(f"  plain loop, one frame of one clip: {seconds}; {flops / 1e9:.1f} GFLOP per frame of the engine")
        del workload
    return result


def run() -> None:
    """Measure and print."""
    run_benchmark(Options, measure, __doc__)


if __name__ == "__main__":
    sys.exit(run_guarded("benchmarks.host", run))
