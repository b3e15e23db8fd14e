"""Rollouts per second of the batched engine against the reference loop, and how the time is divided.

python -m benchmarks.rollout [--quick] [--json -] [--host FOLDER]

Workload pan at budget 4 under the policy random, memo off, decoding and PSNR included. A speedup is the engine's rollouts per
second over those of the float32 reference loop with the same ODE steps, both measured in this process. On one thread of a CPU
all times are the processor's, but for that of a matrix product.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.command import clock, run_benchmark
from far_env.cli import run_guarded
from far_env.clips.clip import Clip
from far_env.contract import RetentionPolicy
from far_env.device import denormals_flushed, peak_memory_mib
from far_env.evaluation.evaluate import evaluate
from far_env.host.far import FAR
from far_env.host.far_host import FARHost
from far_env.host.linear import linear_rate
from far_env.host.sampler import sample_next_frame
from far_env.host.weights import load_host
from far_env.host.zoo import RELEASED
from far_env.metrics import psnr
from far_env.policies import load_policy
from far_env.provenance import git_commit, machine, versions
from far_env.rollout.memo import DEFAULT_BYTES
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.rollout.play import play
from far_env.rollout.reference import reference_rollout
from far_env.workload import Workload
from far_env.workloads import make_workload

BUDGET = 4
POLICY = "random"
BATCHES = {1: (2, 8), 8: (8, 32), 64: (64, 128)}
"""Batch size → number of clips, with and without ``quick``."""
MEMO_POLICIES = (
    "recent_fill",
    "recent_window",
    "packcache",
    "flowcache",
    "causalcache_vdm",
    "random",
    "least_change_prev",
    "least_change_next",
)
SHARE_WIDTHS = {"transformer": 9, "autoencoder": 9, "metrics": 9, "python": 8}


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    quick: bool = False
    """Fewer clips, and neither the FAR-B-size host nor the memo: under a minute."""
    json: str | None = None
    """ "-" prints one JSON object instead of text."""
    host: str = "embedded"
    device: str = "auto"


@dataclass(frozen=True)
class Timing:
    """One configuration of the engine."""

    rollouts_per_second: float
    shares: dict[str, float]
    """Of wall time without CUDA graphs: transformer, autoencoder, metrics, python."""
    gflop: float
    """Floating-point operations of the transformer per rollout, 1e9."""
    matmul_fraction: float
    """Rate inside the transformer, without CUDA graphs, over that of a large matrix product at the same dtype in this run."""


class Stopwatch:
    """Sums the seconds spent inside wrapped functions."""

    def __init__(self, device: torch.device) -> None:
        self.now = clock(device)
        self.seconds: dict[str, float] = {}
        self._depth = 0

    def wrap(self, name: str, function: Callable) -> Callable:
        """The function, its outermost calls timed under ``name``."""

        def timed(*args: object, **kwargs: object) -> object:
            if self._depth:
                return function(*args, **kwargs)
            self._depth += 1
            start = self.now()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[name] = self.seconds.get(name, 0.0) + self.now() - start
                self._depth -= 1

        return timed


@contextmanager
def instrumented(host: FARHost, wrap: Callable[[str, Callable], Callable]) -> Iterator[None]:
    """While the block runs, the host's computations are wrapped by ``wrap(label, function)``, and no CUDA graph is used.

    In a graph nothing can be timed or counted.
    """
    graphs = host.cuda_graphs
    vars(host)["cuda_graphs"] = None
    places = [
        *((host.transformer, name, "transformer") for name in ("encode_context", "denoise", "modulate", "next_frame")),
        *((host.autoencoder, name, "autoencoder") for name in ("encode", "decode")),
    ]
    for target, name, label in places:
        setattr(target, name, wrap(label, getattr(target, name)))
    try:
        yield
    finally:
        vars(host)["cuda_graphs"] = graphs
        for target, name, _ in places:
            delattr(target, name)


def transformer_flops(host: FARHost, function: Callable[[], object]) -> int:
    """Floating-point operations of the transformer in one call of ``function``."""
    counted = 0

    def wrap(label: str, method: Callable) -> Callable:
        def counting(*args: object, **kwargs: object) -> object:
            nonlocal counted
            if label != "transformer":
                return method(*args, **kwargs)
            with FlopCounterMode(display=False) as counter:
                result = method(*args, **kwargs)
            counted += counter.get_total_flops()
            return result

        return counting

    with instrumented(host, wrap):
        function()
    return counted


def matmul_rate(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """FLOP/s of a large square matrix product, by the kernel that the transformer's layers use."""
    return linear_rate((size, size, size), dtype, device, 4 if device.type == "cpu" else 50)


def run_engine(
    workload: Workload, policy: RetentionPolicy, clips: Sequence[Clip], score: Callable[..., Tensor] = psnr
) -> float:
    """Play, decode and score the clips in one batch; returns the mean PSNR."""
    batch, _ = play(workload, clips, [BENCHMARK_SEED + clip.clip_id for clip in clips], policy, BUDGET)
    frames = batch.decode(range(len(clips)))
    truth = torch.stack([torch.from_numpy(clip.frames[workload.num_context :]) for clip in clips]).to(frames.device)
    return float(score(frames, truth).mean())


def time_engine(workload: Workload, batch: int, num_clips: int, flops: float, rate: float) -> Timing:
    """Rollouts per second of ``num_clips`` clips in batches, and how the time is divided."""
    now, policy = clock(workload.host.device), load_policy(POLICY)
    clips = [workload.clips.clip("test", i) for i in range(num_clips)]
    batches = [clips[first : first + batch] for first in range(0, num_clips, batch)]

    def run(score: Callable[..., Tensor]) -> float:
        start = now()
        for clips_of_batch in batches:
            run_engine(workload, policy, clips_of_batch, score)
        return now() - start

    stopwatch = Stopwatch(workload.host.device)
    with instrumented(workload.host, stopwatch.wrap):
        timed_seconds = run(stopwatch.wrap("metrics", psnr))
    seconds = timed_seconds
    if workload.host.device.type == "cuda":
        # The stopwatch synchronises after every call, and there are no CUDA graphs: the speed is measured in a run without it,
        # after two in which the graphs are made.
        run(psnr), run(psnr)
        seconds = run(psnr)
    shares = {name: stopwatch.seconds[name] / timed_seconds for name in ("transformer", "autoencoder", "metrics")}
    shares["python"] = 1 - sum(shares.values())
    fraction = flops * num_clips / stopwatch.seconds["transformer"] / rate
    return Timing(num_clips / seconds, shares, flops / 1e9, fraction)


def time_reference(workload: Workload, num_clips: int) -> float:
    """Rollouts per second of the reference loop, with PSNR."""
    now, policy = clock(workload.host.device), load_policy(POLICY)
    clips = [workload.clips.clip("test", i) for i in range(num_clips + 1)]
    start = 0.0
    for i, clip in enumerate(clips):
        if i == 1:  # the first one warms up
            start = now()
        policy.begin_clip(BENCHMARK_SEED + i)
        frames = reference_rollout(workload, clip, policy, BUDGET, BENCHMARK_SEED + i).frames
        psnr(frames, torch.from_numpy(clip.frames[workload.num_context :]).to(frames.device)).item()
    return num_clips / (now() - start)


def far_b_speedup(device: torch.device, num_kept: int = 8, num_steps: int = 20) -> dict[str, float]:
    """Seconds for one new frame of a FAR-B-size model with random weights, batch 1, by the reference loop and the sampler."""
    torch.manual_seed(0)
    model = FAR(**RELEASED["far_b_ucf101"].config).to(device).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.normal_(std=0.02)
    host = FARHost("FAR-B size, random weights", model, None, "", (32, 8, 8), 64, num_steps)
    workload = Workload("far_b", None, host, num_context=num_kept, num_predict=1, num_steps=num_steps)
    kept, noise = torch.randn(num_kept, 32, 8, 8, device=device), torch.randn(32, 8, 8, device=device)
    sample_next_frame(model, kept[None], noise[None, None], num_steps=1)
    now, seconds = clock(device), {}
    for name, function in {
        "engine": lambda: sample_next_frame(model, kept[None], noise[None, None], num_steps=num_steps),
        "reference": lambda: host.generate(list(kept), noise, workload.conditions()),
    }.items():
        start = now()
        function()
        seconds[name] = now() - start
    return {**seconds, "speedup": seconds["reference"] / seconds["engine"]}


def memo_cost(workload: Workload, max_frames: int, num_clips: int = 64) -> dict[str, float]:
    """Seconds to evaluate eight policies with the memo and without, and their ratio."""
    policies = {name: load_policy(name) for name in MEMO_POLICIES}
    now, seconds = clock(workload.host.device), {}
    for name, memo_bytes in (("without", 0), ("with", DEFAULT_BYTES)):
        start = now()
        evaluate(workload, max_frames, policies, range(num_clips), metrics=("psnr",), memo_bytes=memo_bytes, progress=False)
        seconds[name] = now() - start
    return {**seconds, "ratio": seconds["with"] / seconds["without"]}


def scaling(workload: Workload, batch: int = 16) -> list[dict[str, float]]:
    """Milliseconds and GFLOP per generated frame for several budgets and for a rollout four times as long."""
    now = clock(workload.host.device)
    policy, clips, rows = load_policy("recent_fill"), [workload.clips.clip("test", i) for i in range(batch)], []
    for max_frames, num_predict in ((1, 11), (4, 11), (8, 11), (4, 44), (8, 44)):
        longer = replace(workload, num_predict=num_predict)
        run = partial(play, longer, clips, range(batch), policy, max_frames)
        flops = transformer_flops(workload.host, run)
        if workload.host.device.type == "cuda":
            run(), run()  # CUDA graphs are made at the second request
        start = now()
        run()
        frames = batch * num_predict
        milliseconds = 1000 * (now() - start) / frames
        gflop = flops / frames / 1e9
        rows.append({"budget": max_frames, "predicted": num_predict, "milliseconds": milliseconds, "gflop": gflop})
    return rows


def mode_change(workload: Workload, other: Workload, num_clips: int) -> dict[str, float]:
    """Effect of another way to compute: change of the mean clip PSNR in dB on the same clips and noise, and ratio of speeds."""
    policies = {POLICY: load_policy(POLICY)}
    means, seconds = [], []
    for variant in (workload, other):
        evaluate(variant, BUDGET, policies, range(64), metrics=("psnr",), progress=False)  # compiles, and warms up
        result = evaluate(variant, BUDGET, policies, range(num_clips), metrics=("psnr",), progress=False)
        means.append(float(result.scores[POLICY]["psnr"].mean()))
        seconds.append(result.provenance["seconds"])
    return {"psnr_change_db": means[1] - means[0], "speed_ratio": seconds[0] / seconds[1]}


def compiled(workload: Workload) -> Workload:
    """The same workload on a host whose ODE steps go through torch.compile."""
    transformer = copy.deepcopy(workload.host.transformer)
    transformer.denoise = torch.compile(transformer.denoise, dynamic=True)
    return replace(workload, host=replace(workload.host, transformer=transformer))


def with_dtype(workload: Workload, dtype: torch.dtype) -> Workload:
    """The same workload on a host of another dtype."""
    return replace(workload, host=load_host(workload.host.name, str(workload.host.device), dtype))


@denormals_flushed()
def measure(options: Options, say: Callable[[str], None]) -> dict[str, object]:
    """All measurements; ``say`` receives each line of text as soon as it is measured."""
    base = make_workload("pan", host=options.host, device=options.device)
    device = base.host.device
    dtypes = {"float32": torch.float32} if options.quick else {"float32": torch.float32, "bfloat16": torch.bfloat16}
    result: dict[str, object] = {
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "host": base.host.name,
        "weights": base.host.weights_hash,
        "commit": git_commit(),
        "versions": versions(),
        "policy": POLICY,
        "budget": BUDGET,
    }
    say("{machine}, {threads} threads, host {host} ({weights}), pan, budget {budget}".format(**result))
    reference = {steps: time_reference(replace(base, num_steps=steps), 2 if options.quick else 8) for steps in (4, 20)}
    result["reference_rollouts_per_second"] = {f"steps{steps}": rate for steps, rate in reference.items()}
    say("reference loop, float32: " + ", ".join(f"{rate:.2f} rollouts/s at {steps} steps" for steps, rate in reference.items()))
    speedup, timings, rates = {}, {}, {}
    columns = "".join(f"{name[:8]:>{width}}" for name, width in SHARE_WIDTHS.items())
    say(f"\n{'engine':<26}{'rollouts/s':>11}{'speedup':>9}{columns}{'GFLOP':>7}{'of matmul':>10}")
    for name, dtype in dtypes.items():
        rates[name] = matmul_rate(dtype, device)
        workload = with_dtype(base, dtype)
        for steps in (4, 20):
            stepped = replace(workload, num_steps=steps)
            clips = [stepped.clips.clip("test", i) for i in range(8)]
            flops = transformer_flops(stepped.host, partial(run_engine, stepped, load_policy(POLICY), clips)) / len(clips)
            for batch, (quick_clips, num_clips) in BATCHES.items():
                timing = time_engine(stepped, batch, quick_clips if options.quick else num_clips, flops, rates[name])
                key = f"{name}_batch{batch}_steps{steps}"
                speedup[key] = timing.rollouts_per_second / reference[steps]
                timings[key] = asdict(timing)
                shares = "".join(f"{timing.shares[part]:>{width}.0%}" for part, width in SHARE_WIDTHS.items())
                say(
                    f"{key:<26}{timing.rollouts_per_second:>11.2f}{speedup[key]:>9.1f}{shares}{timing.gflop:>7.1f}"
                    f"{timing.matmul_fraction:>10.0%}"
                )
    result |= {"speedup": speedup, "engine": timings, "matmul_gflops": {name: rate / 1e9 for name, rate in rates.items()}}
    say("\nmatrix product: " + ", ".join(f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in rates.items()))
    if not options.quick:
        result["far_b"] = far_b_speedup(device)
        line = "FAR-B size, batch 1, 8 kept frames, 20 steps: {reference:.1f} s, engine {engine:.1f} s, {speedup:.1f} x"
        say(line.format(**result["far_b"]))
        result["memo"] = {f"budget{max_frames}": memo_cost(base, max_frames) for max_frames in (4, 8)}
        for name, cost in result["memo"].items():
            line = "8 policies on 64 clips, {name}: {without:.1f} s, with the memo {with:.1f} s, ratio {ratio:.2f}"
            say(line.format(name=name, **cost))
        result["scaling"] = scaling(base)
        say("per generated frame, batch 16, 4 steps, recent_fill:")
        for row in result["scaling"]:
            line = "  budget {budget}, {predicted} frames: {milliseconds:.2f} ms, {gflop:.3f} GFLOP"
            say(line.format(**row) + f", {row['gflop'] / row['milliseconds'] * 1000:.0f} GFLOP/s")
        for name, other in (("bfloat16", with_dtype(base, torch.bfloat16)), ("compiled", compiled(base))):
            result[name] = mode_change(base, other, 256)
            line = "changes the mean PSNR of 256 clips by {psnr_change_db:+.4f} dB, at {speed_ratio:.2f} x the speed of float32"
            say(f"{name} {line.format(**result[name])}")
    result["peak_memory_mib"] = peak_memory_mib(device)
    say(f"peak memory {result['peak_memory_mib']:.0f} MiB")
    return result


def run() -> None:
    """Measure and print."""
    run_benchmark(Options, measure, __doc__)


if __name__ == "__main__":
    sys.exit(run_guarded("benchmarks.rollout", run))
