"""Streaming memories over long rollouts: time, memory and quality per frame, and what encoding again would have changed.

python -m benchmarks.streaming [--frames 1000] [--budget 128] [--policies recent_fill,h2o] [--out FOLDER] [--json -]

World orbit, whose camera goes on for as long as is asked, so that every frame has a true one. Time and entries must be the same
at frame 50 and at the last one. The cost of a frame is compared with the exact engine, which keeps as many whole frames and
encodes them again. Everything is measured in this process, one policy after the other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.command import run_benchmark
from far_env.cli import run_guarded
from far_env.cli.options import split_list
from far_env.clips.worlds.orbit import Orbit
from far_env.contract import NewestFrames
from far_env.device import synchronize
from far_env.evaluation.plots import COLOURS, STYLE, save_figure
from far_env.io import make_run_dir, write_json
from far_env.policies import load_token_policy
from far_env.provenance import git_commit, machine
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.rollout.play import play
from far_env.rollout.reencoding import reencoding_gap
from far_env.rollout.streaming import StreamingBatch
from far_env.workload import Workload
from far_env.workloads import make_workload

EARLY = 50
AROUND = 10
"""A time is the median of this many frames."""
GAP_FRAMES = 36
WHOLE_FRAMES = ("recent_fill", "sink_recent", "far_two_level", "packforcing_coarse")
"""Policies whose kept frames can be encoded again."""


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    frames: int = 1000
    """Frames that are generated."""
    budget: int = 128
    """Tokens that every head may keep."""
    policies: str = "recent_fill,sink_recent,h2o,future_forcing_reconstruction"
    """Token policies, separated by commas."""
    clips: int = 2
    """Clips that are played together."""
    host: str = "embedded_long"
    """A shipped host or a host folder."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    out: str | None = None
    """Folder for the numbers and the figure."""
    json: str | None = None
    """ "-" prints one JSON object instead of text."""


@dataclass(frozen=True)
class Stream:
    """One policy's rollouts.

    Attributes:
        seconds: of every frame, all clips together.
        entries: slots that every frame attended to.
        memory_bytes: of the entries after every frame.
        psnr: of every frame, dB, mean over clips.
        contrast: standard deviation of the pixels of every frame, mean over clips.
    """

    seconds: list[float]
    entries: list[int]
    memory_bytes: list[int]
    psnr: list[float]
    contrast: list[float]

    def at(self, frame: int) -> float:
        """Median seconds of the frames up to this one."""
        return float(np.median(self.seconds[max(0, frame - AROUND) : frame]))


def long_orbit(workload: Workload, num_frames: int) -> Workload:
    """The workload with clips of its world that go on for this many predicted frames."""
    world = type("LongOrbit", (Orbit,), {"num_frames": workload.num_context + num_frames})()
    return replace(workload, clips=world, num_predict=num_frames)


@torch.no_grad()
def stream(workload: Workload, num_clips: int, name: str, budget: int) -> Stream:
    """Play one policy."""
    clips = [workload.clips.clip("test", i) for i in range(num_clips)]
    truth = torch.from_numpy(np.stack([clip.frames[workload.num_context :] for clip in clips]))
    batch = StreamingBatch(workload, clips, [BENCHMARK_SEED + i for i in range(num_clips)], load_token_policy(name), budget)
    seconds, entries, held, psnrs, contrast = [], [], [], [], []
    for step in range(workload.num_predict):
        start = time.perf_counter()
        latents = batch.advance()
        synchronize(workload.host.device)
        seconds.append(time.perf_counter() - start)
        entries.append(batch.cache.num_slots)
        held.append(batch.cache.nbytes)
        frames = workload.host.autoencoder.decode(latents[:, None])[:, 0].float().cpu()
        error = (frames - truth[:, step]).square().flatten(1).mean(dim=1)
        psnrs.append(float((-10 * error.log10()).mean()))
        contrast.append(float(frames.flatten(1).std(dim=1).mean()))
    return Stream(seconds, entries, held, psnrs, contrast)


def exact_seconds(workload: Workload, num_clips: int, max_frames: int) -> float:
    """Median seconds of a frame of the exact engine under a budget of whole frames, once that is full."""
    clips, times = [workload.clips.clip("test", i) for i in range(num_clips)], []

    def note(_: int) -> None:
        synchronize(workload.host.device)
        times.append(time.perf_counter())

    play(workload, clips, [BENCHMARK_SEED + i for i in range(num_clips)], NewestFrames(), max_frames, on_frame=note)
    return float(np.median(np.diff(times)[-AROUND:]))


def measure(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure, and say each policy's line when it is finished."""
    if options.frames <= EARLY:
        raise ValueError(f"--frames must be above {EARLY}, got {options.frames}")
    names = split_list(options.policies, "policies", "policy")
    workload = make_workload("orbit", host=options.host, device=options.device)
    short, long = long_orbit(workload, GAP_FRAMES), long_orbit(workload, options.frames)
    tokens = workload.host.tokens_per_frame
    exact = exact_seconds(short, options.clips, max(1, options.budget // tokens))
    say(f"orbit, {options.clips} clips together, budget {options.budget} tokens, host {workload.host.name}")
    say(f"exact engine with {options.budget // tokens} whole frames: {1e3 * exact:.1f} ms per frame")
    streams, gaps = {}, {}
    for name in names:
        found = streams[name] = stream(long, options.clips, name, options.budget)
        early, late = found.at(EARLY), found.at(options.frames)
        say(
            f"{name}: {1e3 * early:.1f} ms at frame {EARLY}, {1e3 * late:.1f} ms at frame {options.frames} "
            f"({late / early:.2f} x), {exact / late:.2f} x the exact engine's speed; "
            f"{found.entries[EARLY - 1]} and {found.entries[-1]} entries, "
            f"{found.memory_bytes[EARLY - 1] / 2**20:.2f} and {found.memory_bytes[-1] / 2**20:.2f} MiB; first and last {EARLY} "
            f"frames: PSNR {np.mean(found.psnr[:EARLY]):.2f} and {np.mean(found.psnr[-EARLY:]):.2f} dB, "
            f"contrast {np.mean(found.contrast[:EARLY]):.3f} and {np.mean(found.contrast[-EARLY:]):.3f}"
        )
        if name.partition(":")[0] in WHOLE_FRAMES:
            clips = [short.clips.clip("test", i) for i in range(options.clips)]
            seeds = [BENCHMARK_SEED + i for i in range(options.clips)]
            gap = reencoding_gap(short, clips, seeds, load_token_policy(name), options.budget)
            gaps[name] = {"largest": float(gap.largest.max()), "relative": float(gap.relative.mean())}
            say(
                f"{name}: a frame differs from that of the same frames encoded again by {gaps[name]['relative']:.4f} of its "
                f"root mean square, mean over {GAP_FRAMES} frames, and by at most {gaps[name]['largest']:.4f}"
            )
    result = {
        "host": workload.host.name,
        "weights": workload.host.weights_hash,
        "machine": machine(workload.host.device),
        "commit": git_commit(),
        "budget": options.budget,
        "clips": options.clips,
        "exact_seconds": exact,
        "reencoding_gap": gaps,
        "streams": {name: asdict(found) for name, found in streams.items()},
    }
    if options.out is not None:
        folder = make_run_dir(options.out)
        write_json(folder / "streaming.json", result)
        with rc_context(STYLE):
            drawn = figure(streams, options.budget)
            for kind in ("png", "svg"):
                source = f"benchmarks.streaming, host {workload.host.name} ({workload.host.weights_hash})"
                save_figure(drawn, folder / f"streaming.{kind}", kind, source)
    return result


def figure(streams: dict[str, Stream], budget: int) -> Figure:
    """Time, quality and contrast of every frame, as running means."""
    drawn = Figure(figsize=(6.4, 6.0), layout="constrained")
    panels = drawn.subplots(3, sharex=True)
    parts: Sequence[tuple[str, Callable[[Stream], list[float]]]] = (
        ("ms per frame", lambda found: [1e3 * seconds for seconds in found.seconds]),
        ("PSNR (dB)", lambda found: found.psnr),
        ("contrast", lambda found: found.contrast),
    )
    for axes, (label, values) in zip(panels, parts, strict=True):
        for number, (name, found) in enumerate(streams.items()):
            window = min(20, len(found.psnr))
            smooth = np.convolve(values(found), np.ones(window) / window, mode="valid")
            axes.plot(np.arange(len(smooth)) + window, smooth, color=COLOURS[number % len(COLOURS)], linewidth=1.2, label=name)
        axes.set(ylabel=label)
    panels[0].set(title=f"orbit, budget {budget} tokens", ylim=(0, None))
    panels[-1].set(xlabel="generated frame")
    panels[0].legend(fontsize="small")
    return drawn


def run() -> None:
    """Run the benchmark."""
    run_benchmark(Options, measure, __doc__ or "")


if __name__ == "__main__":
    sys.exit(run_guarded("benchmarks.streaming", run))
