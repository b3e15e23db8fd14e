"""Policies × workloads × budgets × noise seeds on a fixed list of clips → one record per episode, compared clip by clip."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from far_env.clips.clip import Clip, check_clip_id
from far_env.clips.copying import evidence_gaps
from far_env.contract import UNLIMITED_FRAMES, RetentionPolicy
from far_env.errors import PolicyError, VideoError
from far_env.evaluation.comparison import Evaluation, tabulate
from far_env.evaluation.fvd import FeatureStore
from far_env.evaluation.records import FRAMES, TOKENS, Record, Recorder, Results, Settings, cell
from far_env.evaluation.scores import all_metrics, frame_psnr, partner_clip
from far_env.evaluation.token_memory import Episodes, TokenMemory, check_token_budgets, play_episodes
from far_env.metrics import FAR_METRICS, METRICS, NEED_ALEXNET, lpips_unavailable, require_metrics
from far_env.policies import FULL_HISTORY
from far_env.progress import Progress, show_progress
from far_env.provenance import git_commit, machine, versions
from far_env.rollout.intervention import IntervenedFrames, check_interventions, interventions_of, metric_of
from far_env.rollout.memo import DEFAULT_BYTES, FrameMemo
from far_env.rollout.noise import BENCHMARK_SEED, TRAJECTORY_STRIDE, trajectory
from far_env.rollout.play import Decision, play
from far_env.workloads import Workload

__all__ = ["FULL_HISTORY", "Evaluation", "Job", "Session", "available_metrics", "evaluate", "evaluate_grid"]


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
    """Play every policy on every clip of one workload under one budget, noise seed 42 + clip id.

    Args:
        policies: name → policy; None is full history.
        metrics, batch_size, memo_bytes: as in `evaluate_grid`, and so are the errors raised.
    """
    start = time.perf_counter()
    chosen = {"split": split, "metrics": metrics, "batch_size": batch_size, "memo_bytes": memo_bytes, "progress": progress}
    results = evaluate_grid([workload], [max_frames], policies, clip_ids, **chosen)
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
        memo_bytes: memory for frames that several policies share, because they agreed so far; 0 for none.
        optional: names of policies that are left out where they fail, with a printed reason that is also in the results'
            ``settings.failed``; the other policies are played.
        out: results folder, to which finished episodes are added as they are played; those it holds are not played again.
        show_clips: how many of the first clips have pictures there.
        policy_facts: name → `far_env.policies.policy_facts` of a policy, for the folder and for tables.
        features: receives the features of all videos, for FVD. Episodes that it lacks are played again, and their records stay.
        player: plays the episodes elsewhere, see `far_env.distributed.evaluation`; by default this process does.
        memory: budgets count tokens, and policies are `far_env.rollout.streaming.TokenPolicy`; None for frames.

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
    for workload in workloads:
        if workload.num_context == 0 and (names or interventions or features is None):
            raise ValueError(
                f"{workload.name} generates videos from nothing, which have no true continuation: its only metric is fvd"
            )
    for workload, clip_id in itertools.product(workloads, (min(clip_ids), max(clip_ids))):
        check_clip_id(workload.clips, split, clip_id)
    jobs = [Job(UNLIMITED_FRAMES, name, None) for name, policy in policies.items() if policy is None]
    limited = [(name, policy) for name, policy in policies.items() if policy is not None]
    jobs += [Job(min(budget, UNLIMITED_FRAMES), name, policy) for budget in budgets for name, policy in limited]
    settings = Settings(
        workloads=[workload.name for workload in workloads],
        budgets=sorted({job.budget for job in jobs}),
        policies={name: _remark(policy) | dict((policy_facts or {}).get(name, {})) for name, policy in policies.items()},
        seeds=sorted(set(seeds)),
        split=split,
        clips=sorted({int(i) for i in clip_ids}),
        metrics=[*names, *map(metric_of, interventions)],
        unavailable=unavailable,
        num_context={workload.name: workload.num_context for workload in workloads},
        num_predict={workload.name: workload.num_predict for workload in workloads},
        frame_size={workload.name: workload.host.frame_size for workload in workloads},
        show_clips=show_clips,
        made_with={workload.name: _made_with(workload, memory) for workload in workloads},
        memory=FRAMES if memory is None else TOKENS,
    )
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
    require_metrics(names or wanted)
    return tuple(sorted(set(names), key=(*METRICS, *FAR_METRICS).index)), unavailable


def record_facts(workload: Workload, memory: TokenMemory | None = None) -> dict[str, object]:
    """Which host, weights, dtype, device, machine, commit and versions a number is made with."""
    host = workload.host
    options = {name: value for name, value in _clip_options(workload).items() if name != "data_dir"}
    return {
        "host": host.name,
        "weights": host.weights_hash,
        "ode_steps": workload.num_steps,
        "guidance": workload.guidance,
        "actions": workload.actions,
        "feedback": workload.feedback,
        "noise": workload.noise,
        **({"clip_options": options} if options else {}),
        **({} if memory is None else {"memory": TOKENS, "max_gap": memory.max_gap}),
        "dtype": _dtype_name(workload),
        "device": str(host.device),
        "machine": machine(host.device),
        "commit": git_commit(),
        "versions": versions(),
    }


def clip_hash(workload: Workload, clip: Clip) -> str:
    """First 16 hex digits of the SHA-256 of the clip's true frames."""
    return _digest(np.ascontiguousarray(clip.frames[: workload.num_frames]).tobytes())


def latents_hash(latents: Tensor) -> str:
    """First 16 hex digits of the SHA-256 of one rollout's generated latents (n_predict, C, h, w)."""
    return _digest(latents.cpu().contiguous().view(torch.uint8).numpy().tobytes())


Episode = tuple[int, int]
"""Clip and noise seed."""


@dataclass(frozen=True)
class Job:
    """One policy under one budget; None is full history."""

    budget: int
    name: str
    policy: RetentionPolicy | None


class Sink(Protocol):
    """Where finished episodes go; `far_env.evaluation.records.Recorder` is one."""

    results: Results

    def add(self, records: Iterable[Record]) -> None:
        """Keep records of new episodes."""

    def leave_out(self, policy: str, where: str, reason: str) -> None:
        """Remember why a policy has no further episodes in a `cell`."""

    def has_picture(self, path: Path) -> bool:
        """Whether the picture is there already."""

    def save_picture(self, path: Path, frames: np.ndarray) -> None:
        """Keep frames (T, 3, H, W) in [0, 1] as a picture."""


class Session:
    """Plays the episodes that are missing, and keeps them."""

    def __init__(
        self,
        settings: Settings,
        recorder: Sink | None,
        memo: FrameMemo,
        optional: frozenset[str],
        progress: bool,
        features: FeatureStore | None,
        memory: TokenMemory | None = None,
    ) -> None:
        self.asked = settings
        self.token_memory = memory
        self.recorder = recorder
        self.results = Results(settings, []) if recorder is None else recorder.results
        self.memo = memo
        self.optional = optional
        self.progress = progress
        self.features = features
        self.recorded = set(self.results.episode_keys())
        self.done = self.recorded if features is None else self.recorded & features.episodes
        self.clip_hashes = self.results.clip_hashes()
        self.gaps: dict[tuple[str, int], list[int | None]] = {}
        self.partners: dict[tuple[str, int], Clip | None] = {}
        self.shown = set(self.results.settings.clips[: self.results.settings.show_clips])

    def play(self, workloads: Sequence[Workload], jobs: Sequence[Job], batch_size: int) -> None:
        """All jobs on one batch of episodes after the other, so that they share frames and a stop leaves comparable results."""
        with self.bar(workloads, jobs) as bar:
            for workload in workloads:
                facts, running = record_facts(workload, self.token_memory), list(jobs)
                for batch in self.batches(batch_size):
                    self.play_batch(workload, batch, running, facts, bar)

    def batches(self, batch_size: int) -> list[list[Episode]]:
        """All episodes of a job, in the order and the groups in which they are played."""
        episodes = list(itertools.product(self.asked.clips, self.asked.seeds))
        return [episodes[first : first + batch_size] for first in range(0, len(episodes), batch_size)]

    def bar(self, workloads: Sequence[Workload], jobs: Sequence[Job]) -> Progress:
        """Progress over the frames of all missing episodes."""
        episodes = list(itertools.product(self.asked.clips, self.asked.seeds))
        total = sum(
            workload.num_predict * len(self.missing(workload, job, episodes))
            for workload, job in itertools.product(workloads, jobs)
        )
        return show_progress(total=total, unit="frames", description="evaluate", disable=not self.progress)

    def missing(self, workload: Workload, job: Job, episodes: Sequence[Episode]) -> list[Episode]:
        """Those of these episodes that are not there yet."""
        return [episode for episode in episodes if (workload.name, job.budget, job.name, *episode) not in self.done]

    def play_batch(
        self,
        workload: Workload,
        episodes: Sequence[Episode],
        jobs: list[Job],
        facts: dict[str, Any],
        bar: Progress,
    ) -> None:
        """Play those of these episodes that are missing. A job that cannot run and need not is taken out of ``jobs``."""
        clips: dict[int, Clip] = {}
        self.partners.clear()
        for job in list(jobs):
            missing = self.missing(workload, job, episodes)
            self._read_clips(workload, [i for i, _ in missing], clips, bar)
            wanted = [episode for episode in missing if episode[0] in clips]
            if not wanted:
                continue
            bar.set_postfix_str(f"{workload.name} {job.budget} {job.name}")
            try:
                self._play_job(workload, [seed for _, seed in wanted], [clips[i] for i, _ in wanted], job, facts, bar)
            except PolicyError as error:
                if job.name not in self.optional:
                    raise
                jobs.remove(job)
                self.leave_out(workload, job, str(error))
                bar.write(f"left out {job.name} on {workload.name} under budget {job.budget}: {error}", file=sys.stderr)

    def leave_out(self, workload: Workload, job: Job, reason: str) -> None:
        """Remember why a job has no further episodes on a workload."""
        where = cell(workload.name, job.budget)
        if self.recorder is None:
            self.results.settings.failed.setdefault(job.name, {})[where] = reason
        else:
            self.recorder.leave_out(job.name, where, reason)

    def _read_clips(self, workload: Workload, clip_ids: Sequence[int], clips: dict[int, Clip], bar: Progress) -> None:
        """Add clips that are not there yet; one whose file is damaged is left out of the evaluation."""
        for clip_id in clip_ids:
            if clip_id in clips or (workload.name, clip_id) in self.results.unreadable:
                continue
            try:
                clips[clip_id] = self._clip(workload, clip_id)
                partner = partner_clip(workload, self.asked.split, clip_id, self.asked.metrics)
                self.partners[workload.name, clip_id] = partner
            except VideoError as error:
                clips.pop(clip_id, None)
                self.results.unreadable[workload.name, clip_id] = str(error)
                bar.write(f"left out clip {clip_id} of {workload.name}: {error}", file=sys.stderr)
                if all((workload.name, i) in self.results.unreadable for i in self.asked.clips):
                    raise

    def _clip(self, workload: Workload, clip_id: int) -> Clip:
        """Read a clip. Raises ValueError as `check_clip`."""
        clip = workload.clips.clip(self.asked.split, clip_id)
        self.check_clip(workload.name, clip_id, clip_hash(workload, clip))
        if (workload.name, clip_id) not in self.gaps:
            lengths = (workload.num_context, workload.num_frames)
            self.gaps[workload.name, clip_id] = evidence_gaps(workload.clips, clip, *lengths)
        return clip

    def check_clip(self, workload: str, clip_id: int, content: str) -> None:
        """Raise ValueError if earlier records have another clip under this number, so that policies would not be comparable."""
        if self.clip_hashes.setdefault((workload, clip_id), content) != content:
            raise ValueError(
                f"clip {clip_id} of {workload} differs from {self.results.folder}, which was made with other data; "
                "choose another folder"
            )

    def _play_job(
        self, workload: Workload, seeds: list[int], clips: list[Clip], job: Job, facts: dict[str, Any], bar: Progress
    ) -> None:
        noise_seeds = [seed + clip.clip_id for seed, clip in zip(seeds, clips, strict=True)]
        partners = [self.partners[workload.name, clip.clip_id] for clip in clips]
        names = interventions_of(self.asked.metrics)
        intervened = IntervenedFrames(names, workload, noise_seeds, partners, self.memo)
        if self.token_memory is not None:
            played = play_episodes(workload, clips, noise_seeds, job.policy, job.budget, self.token_memory, bar.update)
        else:
            played = self._play_frames(workload, clips, noise_seeds, job, intervened, bar)
        predicted, latents = played.predicted, played.latents
        truth = np.stack([clip.frames[workload.num_context : workload.num_frames] for clip in clips])
        truth = torch.from_numpy(truth).to(predicted.device)
        scores = all_metrics(predicted, truth, self.asked.metrics, intervened)
        by_frame = frame_psnr(predicted, truth).tolist()
        records = []
        for row, clip in enumerate(clips):
            if any(math.isnan(value) for value in (*scores[row].values(), *by_frame[row])):
                where = f"{workload.name}, clip {clip.clip_id}, under {job.name}"
                raise ValueError(f"{where}: the host {workload.host.name} generated values that are not numbers")
            records.append(
                Record(
                    workload=workload.name,
                    budget=job.budget,
                    policy=job.name,
                    clip=clip.clip_id,
                    seed=seeds[row],
                    plan=played.plans[row],
                    metrics=scores[row],
                    psnr_per_frame=by_frame[row],
                    decision_ms=played.decision_ms[row],
                    clip_sha256=self.clip_hashes[workload.name, clip.clip_id],
                    latents_sha256=latents_hash(latents[row]),
                    facts=facts,
                    evidence_gaps=self.gaps[workload.name, clip.clip_id],
                )
            )
        if self.features is not None:
            self.features.add(workload, job.budget, job.name, clips, seeds, predicted)
        if self.recorder is not None:
            self._save_pictures(self.recorder, workload, clips, records, predicted)
        self.keep(records)

    def keep(self, records: Sequence[Record]) -> None:
        """Keep the records of episodes that have none yet."""
        new = [record for record in records if record.key not in self.recorded]
        if self.recorder is None:
            self.results.records.extend(new)
        else:
            self.recorder.add(new)
        self.recorded |= {record.key for record in new}
        self.done |= {record.key for record in records}

    def _play_frames(
        self,
        workload: Workload,
        clips: list[Clip],
        noise_seeds: list[int],
        job: Job,
        intervened: IntervenedFrames,
        bar: Progress,
    ) -> Episodes:
        hooks = {"on_frame": bar.update, "before_frame": intervened}
        rollouts, decisions = play(workload, clips, noise_seeds, job.policy, job.budget, memo=self.memo, **hooks)
        rows = range(len(clips))
        plans = [[_entry(decision) for decision in of_row] for of_row in decisions]
        costs = [_milliseconds(of_row) for of_row in decisions]
        return Episodes(rollouts.generated(rows), rollouts.decode(rows).float(), plans, costs)

    def _save_pictures(
        self, recorder: Sink, workload: Workload, clips: list[Clip], records: list[Record], predicted: Tensor
    ) -> None:
        for clip, record, frames in zip(clips, records, predicted, strict=True):
            # Of several trajectories, the first is shown.
            further = trajectory(record.seed) > 0 and record.seed % TRAJECTORY_STRIDE in self.asked.seeds
            if clip.clip_id in self.shown and not further:
                truth = self.results.truth_picture(workload.name, clip.clip_id)
                if not recorder.has_picture(truth):
                    recorder.save_picture(truth, clip.frames[: workload.num_frames])
                recorder.save_picture(self.results.picture(record), frames.cpu().numpy())


Player = Callable[[Session, Sequence[Workload], Sequence[Job], int], None]
"""Plays the missing episodes of a session: workloads × jobs, in `Session.batches` of the given size."""


def _remark(policy: RetentionPolicy | None) -> dict[str, str]:
    """The fact ``remark`` of a policy that has one."""
    remark = getattr(policy, "remark", "")
    return {"remark": remark} if remark and isinstance(remark, str) else {}


def _made_with(workload: Workload, memory: TokenMemory | None) -> dict[str, object]:
    """What shapes a workload's numbers wherever they are made; folders mean the same from any working directory."""
    host, options = workload.host, _clip_options(workload)
    if options.get("data_dir") is not None:
        options["data_dir"] = str(Path(options["data_dir"]).resolve())
    return {
        "weights": host.weights_hash,
        "ode_steps": workload.num_steps,
        "dtype": _dtype_name(workload),
        "feedback": workload.feedback,
        "clip_options": options,
        **({} if memory is None else {"max_gap": memory.max_gap}),
    }


def _clip_options(workload: Workload) -> dict[str, Any]:
    """The options of the workload's clips as they are read back from JSON."""
    return json.loads(json.dumps(dict(workload.clip_options), default=str))


def _dtype_name(workload: Workload) -> str:
    return str(workload.host.dtype).removeprefix("torch.")


def _entry(decision: Decision) -> dict[str, object]:
    kept = [number for number in decision.kept if number not in decision.demoted]
    return {"step": decision.step, "kept": kept, "demoted": list(decision.demoted)}


def _milliseconds(decisions: Sequence[Decision]) -> float | None:
    return round(1e3 * sum(d.seconds for d in decisions) / len(decisions), 6) if decisions else None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
