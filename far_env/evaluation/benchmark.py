"""The public benchmark's evaluation of one policy: its loop, its rules and its line of metrics, with all peculiarities.

One policy object is used for all clips in order. It is also called after the last frame, and plans that are not quite valid are
applied as the benchmark applies them.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from far_env.clips.clip import check_clip_id
from far_env.clips.datasets import UCF101, DMLab
from far_env.contract import UNLIMITED_FRAMES, RetentionPolicy, RolloutState, ask_policy
from far_env.device import resolve_device
from far_env.errors import unknown_name
from far_env.evaluation.evaluate import available_metrics
from far_env.frame_meta import frame_meta_list, frame_size_mb
from far_env.host.weights import SHIPPED
from far_env.metrics import METRICS, clip_metrics
from far_env.progress import show_progress
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.workloads import WORKLOADS, Workload, make_workload

_BEST_PSNR = 40.0
_FORMATS = {
    "temporal_quality_main": ".4f",
    **dict.fromkeys(METRICS, ".4f"),
    "peak_kv_memory_mb": ".2f",
    "fps": ".4f",
    "n_frames_kept": "d",
    "eval_mode": "s",
    "n_clips": "d",
    "elapsed_s": ".1f",
}
"""Decimals as the benchmark prints them."""


@dataclass(frozen=True)
class _Task:
    """How the benchmark runs a workload: on how many clips, and which world replaces its data in a dry run."""

    num_clips: int
    data_variable: str
    world: str


TASKS = {
    "ucf101_short_prediction": _Task(50, UCF101.variable, "pan"),
    "dmlab_long_prediction": _Task(20, DMLab.variable, "orbit"),
}


@dataclass(frozen=True)
class BenchmarkScore:
    """The numbers that the benchmark prints about a run.

    Attributes:
        values: key → value, in the order of the line; metrics that could not be computed are left out.
        unavailable: metric → why it could not be computed.
        by_clip: the metrics of every clip that was played, in order.
    """

    values: dict[str, float | str]
    unavailable: dict[str, str]
    by_clip: list[dict[str, float]] = field(default_factory=list)

    def line(self) -> str:
        """The line ``TEST_METRICS: …`` that the benchmark reads its numbers from."""
        return "TEST_METRICS: " + " ".join(f"{name}={format(value, _FORMATS[name])}" for name, value in self.values.items())


def benchmark_workload(
    name: str, host: str | None = None, *, device: str = "auto", precision: str | None = None, data_dir: str | None = None
) -> tuple[Workload, bool]:
    """One of the benchmark's workloads, and whether it is a dry run: with a shipped host and no data, clips are of a world.

    Args:
        precision: bfloat16 on a GPU and float32 elsewhere by default.

    Raises:
        ValueError: on a workload that the benchmark does not have, or as `make_workload`.
    """
    if name not in TASKS:
        raise ValueError(unknown_name("workload of the benchmark", name, list(TASKS)))
    task, spec = TASKS[name], WORKLOADS[name]
    if precision is None:
        precision = "bfloat16" if resolve_device(device).type == "cuda" else "float32"
    common = {"host": host, "device": device, "precision": precision}
    if data_dir is None and not os.environ.get(task.data_variable) and host in SHIPPED:
        world = make_workload(task.world, **common)
        lengths = {"num_context": spec.num_context, "num_predict": spec.num_predict, "num_steps": spec.num_steps}
        return replace(world, name=name, **lengths), True
    return make_workload(name, **common, **({} if data_dir is None else {"data_dir": data_dir})), False


def run_benchmark(
    workload: Workload,
    max_frames: int,
    policy: RetentionPolicy | None,
    num_clips: int,
    *,
    metrics: Sequence[str] = METRICS,
    progress: bool = True,
) -> BenchmarkScore:
    """Play the first test clips sequentially and score them as the benchmark does.

    Args:
        policy: None keeps everything.
        metrics: those that cannot be computed here are left out with the reason.

    Raises:
        PolicyError: if the policy raises or its plan breaks the benchmark's rules. The benchmark would leave out the clip.
        ClipIdError: if there are fewer clips.
        ValueError: without a clip, or if the workload feeds back true frames.
    """
    if workload.true_feedback:
        raise ValueError(f"the benchmark feeds back generated frames; {workload.name} was made with feedback of true ones")
    if num_clips < 1:
        raise ValueError(f"the benchmark needs at least 1 clip, got {num_clips}")
    check_clip_id(workload.clips, "test", num_clips - 1)
    names, unavailable = available_metrics(metrics)
    scores: list[dict[str, float]] = []
    start = time.perf_counter()
    for clip_id in show_progress(range(num_clips), unit="clips", description="benchmark", disable=not progress):
        scores.append(_play_clip(workload, clip_id, policy, max_frames, names))
    elapsed = time.perf_counter() - start
    means = {name: float(np.mean([score[name] for score in scores])) for name in names}
    for name in [name for name, mean in means.items() if not math.isfinite(mean)]:
        unavailable[name] = f"the mean {name} is {means.pop(name)}, which the benchmark cannot read"
    num_kept = min(max_frames, workload.num_frames)
    values: dict[str, float | str] = {}
    if "psnr" in means:
        values["temporal_quality_main"] = 100 * min(1.0, max(0.0, means["psnr"] / _BEST_PSNR))
    values |= means
    values |= {
        "peak_kv_memory_mb": workload.capacity_mb(num_kept),
        "fps": num_clips * workload.num_predict / elapsed,
        "n_frames_kept": num_kept,
        "eval_mode": "real_rollout",
        "n_clips": num_clips,
        "elapsed_s": elapsed,
    }
    return BenchmarkScore(values, unavailable, scores)


@torch.no_grad()
def _play_clip(
    workload: Workload, clip_id: int, policy: RetentionPolicy | None, max_frames: int, metrics: tuple[str, ...]
) -> dict[str, float]:
    """Play one clip, calling the policy itself (not a copy) after every frame that exceeds the budget."""
    clip = workload.clips.clip("test", clip_id)
    capacity, size = workload.capacity_mb(max_frames), frame_size_mb(workload.host.latent_shape)
    state = RolloutState(0, capacity, workload.num_predict)
    batch = RolloutBatch(workload, 1)
    batch.begin([0], [clip], [BENCHMARK_SEED + clip_id])
    limited = policy is not None and max_frames < UNLIMITED_FRAMES
    while not batch.finished(0):
        batch.advance([0])
        if limited and batch.history_length(0) > max_frames:
            state.step, state.budget_capacity_mb = batch.step(0) - 1, capacity
            metas = frame_meta_list(torch.from_numpy(batch.features([0])[0]), state.step, size)
            budget = {"max_frames": max_frames, "capacity_mb": capacity}
            batch.retain(0, ask_policy(policy, metas, state, budget, clip=clip_id, strict=False).kept)
    predicted = batch.decode([0]).float()
    truth = torch.from_numpy(clip.frames[None, workload.num_context : workload.num_frames]).to(predicted.device)
    return clip_metrics(predicted, truth, metrics)[0]
