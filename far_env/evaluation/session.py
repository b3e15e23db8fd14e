"""One evaluation as it runs: which episodes are missing, playing them batch by batch, and keeping what came of them."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from far_env.clips.clip import Clip
from far_env.clips.copying import evidence_gaps
from far_env.contract import RetentionPolicy, wanted_signals
from far_env.errors import PolicyError, VideoError
from far_env.evaluation.batches import PlayedBatch, TokenMemory, play_frames, play_tokens
from far_env.evaluation.facts import clip_hash, latents_hash, record_facts
from far_env.evaluation.fvd import FeatureStore
from far_env.evaluation.records import Record, Results, Settings, cell
from far_env.evaluation.scores import partner_clip, scores_of
from far_env.progress import Progress, show_progress
from far_env.rollout.intervention import IntervenedFrames, interventions_of
from far_env.rollout.memo import FrameMemo
from far_env.rollout.noise import TRAJECTORY_STRIDE, trajectory
from far_env.rollout.play import is_limited
from far_env.workload import Workload

ClipSeed = tuple[int, int]
"""Clip and base noise seed, which identify an episode of a job on a workload."""


@dataclass(frozen=True)
class Job:
    """One policy under one budget; None is full history."""

    budget: int
    name: str
    policy: RetentionPolicy | None


@dataclass(frozen=True)
class Row:
    """An episode of a job, as a row of a batch."""

    job: Job
    clip: Clip
    seed: int


class RecordStore(Protocol):
    """Where records and pictures of finished episodes go; `far_env.evaluation.results_folder.Recorder` is one."""

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
    """Plays the episodes that are missing, and keeps them.

    Args:
        settings: what this evaluation asks for.
        store: where episodes go, with those of earlier sessions; None keeps them in ``results`` alone.
        memo: frames that several policies share.
        optional: names of policies that may fail.
        progress: whether a bar is shown.
        features: receives the features of all videos, for FVD. Episodes that it lacks are missing too.
        memory: budgets count tokens; None for frames.

    Attributes:
        asked: the settings of this evaluation.
        results: the episodes so far, with the settings of all sessions of a folder.
    """

    def __init__(
        self,
        settings: Settings,
        store: RecordStore | None,
        memo: FrameMemo,
        optional: frozenset[str],
        progress: bool,
        features: FeatureStore | None,
        memory: TokenMemory | None = None,
    ) -> None:
        self.asked = settings
        self.token_memory = memory
        self.store = store
        self.results = Results(settings, []) if store is None else store.results
        self.memo = memo
        self.optional = optional
        self.progress = progress
        self.features = features
        self.recorded = set(self.results.episode_keys())
        self.done = self.recorded if features is None else self.recorded & features.episodes
        self.clip_hashes = self.results.clip_hashes()
        self.gaps: dict[tuple[str, int], list[int | None] | None] = {}
        self.partners: dict[tuple[str, int], Clip | None] = {}
        self.shown = set(self.results.settings.clips[: self.results.settings.show_clips])

    def play(self, workloads: Sequence[Workload], jobs: Sequence[Job], batch_size: int) -> None:
        """All jobs on one batch of episodes, then on the next: they share frames, and a stop leaves comparable results."""
        with self.bar(workloads, jobs) as bar:
            for workload in workloads:
                facts, running = record_facts(workload, self.token_memory), list(jobs)
                for batch in self.batches(batch_size):
                    self.play_batch(workload, batch, running, batch_size, facts, bar)

    def batches(self, batch_size: int) -> list[list[ClipSeed]]:
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

    def missing(self, workload: Workload, job: Job, episodes: Sequence[ClipSeed]) -> list[ClipSeed]:
        """Those of these episodes that are not there yet."""
        return [episode for episode in episodes if (workload.name, job.budget, job.name, *episode) not in self.done]

    def play_batch(
        self,
        workload: Workload,
        episodes: Sequence[ClipSeed],
        jobs: list[Job],
        batch_size: int,
        facts: dict[str, Any],
        bar: Progress,
    ) -> None:
        """Play those of these episodes that are missing, up to ``batch_size`` rollouts of the jobs of a budget together.

        A job that cannot run and need not is taken out of ``jobs``.
        """
        clips: dict[int, Clip] = {}
        self.partners.clear()
        for job in jobs:
            self._read_clips(workload, [i for i, _ in self.missing(workload, job, episodes)], clips, bar)
        groups: dict[tuple[int, Hashable], list[Row]] = {}
        for job in list(jobs):
            rows = [Row(job, clips[i], seed) for i, seed in self.missing(workload, job, episodes) if i in clips]
            if rows:
                try:
                    groups.setdefault(self._group(workload, job), []).extend(rows)
                except PolicyError as error:
                    self._fail(workload, job, jobs, str(error), bar)
        for (budget, _), group in groups.items():
            while rows := [row for row in group if row.job in jobs]:
                batch, group = rows[:batch_size], rows[batch_size:]
                names = {row.job.name for row in batch}
                bar.set_postfix_str(f"{workload.name} {budget} {names.pop() if len(names) == 1 else f'{len(names)} policies'}")
                try:
                    failures = self._play_rows(workload, batch, budget, facts, bar)
                except PolicyError as error:  # of something that all of them need, or of a policy that is not optional
                    if not any(row.job.name in self.optional for row in batch):
                        raise
                    failures = dict.fromkeys(range(len(batch)), str(error))
                for row, reason in failures.items():
                    if batch[row].job in jobs:
                        self._fail(workload, batch[row].job, jobs, reason, bar)

    def _group(self, workload: Workload, job: Job) -> tuple[int, Hashable]:
        """Budget and what else jobs have in common that are played in one batch, where no history is padded to another budget.

        Raises:
            PolicyError: if the policy requests an unknown signal.
        """
        if self.token_memory is not None:
            return job.budget, job.name
        return job.budget, wanted_signals(job.policy) if is_limited(workload, job.policy, job.budget) else ()

    def _fail(self, workload: Workload, job: Job, jobs: list[Job], reason: str, bar: Progress) -> None:
        """Take a job that cannot run out of ``jobs``. Raises PolicyError if it is not optional."""
        if job.name not in self.optional:
            raise PolicyError(reason)
        jobs.remove(job)
        self.leave_out(workload, job, reason)
        bar.write(f"left out {job.name} on {workload.name} under budget {job.budget}: {reason}", file=sys.stderr)

    def leave_out(self, workload: Workload, job: Job, reason: str) -> None:
        """Remember why a job has no further episodes on a workload."""
        where = cell(workload.name, job.budget)
        if self.store is None:
            self.results.settings.failed.setdefault(job.name, {})[where] = reason
        else:
            self.store.leave_out(job.name, where, reason)

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
            gaps = evidence_gaps(workload.clips, clip, *lengths) if workload.has_truth else None
            self.gaps[workload.name, clip_id] = gaps
        return clip

    def check_clip(self, workload: str, clip_id: int, content: str) -> None:
        """Raise ValueError if earlier records have another clip under this number, so that policies would not be comparable."""
        if self.clip_hashes.setdefault((workload, clip_id), content) != content:
            raise ValueError(
                f"clip {clip_id} of {workload} differs from {self.results.folder}, which was made with other data; "
                "choose another folder"
            )

    def _play_rows(
        self, workload: Workload, rows: Sequence[Row], budget: int, facts: dict[str, Any], bar: Progress
    ) -> dict[int, str]:
        """Play rollouts together and keep those that finish; returns why the others fail, by place.

        Raises:
            PolicyError: if a policy fails and none of them is optional.
        """
        clips = [row.clip for row in rows]
        noise_seeds = [row.seed + row.clip.clip_id for row in rows]
        partners = [self.partners[workload.name, clip.clip_id] for clip in clips]
        names = interventions_of(self.asked.metrics)
        intervened = IntervenedFrames(names, workload, noise_seeds, partners, self.memo)
        rollouts, failures = (workload, clips, noise_seeds), dict[int, str]()
        played: PlayedBatch | None
        if self.token_memory is not None:
            played = play_tokens(*rollouts, rows[0].job.policy, budget, self.token_memory, bar.update)
        else:
            policies = [row.job.policy for row in rows]
            kept = failures if any(row.job.name in self.optional for row in rows) else None
            played = play_frames(*rollouts, policies, budget, self.memo, intervened, bar.update, kept)
        if played is not None:
            finished = [row for place, row in enumerate(rows) if place not in failures]
            self._record(workload, finished, played, intervened, facts)
        return failures

    def _record(
        self,
        workload: Workload,
        rows: Sequence[Row],
        played: PlayedBatch,
        intervened: IntervenedFrames,
        facts: dict[str, Any],
    ) -> None:
        """Keep records, features and pictures of finished rollouts."""
        clips = [row.clip for row in rows]
        scores, by_frame = scores_of(workload, clips, played.predicted, self.asked.metrics, intervened, played.plans)
        records = []
        for i, row in enumerate(rows):
            job, clip = row.job, row.clip
            if any(math.isnan(value) for value in (*scores[i].values(), *by_frame[i])):
                where = f"{workload.name}, clip {clip.clip_id}, under {job.name}"
                raise ValueError(f"{where}: the host {workload.host.name} generated values that are not numbers")
            records.append(
                Record(
                    workload=workload.name,
                    budget=job.budget,
                    policy=job.name,
                    clip=clip.clip_id,
                    seed=row.seed,
                    plan=played.plans[i],
                    metrics=scores[i],
                    psnr_per_frame=by_frame[i],
                    decision_ms=played.decision_ms[i],
                    clip_sha256=self.clip_hashes[workload.name, clip.clip_id],
                    latents_sha256=latents_hash(played.latents[i]),
                    facts=facts,
                    evidence_gaps=self.gaps[workload.name, clip.clip_id],
                )
            )
        if self.features is not None:
            for job, of_job in itertools.groupby(range(len(rows)), lambda i: rows[i].job):
                places = list(of_job)
                seeds = [rows[i].seed for i in places]
                self.features.add(workload, job.budget, job.name, [clips[i] for i in places], seeds, played.predicted[places])
        if self.store is not None:
            self._save_pictures(self.store, workload, clips, records, played.predicted)
        self.keep(records)

    def keep(self, records: Sequence[Record]) -> None:
        """Keep the records of episodes that have none yet."""
        new = [record for record in records if record.key not in self.recorded]
        if self.store is None:
            self.results.records.extend(new)
        else:
            self.store.add(new)
        self.recorded |= {record.key for record in new}
        self.done |= {record.key for record in records}

    def _save_pictures(
        self, store: RecordStore, workload: Workload, clips: list[Clip], records: list[Record], predicted: Tensor
    ) -> None:
        for clip, record, frames in zip(clips, records, predicted, strict=True):
            # Of several trajectories, the first is shown.
            further = trajectory(record.seed) > 0 and record.seed % TRAJECTORY_STRIDE in self.asked.seeds
            if clip.clip_id in self.shown and not further:
                truth = self.results.truth_picture(workload.name, clip.clip_id)
                if workload.has_truth and not store.has_picture(truth):
                    store.save_picture(truth, clip.frames[: workload.num_frames])
                store.save_picture(self.results.picture(record), frames.cpu().numpy())


Player = Callable[[Session, Sequence[Workload], Sequence[Job], int], None]
"""Plays the missing episodes of a session: workloads × jobs, in `Session.batches` of the given size."""
