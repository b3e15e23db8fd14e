"""How the time of a generated frame grows with what a rollout keeps and how much is played, and what it must not grow with.

python -m benchmarks.growth [--plot FILE.png] [--json -] [--host FOLDER]

World pan, the newest frames are kept, so that every eviction encodes the whole history again. One quantity is varied at a time:

- kept: frames from which each frame is generated. The time is a constant plus so much per kept frame.
- length: generated frames of a rollout with 4 kept frames; they share the encoding of its context.
- batch: rollouts that are played together, 4 kept frames.
- policies: compared in one evaluation of 4 clips, PSNR included, every policy's frames counted.
- done: rollouts that this process has already played, in batches of 4; measured before the others.

Times are per generated frame of one rollout, each the smallest of several. All values of a quantity are measured in turn, so
that what else the machine does meets them alike. On one thread of a CPU it is the processor's time, without waiting for others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks.command import clock, run_benchmark
from far_env.cli import run_guarded
from far_env.contract import NewestFrames
from far_env.device import denormals_flushed
from far_env.evaluation.evaluate import evaluate
from far_env.evaluation.plots import COLOURS, QUIET, STYLE, save_figure
from far_env.policies import load_policy
from far_env.provenance import git_commit, machine
from far_env.rollout.play import play
from far_env.workload import Workload
from far_env.workloads import make_workload

KEPT = (1, 2, 4, 8, 12, 16)
LENGTHS = (8, 16, 32, 64)
BATCHES = (1, 2, 4, 8, 16, 32)
POLICIES = ("recent_fill", "uniform", "packcache", "flowcache", "causalcache_vdm", "random", "rolling_forcing", "recent_window")
NUM_POLICIES = (1, 2, 4, 8)
DONE = (0, 12, 24, 36, 48, 60)
BUDGET, BATCH = 4, 4
TIMED_FRAMES = 4
"""At the end of a rollout, once the budget is reached."""
AXES = {
    "kept": "kept frames",
    "length": "generated frames of a rollout",
    "batch": "rollouts played together",
    "policies": "policies of an evaluation",
    "done": "rollouts played before",
}

Curve = dict[int, float]
"""Value → milliseconds per generated frame."""


@dataclass(frozen=True)
class Options:
    """Options of the benchmark."""

    repeats: int = 3
    """Of every measurement; the smallest time counts."""
    plot: str | None = None
    """A .png or .svg file for the figure."""
    host: str = "embedded"
    """A shipped host or a host folder."""
    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    json: str | None = None
    """ "-" prints one JSON object instead of text."""


def rollout_seconds(workload: Workload, num_rollouts: int, budget: int, first_clip: int = 0) -> list[float]:
    """Seconds from the start of a batch of rollouts to the end of each frame; the first is 0."""
    now = clock(workload.host.device)
    first_clip %= workload.clips.num_clips("test") - num_rollouts
    clips = [workload.clips.clip("test", first_clip + row) for row in range(num_rollouts)]
    times = [now()]
    play(workload, clips, range(num_rollouts), NewestFrames(), budget, on_frame=lambda _: times.append(now()))
    return [time - times[0] for time in times]


def kept_seconds(workload: Workload, kept: int) -> float:
    """Seconds of a frame that is generated from so many kept ones."""
    frames = max(0, kept - workload.num_context) + TIMED_FRAMES + 1
    ends = rollout_seconds(replace(workload, num_predict=frames), BATCH, kept)
    return (ends[-1] - ends[-1 - TIMED_FRAMES]) / (BATCH * TIMED_FRAMES)


def length_seconds(workload: Workload, length: int) -> float:
    """Seconds of a frame of rollouts of so many frames."""
    return rollout_seconds(replace(workload, num_predict=length), BATCH, BUDGET)[-1] / (BATCH * length)


def batch_seconds(workload: Workload, size: int, first_clip: int = 0) -> float:
    """Seconds of a frame of so many rollouts that are played together."""
    return rollout_seconds(workload, size, BUDGET, first_clip)[-1] / (size * workload.num_predict)


def evaluation_seconds(workload: Workload, count: int) -> float:
    """Seconds of an evaluation of so many policies, per frame of one of them."""
    policies = {name: load_policy(name) for name in POLICIES[:count]}
    now = clock(workload.host.device)
    start = now()
    evaluate(workload, BUDGET, policies, range(BATCH), metrics=("psnr",), progress=False)
    return (now() - start) / (count * BATCH * workload.num_predict)


def smallest(seconds: Callable[[int], float], values: Sequence[int], repeats: int) -> Curve:
    """Milliseconds at every value: the smallest of ``repeats``, in each of which all values are measured in turn."""
    found = [[seconds(value) for value in values] for _ in range(repeats)]
    return {value: 1e3 * min(times) for value, times in zip(values, zip(*found, strict=True), strict=True)}


def done_curve(workload: Workload, repeats: int) -> Curve:
    """Milliseconds of a frame after so many rollouts of new clips."""
    seconds = [batch_seconds(workload, BATCH, played) for played in range(0, DONE[-1] + repeats * BATCH, BATCH)]
    return {done: 1e3 * min(seconds[done // BATCH :][:repeats]) for done in DONE}


def line_through(curve: Curve) -> tuple[float, float]:
    """Milliseconds without and per unit of the value: the line of least squares."""
    slope, constant = np.polyfit(list(curve), list(curve.values()), 1)
    return float(constant), float(slope)


@denormals_flushed()
def measure(options: Options, say: Callable[[str], None]) -> dict[str, Any]:
    """Measure all curves, and say each as soon as it is known."""
    if options.repeats < 1:
        raise ValueError(f"--repeats must be at least 1, got {options.repeats}")
    if options.plot is not None and Path(options.plot).suffix not in (".png", ".svg"):
        raise ValueError(f"--plot must end in .png or .svg, got {options.plot}")
    workload = make_workload("pan", host=options.host, device=options.device)
    dtype = str(workload.host.dtype).removeprefix("torch.")
    name = f"{workload.host.name} ({workload.host.weights_hash})"
    say(f"{machine(workload.host.device)}, host {name}, {dtype}, {workload.num_steps} ODE steps; ms per generated frame")
    batch_seconds(workload, BATCH)  # the first rollout takes longer
    repeats, curves = options.repeats, {}
    for axis, curve in {
        "done": lambda: done_curve(workload, repeats),
        "kept": lambda: smallest(partial(kept_seconds, workload), KEPT, repeats),
        "length": lambda: smallest(partial(length_seconds, workload), LENGTHS, repeats),
        "batch": lambda: smallest(partial(batch_seconds, workload), BATCHES, repeats),
        "policies": lambda: smallest(partial(evaluation_seconds, workload), NUM_POLICIES, repeats),
    }.items():
        curves[axis] = curve()
        say(f"{AXES[axis]:<30}" + "".join(f"{value:>8}" for value in curves[axis]))
        say(f"{'':<30}" + "".join(f"{milliseconds:>8.2f}" for milliseconds in curves[axis].values()))
    curves = {axis: curves[axis] for axis in AXES}
    constant, slope = line_through(curves["kept"])
    say(f"{constant:.2f} ms and {slope:.2f} ms for every kept frame")
    result = {
        "machine": machine(workload.host.device),
        "host": workload.host.name,
        "weights": workload.host.weights_hash,
        "dtype": dtype,
        "steps": workload.num_steps,
        "commit": git_commit(),
        "milliseconds": curves,
        "kept_line": {"constant": constant, "slope": slope},
    }
    if options.plot is not None:
        path = Path(options.plot)
        with rc_context(STYLE):
            save_figure(figure(curves), path, path.suffix[1:], f"benchmarks.growth, host {name}")
    return result


def figure(curves: dict[str, Curve]) -> Figure:
    """One panel for each quantity, from zero; the first with its line."""
    drawn = Figure(figsize=(7.2, 4.2), layout="constrained")
    panels = drawn.subplots(2, 3)
    for axes, (axis, curve), colour in zip(panels.flat, curves.items(), COLOURS, strict=False):
        axes.plot(list(curve), list(curve.values()), "o-", color=colour, markersize=3, linewidth=1.2)
        axes.set(xlabel=AXES[axis], ylim=(0, 1.15 * max(curve.values())))
        if axis == "kept":
            constant, slope = line_through(curve)
            axes.plot([0, max(curve)], [constant, constant + slope * max(curve)], "--", color=QUIET, linewidth=1, zorder=1)
        elif axis == "batch":
            axes.set_xscale("log", base=2)
            axes.set_xticks(list(curve), [str(value) for value in curve])
    for axes in panels[:, 0]:
        axes.set_ylabel("ms per generated frame")
    panels.flat[-1].set_axis_off()
    return drawn


def run() -> None:
    """Run the benchmark."""
    run_benchmark(Options, measure, __doc__ or "")


if __name__ == "__main__":
    sys.exit(run_guarded("benchmarks.growth", run))
