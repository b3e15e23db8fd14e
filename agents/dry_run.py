"""A training run's checks and what it will cost, without the run: ``far-env train --dry-run``. Nothing is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from far_env.agents.config import TOKENS, AgentTraining
from far_env.agents.histories import check_true_signals
from far_env.agents.network import RetentionNetwork
from far_env.agents.ppo import PPOStage
from far_env.agents.run_costs import HostCosts, RolloutCosts, host_costs, measured_flops, on_meta, rollout_costs, scorer_flops
from far_env.agents.run_counts import Counts, StageCounts, run_counts
from far_env.agents.surrogate import MEMO_BYTES, SurrogateVectorEnv, comparison_bytes
from far_env.agents.trainer import Run, check_run_dir, checked, stages
from far_env.contract import UNLIMITED_FRAMES
from far_env.envs.vector_env import FrameRetentionVectorEnv
from far_env.host.far_host import require_far
from far_env.policies import load_policy
from far_env.progress import show_progress
from far_env.workload import deciding_budgets

EVALUATION_BATCH = 64
"""Rollouts that validation and the table play together."""
GIB = 2**30


@dataclass(frozen=True)
class StageCost:
    """A stage's counts, its operations on the host's device and in the scorer, and its hours: of the device and of the CPU."""

    counts: StageCounts
    host_flops: int
    scorer_flops: int
    device_hours: float
    cpu_hours: float


@dataclass(frozen=True)
class RunCost:
    """What a run will cost.

    Attributes:
        stages: in order, with validation and the table.
        device_memory: what → bytes, on the device of the host; main_memory: the same beside it.
        disk: bytes of the run's files.
        flops_per_second: of the device, given or measured.
        device: in words.
    """

    stages: list[StageCost]
    device_memory: dict[str, int]
    main_memory: dict[str, int]
    disk: int
    flops_per_second: float
    device: str

    @property
    def hours(self) -> float:
        """Of all stages."""
        return sum(stage.device_hours + stage.cpu_hours for stage in self.stages)


def dry_run(config: AgentTraining, tflops: float | None = None) -> RunCost:
    """Check what a run checks, print what it will cost, and return that.

    Args:
        tflops: 10¹² operations per second of the host's device; by default a short matrix product is timed on it.

    Raises:
        ValueError: if the run would not start, or a stage of it would not.
    """
    for name in config.table:
        load_policy(name)
    config, workloads, budgets = checked(config)
    folder = Path(config.run_dir)
    place = check_folder(folder)
    check_run_dir(config, folder)
    cost = estimate(Run(config, workloads, budgets, folder, {}), tflops)
    print(cost_text(cost, folder, shutil.disk_usage(place).free))
    return cost


def check_folder(folder: Path) -> Path:
    """The nearest folder that exists. Raises ValueError unless the run's folder could be made and written to."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"the run folder {folder} cannot be written: {place} is not a writable folder; choose another one")
    return place


def estimate(run: Run, tflops: float | None = None) -> RunCost:
    """Count a run's stages and their costs. Raises ValueError if a host is no FAR, whose operations are counted."""
    if run.config.network.memory == TOKENS:
        raise ValueError("the cost of a training for a token memory is not estimated; leave --dry-run out")
    for workload in run.workloads:
        require_far(workload.host, "an estimate of what a run costs")
    if run.config.imitation.uses_true_frames:
        check_true_signals(run.config.network.signals)
    workloads = [on_meta(workload) for workload in run.workloads]
    planned = [stage for stage in stages(replace(run, workloads=workloads)) if isinstance(stage, PPOStage)]
    envs = {stage.name: stage.make_envs() for stage in planned}
    counts = run_counts(replace(run, workloads=workloads), envs, planned)
    hosts, rollouts = {}, {}
    for workload, placed in show_progress(
        list(zip(workloads, run.workloads, strict=True)), description="count operations", unit="workloads", delay=2
    ):
        hosts[workload.name] = host_costs(workload, deciding_budgets(workload, run.budgets))
        rollouts[workload.name] = rollout_costs(placed, run.budgets, run.config.network, run.config.imitation)
    host = run.workloads[0].host
    width = host.transformer.x_embedder.out_features
    rate = tflops * 1e12 if tflops is not None else measured_flops(host.device, host.dtype, width)
    costs = [_stage_cost(stage, hosts, rollouts, run.config, rate, envs) for stage in counts]
    device_memory = _device_memory(run, hosts, planned, envs)
    main_memory, disk = _main_memory_and_disk(run, counts, rollouts, planned, envs)
    name = str(host.device) if host.device.type == "cpu" else torch.cuda.get_device_name(host.device)
    given = "given" if tflops is not None else "measured"
    return RunCost(costs, device_memory, main_memory, disk, rate, f"{name}, {given}")


def _stage_cost(
    stage: StageCounts,
    hosts: dict[str, HostCosts],
    rollouts: dict[str, RolloutCosts],
    config: AgentTraining,
    rate: float,
    envs: dict[str, list[FrameRetentionVectorEnv]],
) -> StageCost:
    host_flops, scorer, cpu_seconds = 0, 0, 0.0
    is_ppo = stage.name in envs
    is_surrogate = is_ppo and isinstance(envs[stage.name][0], SurrogateVectorEnv)
    total = max(stage.total("decisions"), 1)
    for name, counts in stage.by_workload.items():
        host, made = hosts[name], rollouts[name]
        host_flops += host_work(counts, host)
        forward = scorer_flops(config.network, made.mean_nodes, learn=False)
        speed = made.learn_flops / made.learn_seconds
        if is_ppo:
            # Scorer and critic decide, mostly at one step of all episodes; both learn, on graphs padded to the largest.
            acting = 2 * forward * counts.decisions
            learning = 2 * scorer_flops(config.network, made.nodes, learn=True) * stage.passes * counts.decisions // total
            cpu_seconds += counts.decisions * made.evict_seconds + counts.compared * made.begin_seconds * is_surrogate
        else:
            acting, learning = forward * counts.calls, made.learn_flops * stage.passes * counts.decisions // total
            cpu_seconds += made.collect_seconds * counts.rollouts if counts.decisions else 0
        scorer += acting + learning
        cpu_seconds += (acting + learning) / speed
    return StageCost(stage, host_flops, scorer, host_flops / rate / 3600, cpu_seconds / 3600)


def host_work(counts: Counts, host: HostCosts) -> int:
    """Operations of encoder, transformer and decoder."""
    generated = sum(host.frame[budget] * frames for budget, frames in counts.frames.items())
    return generated + host.encode * counts.frames_encoded + host.decode * counts.frames_decoded


def _device_memory(
    run: Run,
    hosts: dict[str, HostCosts],
    planned: Sequence[PPOStage],
    envs: dict[str, list[FrameRetentionVectorEnv]],
) -> dict[str, int]:
    """The host's models, and the most that keys and values and pictures take in a stage."""
    weights = {workload.host.name: hosts[workload.name].weight_bytes for workload in run.workloads}
    caches, pictures = 0, 0
    for workload in run.workloads:
        cache = hosts[workload.name].cache_bytes
        limited = max(size for budget, size in cache.items() if budget != UNLIMITED_FRAMES)
        num_full = sum(load_policy(name) is None for name in run.config.table)
        num_limited = 1 + len(run.config.table) - num_full
        played = [(limited, max(run.config.test_clips * num_limited, run.config.validation_clips if planned else 0))]
        if num_full:
            played.append((cache[UNLIMITED_FRAMES], run.config.test_clips * num_full))
        caches = max(caches, *(2 * size * min(EVALUATION_BATCH, rollouts) for size, rollouts in played))
    for stage in planned:
        for env in envs[stage.name]:
            if not isinstance(env, SurrogateVectorEnv):
                workload = env.episodes.workload
                own = max(hosts[workload.name].cache_bytes[budget] for budget in env.config.budgets)
                caches, pictures = max(caches, 2 * own * env.num_envs), pictures + env.episodes.picture_bytes
    return {"host": sum(weights.values()), "keys and values": caches, "pictures": pictures}


def _main_memory_and_disk(
    run: Run,
    counts: Sequence[StageCounts],
    rollouts: dict[str, RolloutCosts],
    planned: Sequence[PPOStage],
    envs: dict[str, list[FrameRetentionVectorEnv]],
) -> tuple[dict[str, int], int]:
    """Main memory by what takes it, and the bytes of the run's files."""
    parts = [(name, part) for stage in counts for name, part in stage.by_workload.items() if stage.name not in envs]
    recorded = [(rollouts[name], part.rollouts) for name, part in parts if part.decisions]
    scorer = sum(value.nbytes for value in RetentionNetwork(run.config.network).state_dict().values())
    disk = sum(made.file_bytes * count for made, count in recorded)
    disk += scorer * (1 + sum(stage.name.startswith("imitation") for stage in counts))
    memory = {"decisions of imitation": sum(made.memory_bytes * count for made, count in recorded)}
    buffers, remembered = 0, 0
    for stage in planned:
        observation = stage.observation_bytes(envs[stage.name])
        settings = stage.settings
        buffers = max(buffers, observation * settings.num_envs * settings.n_steps)
        # The policy, its optimiser's two moments, the best scorer, and each row's observation twice.
        disk += 2 * scorer * 3 + scorer + 2 * observation * settings.num_envs
        for env in envs[stage.name]:
            if isinstance(env, SurrogateVectorEnv):
                clip = comparison_bytes(env.episodes.workload)
                remembered += min(MEMO_BYTES, run.config.train_clips * clip) + env.num_envs * clip
    memory["rollout buffer of PPO"], memory["comparisons of the surrogate"] = buffers, remembered
    return memory, disk


def cost_text(cost: RunCost, folder: Path, free_bytes: int) -> str:
    """The table that is printed."""
    head = ("stage", "clips encoded", "rollouts", "frames", "decisions", "host PFLOP", "scorer PFLOP", "hours")
    rows = [head]
    for stage in cost.stages:
        count = stage.counts.total
        numbers = [count(name) for name in ("clips_encoded", "rollouts", "frames_generated", "decisions")]
        amounts = [f"{stage.host_flops / 1e15:.4g}", f"{stage.scorer_flops / 1e15:.4g}"]
        hours = f"{stage.device_hours + stage.cpu_hours:.2g}"
        rows.append((stage.counts.name, *(f"{number:,}" for number in numbers), *amounts, hours))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    device = sum(stage.device_hours for stage in cost.stages)
    lines += [
        "",
        f"hours  {cost.hours:.2g}: {device:.2g} of the host at {cost.flops_per_second / 1e12:.3g} TFLOP/s ({cost.device}), "
        f"{cost.hours - device:.2g} of decisions on this CPU, timed on made rollouts",
        f"memory  {_sizes(cost.device_memory)} on the device of the host; {_sizes(cost.main_memory)}",
        f"disk  {_size(cost.disk)} in {folder}, {_size(free_bytes)} free" + ", too little" * (free_bytes < cost.disk),
        "nothing was written; the same command without --dry-run starts the run",
    ]
    return "\n".join(lines)


def _sizes(parts: dict[str, int]) -> str:
    named = ", ".join(f"{name} {_size(size)}" for name, size in parts.items() if size)
    return f"{_size(sum(parts.values()))} ({named})" if named else "nothing"


def _size(count: int) -> str:
    return f"{count / GIB:.3g} GiB" if count >= GIB else f"{count / 2**20:.3g} MiB"
