"""Speed of what surrounds the host: frames drawn per second by each world, and one call of a policy.

python -m benchmarks.parts [--policies recent_window,policy.py]

The call is timed on a history of 9 frames at budget 8, against the benchmark's own recent_window in the same run.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
import tyro

from agents.runs import load_policy
from far_env.clips.worlds import WORLDS
from far_env.contract import RetentionPolicy, RolloutState
from far_env.frame_meta import frame_meta_list

YARDSTICK = "recent_window"


@dataclass(frozen=True)
class Options:
    """What is measured."""

    policies: str = "recent_fill,least_change_prev,random"
    """Comma-separated, as in far-env evaluate."""
    clips: int = 200
    calls: int = 2000


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


def main() -> None:
    """Print both tables."""
    options = tyro.cli(Options, description=__doc__)
    for name in WORLDS:
        print(f"{name:<20} {frames_per_second(name, options.clips):8.0f} frames/s")
    yardstick = milliseconds_per_call(load_policy(YARDSTICK), options.calls)
    print(f"\n{YARDSTICK:<20} {yardstick:8.3f} ms per call")
    for name in options.policies.split(","):
        duration = milliseconds_per_call(load_policy(name), options.calls)
        print(f"{name:<20} {duration:8.3f} ms per call, {duration / yardstick:.1f} x {YARDSTICK}")


if __name__ == "__main__":
    main()
