"""Speed of everything but the host: frames drawn per second by each world, calls of a policy, and the recording of signals.

python -m benchmarks.parts [--policies recent_window,policy.py] [--rollouts 64]

The call is timed on a history of 9 frames at budget 8, relative to the benchmark's recent_window in the same run.
Signals are recorded in rollouts of pan at budget 4 in one batch; recording does not change the frames.
"""

from __future__ import annotations

import statistics
import sys
import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro

from far_env.cli import run_guarded
from far_env.clips.worlds import WORLDS
from far_env.contract import SIGNALS, NewestFrames, RetentionPolicy, RolloutState
from far_env.frame_meta import frame_meta_list
from far_env.policies import load_policy
from far_env.rollout.play import play
from far_env.workload import Workload
from far_env.workloads import make_workload

REFERENCE_POLICY = "recent_window"


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    policies: str = "recent_fill,least_change_prev,random"
    """Comma-separated, as in far-env evaluate."""
    clips: int = 200
    calls: int = 2000
    rollouts: int = 16
    """Rollouts whose signals are recorded; 0 skips this part."""
    host: str | None = None
    device: str = "auto"


def frames_per_second(name: str, num_clips: int) -> float:
    """Frames of a world drawn per second, on one core."""
    world = WORLDS[name]
    start = time.perf_counter()
    frames = sum(len(world.clip("train", i).frames) for i in range(num_clips))
    return frames / (time.perf_counter() - start)


def milliseconds_per_call(policy: RetentionPolicy, calls: int, num_frames: int = 9) -> float:
    """Median wall time of one plan for ``num_frames`` kept frames at a budget of one less."""
    rng = np.random.default_rng(0)
    metas = frame_meta_list(torch.from_numpy(rng.random((num_frames, 4))).float(), 7, 0.0039)
    max_frames = num_frames - 1
    state = RolloutState(7, max_frames * 0.0039, 11)
    budget = {"max_frames": max_frames, "capacity_mb": max_frames * 0.0039}
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        policy.build_temporal_cache_plan(metas, state, budget)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


class NewestWithSignals(NewestFrames):
    """Keeps the newest frames, and requires signals that it does not use."""

    def __init__(self, signals: tuple[str, ...]) -> None:
        self.signals = signals


def recording_ratios(workload: Workload, num_clips: int, repeats: int = 5) -> dict[str, float]:
    """Wall time of rollouts that record each signal, or all, over that of rollouts without signals run right before: signal →
    median of the ratios."""
    clips = [workload.clips.clip("test", i) for i in range(num_clips)]

    def seconds(wanted: tuple[str, ...]) -> float:
        start = time.perf_counter()
        play(workload, clips, range(num_clips), NewestWithSignals(wanted), 4)
        return time.perf_counter() - start

    ratios = {}
    for name, wanted in {**{name: (name,) for name in SIGNALS}, "all": tuple(SIGNALS)}.items():
        seconds(wanted)  # warms up
        without = (seconds(()) for _ in range(repeats))
        ratios[name] = statistics.median(seconds(wanted) / reference for reference in without)
    return ratios


def run() -> None:
    """Measure and print all tables."""
    options = tyro.cli(Options, description=__doc__)
    policies = {name: load_policy(name) for name in (REFERENCE_POLICY, *options.policies.split(","))}
    for name in WORLDS:
        print(f"{name:<20} {frames_per_second(name, options.clips):8.0f} frames/s")
    print()
    milliseconds: dict[str, float] = {}
    for name, policy in policies.items():
        if policy is None:
            raise ValueError(f"{name} makes no calls that could be timed; leave it out of --policies")
        milliseconds[name] = milliseconds_per_call(policy, options.calls)
        ratio = milliseconds[name] / milliseconds[REFERENCE_POLICY]
        print(f"{name:<20} {milliseconds[name]:8.3f} ms per call, {ratio:.1f} x {REFERENCE_POLICY}")
    if options.rollouts:
        print()
        workload = make_workload("pan", host=options.host, device=options.device)
        for name, ratio in recording_ratios(workload, options.rollouts).items():
            print(f"{name:<20} {ratio:8.2f} x the time of a rollout without signals")


if __name__ == "__main__":
    sys.exit(run_guarded("benchmarks.parts", run))
