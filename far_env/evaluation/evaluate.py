"""Policies × workloads × budgets × noise seeds on a fixed list of clips → one record per episode, compared clip by clip."""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing, nullcontext
from pathlib import Path

from far_env.allocator import return_freed_memory
from far_env.clips.clip import check_clip_id
from far_env.contract import UNLIMITED_FRAMES, RetentionPolicy
from far_env.evaluation.batches import TokenMemory, check_token_budgets
from far_env.evaluation.comparison import Evaluation, tabulate
from far_env.evaluation.facts import made_with
from far_env.evaluation.fvd import FeatureStore
from far_env.evaluation.records import FRAMES, TOKENS, Results, Settings
from far_env.evaluation.results_folder import Recorder
from far_env.evaluation.session import Job, Player, Session
from far_env.metrics import (
    FAR_METRICS,
    KEPT_LPIPS,
    KEPT_SSIM,
    METRICS,
    NEED_ALEXNET,
    UNREFERENCED,
    lpips_unavailable,
    require_metrics,
)
from far_env.rollout.intervention import check_interventions, metric_of
from far_env.rollout.memo import DEFAULT_BYTES, FrameMemo
from far_env.rollout.noise import BENCHMARK_SEED
from far_env.workload import UNITS, Workload


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
    memory: TokenMemory | None = None,
) -> Evaluation:
    """Play every policy on every clip of one workload under one budget, noise seed 42 + clip id.

    Args:
        policies: name → policy; None is full history.
        metrics, batch_size, memo_bytes, memory: as in `evaluate_grid`, and so are the errors raised.
    """
    start = time.perf_counter()
    chosen = {"split": split, "metrics": metrics, "batch_size": batch_size, "memo_bytes": memo_bytes, "progress": progress}
    results = evaluate_grid([workload], [max_frames], policies, clip_ids, memory=memory, **chosen)
    return tabulate(results, workload.name, max_frames, clip_ids, seconds=time.perf_counter() - start)


def evaluate_grid(
    workloads: Sequence[Workload],
    budgets: Sequence[int],
    policies: Mapping[str, RetentionPolicy | None],
    clip_ids: Sequence[int],
    *,
    seeds: Sequence[int] = (BENCHMARK_SEED,),
    split: str = "test",
    metrics: Sequence[str] = METRICS,
    batch_size: int = 64,
    memo_bytes: int = DEFAULT_BYTES,
    progress: bool = True,
    interventions: Sequence[str] = (),
    optional: Collection[str] = (),
    out: Path | None = None,
    show_clips: int = 0,
    policy_facts: Mapping[str, dict[str, str]] | None = None,
    features: FeatureStore | None = None,
    player: Player | None = None,
    memory: TokenMemory | None = None,
) -> Results:
    """Play every policy under every budget on every clip of every workload with every noise seed.

    Full history is played once per workload and seed, not once per budget. A clip whose file is damaged is left out, with the
    reason in the results' ``unreadable``; the other clips are played.

    Args:
        policies: name → policy; None is full history.
        seeds: clip i is played with the noise seeds s + i. Those of trajectories are `far_env.rollout.noise.trajectory_seeds`.
        metrics: those that cannot be computed here are left out with the reason.
        interventions: of `far_env.rollout.intervention.INTERVENTIONS`; PSNR is measured under each of them too, under a name
            such as psnr_swap.
        batch_size: rollouts that are played together, of several policies under a budget if one has fewer clips. On a CPU it
            does not change the latents.
        memo_bytes: memory for frames that several policies share, because they agreed so far; 0 for none.
        optional: names of policies that are left out where they fail, with a printed reason that is also in the results'
            ``settings.failed``; the other policies are played.
        out: results folder, to which finished episodes are added as they are played; those it holds are not played again.
        show_clips: how many of the first clips have pictures there.
        policy_facts: name → `far_env.policies.policy_facts` of a policy, for the folder and for tables.
        features: receives the features of all videos, for FVD. Episodes that it lacks are played again, and their records stay.
        player: plays the episodes elsewhere, see `far_env.distributed.evaluation`; by default this process does.
        memory: budgets count tokens, and policies are `far_env.rollout.token_policy.TokenPolicy`; None for frames.

    Raises:
        PolicyError: if a policy that is not optional raises or answers an invalid plan.
        ClipIdError: on a clip id out of range.
        ValueError: on an unknown split or metric, without clips or policies, or if the folder cannot be used.
        VideoError: if no clip of a workload can be read.
        ValueError: on metrics of single clips in a workload without given frames, which has no true continuation.
        MetricUnavailable: if no metric can be computed.
    """
    if not policies or not len(clip_ids) or not seeds or batch_size < 1:
        raise ValueError(
            f"an evaluation needs a policy, a clip, a noise seed and a batch size of at least 1; got {len(policies)} policies, "
            f"{len(clip_ids)} clips, {len(seeds)} seeds and batch size {batch_size}"
        )
    interventions = check_interventions(interventions)
    if memory is not None:
        check_token_budgets(workloads, budgets)
        if interventions:
            raise ValueError("interventions replace whole frames, which a memory of tokens does not have; leave them out")
    names, unavailable = available_metrics(metrics)
    if memory is not None and {KEPT_SSIM, KEPT_LPIPS} & {*names}:
        raise ValueError(
            "kept_ssim and kept_lpips compare with whole kept frames, which a memory of tokens does not have; leave them out"
        )
    for workload in workloads:
        referenced = [name for name in names if name not in UNREFERENCED]
        if workload.num_context == 0 and (referenced or interventions or (features is None and not names)):
            raise ValueError(
                f"{workload.name} generates videos from nothing, which have no true continuation: its only metrics are "
                f"{', '.join(UNREFERENCED)} and fvd"
            )
        if interventions and workload.host.chunked:
            raise ValueError(
                f"interventions replace single frames, and host {workload.host.name} keeps chunks of them; leave them out"
            )
        if features is not None and not workload.has_truth:
            raise ValueError(f"{workload.name} has prompts alone, and FVD compares with true videos; leave fvd out")
    for workload, clip_id in itertools.product(workloads, (min(clip_ids), max(clip_ids))):
        check_clip_id(workload.clips, split, clip_id)
    jobs = [Job(UNLIMITED_FRAMES, name, None) for name, policy in policies.items() if policy is None]
    limited = [(name, policy) for name, policy in policies.items() if policy is not None]
    jobs += [Job(min(budget, UNLIMITED_FRAMES), name, policy) for budget in budgets for name, policy in limited]
    settings = Settings(
        workloads=[workload.name for workload in workloads],
        budgets=sorted({job.budget for job in jobs}),
        policies={name: _remark_of(policy) | dict((policy_facts or {}).get(name, {})) for name, policy in policies.items()},
        seeds=sorted(set(seeds)),
        split=split,
        clips=sorted({int(i) for i in clip_ids}),
        metrics=[*names, *map(metric_of, interventions)],
        unavailable=unavailable,
        num_context={workload.name: workload.num_context for workload in workloads},
        num_predict={workload.name: workload.num_predict for workload in workloads},
        frame_size={workload.name: workload.host.frame_size for workload in workloads},
        show_clips=show_clips,
        made_with={workload.name: made_with(workload, memory) for workload in workloads},
        memory=FRAMES if memory is None else TOKENS,
        units={workload.name: _units(workload) for workload in workloads if workload.host.chunked},
    )
    return_freed_memory()  # of what ran before, such as the updates of a training
    recorder = None if out is None else Recorder(out, settings)
    with nullcontext() if recorder is None else closing(recorder):
        session = Session(settings, recorder, FrameMemo(memo_bytes), frozenset(optional), progress, features, memory)
        (Session.play if player is None else player)(session, workloads, jobs, batch_size)
        return session.results


def available_metrics(wanted: Sequence[str] = METRICS) -> tuple[tuple[str, ...], dict[str, str]]:
    """Split the wanted metrics into those that can be computed here and the reasons for the others.

    Raises:
        ValueError: on an unknown metric.
        MetricUnavailable: if none of them can be computed.
    """
    unavailable = {}
    if (needy := NEED_ALEXNET.intersection(wanted)) and (reason := lpips_unavailable()):
        unavailable = {name: reason for name in wanted if name in needy}
    names = tuple(name for name in wanted if name not in unavailable)
    require_metrics(names or wanted, UNREFERENCED)
    return tuple(sorted(set(names), key=(*METRICS, *FAR_METRICS, *UNREFERENCED).index)), unavailable


def _units(workload: Workload) -> list[int]:
    """Chunks that are given and predicted, and how much of a budget one takes."""
    share = 1 if workload.budget_counts == UNITS else max(unit.frames for unit in workload.units)
    return [workload.context_units, workload.predict_units, share]


def _remark_of(policy: RetentionPolicy | None) -> dict[str, str]:
    """The fact ``remark`` of a policy that has one."""
    remark = getattr(policy, "remark", "")
    return {"remark": remark} if remark and isinstance(remark, str) else {}
