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
from far_env.clips.data_folders import find_data
from far_env.clips.datasets import UCF101, DMLab
from far_env.clips.video_folder import VideoFolder
from far_env.contract import UNLIMITED_FRAMES, RetentionPolicy, RolloutState, ask_policy
from far_env.device import resolve_device
from far_env.errors import PolicyError, VideoError, unknown_name
from far_env.evaluation.evaluate import available_metrics
from far_env.frame_meta import frame_meta_list, frame_size_mb
from far_env.host.weights import SHIPPED
from far_env.metrics import METRICS, clip_metrics
from far_env.progress import show_progress
from far_env.rollout.engine import RolloutBatch
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.workload import PORTABLE, Workload
from far_env.workloads import WORKLOADS, make_workload

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
    """How the benchmark runs a workload: on which data, and which world replaces them in a dry run."""

    data: type[VideoFolder]
    world: str

    @property
    def num_clips(self) -> int:
        """How many clips the benchmark plays, if there are as many."""
        return self.data.benchmark_clips

    @property
    def data_variable(self) -> str:
        """The environment variable with the folder of its data."""
        return self.data.variable


TASKS = {"ucf101_short_prediction": _Task(UCF101, "pan"), "dmlab_long_prediction": _Task(DMLab, "orbit")}


@dataclass(frozen=True)
class BenchmarkScore:
    """The numbers that the benchmark prints about a run.

    Attributes:
        values: key → value, in the order of the line; metrics that could not be computed are left out.
        unavailable: metric → why it could not be computed.
        by_clip: the metrics of every clip that was played, in order.
        failed: number of a clip → why it is left out of the means.
    """

    values: dict[str, float | str]
    unavailable: dict[str, str]
    by_clip: list[dict[str, float]] = field(default_factory=list)
    failed: dict[int, str] = field(default_factory=dict)

    def line(self) -> str:
        """The line ``TEST_METRICS: …`` that the benchmark reads its numbers from."""
        return "TEST_METRICS: " + " ".join(f"{name}={format(value, _FORMATS[name])}" for name, value in self.values.items())


def benchmark_workload(
    name: str,
    host: str | None = None,
    *,
    device: str = "auto",
    precision: str | None = None,
    data_dir: str | None = None,
    file_order: str | None = None,
    num_steps: int | None = None,
    noise: str = PORTABLE,
) -> tuple[Workload, bool]:
    """One of the benchmark's workloads, and whether it is a dry run: with a shipped host and no data, clips are of a world.

    Args:
        precision: bfloat16 on a GPU and float32 elsewhere by default.
        file_order: see `VideoFolder`.
        num_steps: ODE steps instead of the benchmark's 20.
        noise: as in `Workload`.

    Raises:
        ValueError: on a workload that the benchmark does not have, a file order in a dry run, or as `make_workload`.
    """
    task, spec = _task(name), WORKLOADS[name]
    if precision is None:
        precision = "bfloat16" if resolve_device(device).type == "cuda" else "float32"
    common = {"host": host, "device": device, "precision": precision}
    changes = {"noise": noise} | ({} if num_steps is None else {"num_steps": num_steps})
    has_data = data_dir or os.environ.get(task.data_variable) or find_data(task.data.name)
    if not has_data and host in SHIPPED:
        if file_order is not None:
            raise ValueError("a dry run has no files to take in an order; give --data-dir as well")
        world = make_workload(task.world, **common)
        lengths = {"num_context": spec.num_context, "num_predict": spec.num_predict, "num_steps": spec.num_steps}
        return replace(world, name=name, **lengths | changes), True
    return replace(make_workload(name, **common, **_given(data_dir, file_order)), **changes), False


def benchmark_clips(name: str, data_dir: str | None = None, file_order: str | None = None) -> VideoFolder:
    """The clips of one of the benchmark's workloads, without a host. Raises ValueError as `benchmark_workload`."""
    _task(name)
    return WORKLOADS[name].clips(**_given(data_dir, file_order))


def _task(name: str) -> _Task:
    if name not in TASKS:
        raise ValueError(unknown_name("workload of the benchmark", name, list(TASKS)))
    return TASKS[name]


def _given(data_dir: str | None, file_order: str | None) -> dict[str, str]:
    options = {"data_dir": data_dir, "file_order": file_order}
    return {key: value for key, value in options.items() if value is not None}


def run_benchmark(
    workload: Workload,
    max_frames: int,
    policy: RetentionPolicy | None,
    num_clips: int,
    *,
    metrics: Sequence[str] = METRICS,
    lenient: bool = False,
    progress: bool = True,
) -> BenchmarkScore:
    """Play the first test clips sequentially and score them as the benchmark does.

    Args:
        policy: None keeps everything.
        metrics: those that cannot be computed here are left out with the reason.
        lenient: leave out clips on which the policy fails, or whose file cannot be read, as the benchmark does.

    Raises:
        PolicyError: if the policy raises or its plan breaks the benchmark's rules; if ``lenient``, if it does so on all clips.
        VideoError: if a clip's file cannot be read; if ``lenient``, if that is so of all clips.
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
    failed: dict[int, str] = {}
    start = time.perf_counter()
    for clip_id in show_progress(range(num_clips), unit="clips", description="benchmark", disable=not progress):
        try:
            scores.append(_play_clip(workload, clip_id, policy, max_frames, names))
        except (PolicyError, VideoError) as error:
            failed[clip_id] = str(error)
            if not lenient or len(failed) == num_clips:
                raise
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
        "fps": len(scores) * workload.num_predict / elapsed,
        "n_frames_kept": num_kept,
        "eval_mode": "real_rollout",
        "n_clips": len(scores),
        "elapsed_s": elapsed,
    }
    return BenchmarkScore(values, unavailable, scores, failed)


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
