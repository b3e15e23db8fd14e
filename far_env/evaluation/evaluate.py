"""Policies × clips → metrics: every policy plays the same clips with the same noise, compared clip by clip."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from far_env.clips.clip import check_clip_id
from far_env.contract import UNLIMITED_FRAMES, RetentionPolicy
from far_env.evaluation.statistics import mean_interval
from far_env.metrics import METRICS, clip_metrics, lpips_unavailable, require_metrics
from far_env.provenance import git_commit, versions
from far_env.rollout.memo import DEFAULT_BYTES, FrameMemo
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.rollout.play import play
from far_env.workloads import Workload

FULL_HISTORY = "full_history"
"""The reference that lifts the budget; wherever a policy is named, this name means no policy at all."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of several policies on the same clips.

    Attributes:
        scores: policy name → metric name → float64 (clips,), in the order of ``clip_ids``.
        unavailable: metric name → why it was not computed.
        provenance: what was run on what; see `provenance`.
    """

    clip_ids: list[int]
    scores: dict[str, dict[str, np.ndarray]]
    unavailable: dict[str, str]
    provenance: dict[str, object]

    def difference(self, policy: str, reference: str, metric: str = "psnr") -> np.ndarray:
        """Paired differences (clips,) of one policy to another."""
        return self.scores[policy][metric] - self.scores[reference][metric]

    def summary(self, reference: str = "recent_fill") -> dict[str, object]:
        """Plain values for JSON: per policy and metric mean, low, high, n, and the paired PSNR difference to ``reference``."""
        policies: dict[str, dict[str, object]] = {}
        for name, columns in self.scores.items():
            policies[name] = {metric: asdict(mean_interval(values)) for metric, values in columns.items()}
            if "psnr" in columns and reference in self.scores and name != reference:
                policies[name][f"psnr_minus_{reference}"] = asdict(mean_interval(self.difference(name, reference)))
        return {"policies": policies, "unavailable": self.unavailable, **self.provenance}


def available_metrics(wanted: Sequence[str] = METRICS) -> tuple[tuple[str, ...], dict[str, str]]:
    """Split the wanted metrics into those that can be computed here and the reasons for the others.

    Raises:
        ValueError: on an unknown metric.
        MetricUnavailable: if none of them can be computed.
    """
    unavailable = {}
    if "lpips" in wanted and (reason := lpips_unavailable()):
        unavailable["lpips"] = reason
    names = tuple(name for name in wanted if name not in unavailable)
    require_metrics(names or wanted)
    return names, unavailable


def evaluate(
    workload: Workload,
    max_frames: int,
    policies: Mapping[str, RetentionPolicy | None],
    clip_ids: Sequence[int],
    *,
    split: str = "test",
    metrics: Sequence[str] = METRICS,
    batch_size: int = 64,
    memo_bytes: int = DEFAULT_BYTES,
    progress: bool = True,
) -> Evaluation:
    """Play every policy on every clip, noise seed 42 + clip id.

    Args:
        policies: name → policy; None is full history.
        metrics: those that cannot be computed here are left out with the reason.
        memo_bytes: memory for frames that several policies share, because they agreed so far; 0 for none.

    Raises:
        PolicyError: if a policy raises or answers an invalid plan.
        ClipIdError: on a clip id out of range.
        ValueError: on an unknown split or metric, or without clips or policies.
        MetricUnavailable: if no metric can be computed.
    """
    start = time.perf_counter()
    if not policies or not len(clip_ids) or batch_size < 1:
        raise ValueError(
            f"an evaluation needs a policy, a clip and a batch size of at least 1; got {len(policies)} policies, "
            f"{len(clip_ids)} clips and batch size {batch_size}"
        )
    names, unavailable = available_metrics(metrics)
    for clip_id in (min(clip_ids), max(clip_ids)):
        check_clip_id(workload.clips, split, clip_id)
    columns: dict[str, dict[str, list[float]]] = {name: {metric: [] for metric in names} for name in policies}
    memo = FrameMemo(memo_bytes)
    total = len(policies) * len(clip_ids) * workload.num_predict
    with tqdm(total=total, unit="frame", desc="evaluate", disable=not progress, dynamic_ncols=True) as bar:
        for first in range(0, len(clip_ids), batch_size):
            ids = [int(i) for i in clip_ids[first : first + batch_size]]
            clips = [workload.clips.clip(split, i) for i in ids]
            truth = torch.from_numpy(np.stack([c.frames[workload.num_context : workload.num_frames] for c in clips]))
            seeds = [BENCHMARK_SEED + i for i in ids]
            for name, policy in policies.items():
                bar.set_postfix_str(name)
                rollouts, _ = play(workload, clips, seeds, policy, max_frames, memo=memo, on_frame=bar.update)
                predicted = rollouts.decode(range(len(clips))).float()
                for scores in clip_metrics(predicted, truth.to(predicted.device), names):
                    for metric, value in scores.items():
                        columns[name][metric].append(value)
                del rollouts  # before the next policy's are made
    scores = {name: {metric: np.array(values) for metric, values in own.items()} for name, own in columns.items()}
    seconds = time.perf_counter() - start
    facts = provenance(workload, max_frames) | {"split": split, "clips": len(clip_ids), "seconds": round(seconds, 1)}
    return Evaluation([int(i) for i in clip_ids], scores, unavailable, facts)


def provenance(workload: Workload, max_frames: int) -> dict[str, object]:
    """Which host, weights, clips, seeds, dtype, device, commit and versions a number was made with."""
    host = workload.host
    return {
        "workload": workload.name,
        "budget": "full history" if max_frames >= UNLIMITED_FRAMES else max_frames,
        "context": workload.num_context,
        "predict": workload.num_predict,
        "ode_steps": workload.num_steps,
        "guidance": workload.guidance,
        "actions": workload.actions,
        "noise_seed": f"{BENCHMARK_SEED} + clip id",
        "host": host.name,
        "weights": host.weights_hash,
        "device": str(host.device),
        "dtype": str(host.dtype).removeprefix("torch."),
        "commit": git_commit(),
        "versions": versions(),
    }
