"""An evaluation as data: its settings, a record for each finished episode, and both together as results."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from far_env.contract import UNLIMITED_FRAMES
from far_env.evaluation.stored_records import StoredRecords

FRAMES, TOKENS = MEMORIES = ("frames", "tokens")
"""What a budget counts: frames, which are encoded again for each new one, or entries of a streaming memory."""
_MERGED_LISTS = ("budgets", "seeds", "clips")
_EQUAL = ("memory", "split", "metrics", "show_clips")
_SIZES = ("num_context", "num_predict", "frame_size")
BY_WORKLOAD = (*_SIZES, "made_with")
"""The fields of `Settings` that have a value for each workload."""


Key = tuple[str, int, str, int, int]
"""Workload, budget, policy, clip and noise seed, which identify an episode."""


def cell(workload: str, budget: int) -> str:
    """The name of one workload under one budget."""
    return f"{workload} {budget}"


@dataclass(frozen=True)
class Settings:
    """What an evaluation plays.

    Attributes:
        budgets: `UNLIMITED_FRAMES` is that of full history.
        policies: name → `far_env.policies.policy_facts`: family, tier, source, note, and sha256 of its file.
        seeds: clip i is played with the noise seeds s + i.
        metrics: those that were computed.
        unavailable: metric → why it was not computed.
        show_clips: how many of the first clips have pictures.
        num_context, num_predict, frame_size: per workload, in frames and pixels.
        made_with: per workload what else determines its numbers, such as weights, ode_steps, dtype, feedback and clip_options.
        failed: policy → `cell` → why the policy was left out there, when it was tried last.
        memory: one of `MEMORIES`.
        units: per workload whose host generates chunks, how many are given and predicted, and how much of a budget one takes.
    """

    workloads: list[str]
    budgets: list[int]
    policies: dict[str, dict[str, str]]
    seeds: list[int]
    split: str
    clips: list[int]
    metrics: list[str]
    unavailable: dict[str, str]
    num_context: dict[str, int]
    num_predict: dict[str, int]
    frame_size: dict[str, int]
    show_clips: int = 0
    made_with: dict[str, dict[str, Any]] = field(default_factory=dict)
    failed: dict[str, dict[str, str]] = field(default_factory=dict)
    memory: str = FRAMES
    units: dict[str, list[int]] = field(default_factory=dict)

    def plan_sizes(self, workload: str, budget: int) -> tuple[int, int, int]:
        """Given and predicted units of a workload, frames or chunks, and how many a plan under this budget may keep."""
        frames = [self.num_context[workload], self.num_predict[workload], 1]
        context, predict, share = self.units.get(workload, frames)
        return context, predict, budget if budget >= UNLIMITED_FRAMES else budget // share

    def merged(self, other: Settings, where: Path, played: Container[str]) -> Settings:
        """These settings with another evaluation's workloads, budgets, policies, seeds and clips added.

        Failures are kept, except those of policies that the other evaluation tries again.

        Args:
            played: the policies that have episodes, so that their content may not differ.

        Raises:
            ValueError: if anything else differs, so that the numbers would not be comparable.
        """
        differing = [(name, getattr(self, name), getattr(other, name)) for name in _EQUAL]
        for name in (*_SIZES, "units"):
            old, new = getattr(self, name), getattr(other, name)
            differing += [(f"{name} of {key}", old[key], new[key]) for key in old.keys() & new.keys()]
        for workload in self.made_with.keys() & other.made_with.keys():
            old, new = self.made_with[workload], other.made_with[workload]
            differing += [(f"{name} of {workload}", old.get(name), new.get(name)) for name in {**old, **new}]
        for key in [key for key in self.policies.keys() & other.policies.keys() if key in played]:
            hashes = [settings.policies[key].get("sha256") for settings in (self, other)]
            differing.append((f"the content of policy {key}", *hashes))
        for name, before, now in differing:
            if before != now:
                raise ValueError(f"{where} holds an evaluation with {name} {before}, not {now}; choose another folder")
        lists = {name: sorted({*getattr(self, name), *getattr(other, name)}) for name in _MERGED_LISTS}
        merged = {
            name: {**getattr(self, name), **getattr(other, name)} for name in (*BY_WORKLOAD, "units", "policies", "unavailable")
        }
        tried = {cell(workload, budget) for workload in other.workloads for budget in other.budgets}
        failed = {
            policy: {where: reason for where, reason in reasons.items() if policy not in other.policies or where not in tried}
            for policy, reasons in self.failed.items()
        }
        return replace(
            self,
            workloads=list(dict.fromkeys([*self.workloads, *other.workloads])),
            failed={policy: reasons for policy, reasons in failed.items() if reasons},
            **lists,
            **merged,
        )


@dataclass(frozen=True)
class Record:
    """One finished episode.

    Attributes:
        seed: the base noise seed; the episode is played with seed + clip.
        plan: per decision ``step``, and the true numbers of the frames ``kept`` and ``demoted``; others were dropped. With a
            memory of tokens, a frame is there while any entry of it is, ``demoted`` are those with coarse entries alone, and
            ``tokens`` is the number of entries of a head, mean over layers and heads.
        metrics: name → value; PSNR is infinite where all frames equal the truth.
        psnr_per_frame: dB, of every predicted frame.
        decision_ms: mean milliseconds that the policy took per decision; None without decisions.
        clip_sha256, latents_sha256: first 16 hex digits, of the clip's true frames (float32) and of the generated latents.
        facts: how the episode was made: host, weights, ode_steps, dtype, device, machine, commit, versions and more.
        evidence_gaps: of every predicted frame, see `far_env.clips.copying.evidence_gaps`; None in folders that were written
            before they were recorded.
    """

    workload: str
    budget: int
    policy: str
    clip: int
    seed: int
    plan: list[dict[str, Any]]
    metrics: dict[str, float]
    psnr_per_frame: list[float]
    decision_ms: float | None
    clip_sha256: str
    latents_sha256: str
    facts: dict[str, Any]
    evidence_gaps: list[int | None] | None = None

    @property
    def key(self) -> Key:
        """What identifies the episode."""
        return self.workload, self.budget, self.policy, self.clip, self.seed

    def line(self) -> str:
        """The record as one line of JSON (with Python's ``Infinity`` for an infinite PSNR)."""
        values = asdict(self)
        facts = values.pop("facts")
        return json.dumps({**values, **facts}) + "\n"


@dataclass(frozen=True)
class Results:
    """An evaluation.

    Attributes:
        settings: what is played.
        records: the episodes finished so far; of a large folder they are read from its file where they are used.
        folder: where they and the pictures are, if they were saved.
        unreadable: (workload, clip) → why its file could not be read in this session, so that its episodes are missing.
    """

    settings: Settings
    records: list[Record] | StoredRecords
    folder: Path | None = None
    unreadable: dict[tuple[str, int], str] = field(default_factory=dict)

    def episode_keys(self) -> Iterable[Key]:
        """What identifies each episode."""
        stored = self.records
        return stored.episode_keys() if isinstance(stored, StoredRecords) else (record.key for record in stored)

    def clip_hashes(self) -> dict[tuple[str, int], str]:
        """Workload and clip → hash of the clip's frames."""
        if isinstance(self.records, StoredRecords):
            return dict(self.records.clip_hashes)
        return {(record.workload, record.clip): record.clip_sha256 for record in self.records}

    def counted_facts(self) -> Iterator[tuple[str, Mapping[str, Any], int]]:
        """Workload, facts, and a number of records that have them."""
        if isinstance(self.records, StoredRecords):
            yield from self.records.counted_facts()
        else:
            yield from ((record.workload, record.facts, 1) for record in self.records)

    def by_policy(self, workload: str) -> dict[tuple[str, int], Iterable[Record]]:
        """Policy and budget → records on the workload; those of a large folder are read when they are iterated over."""
        stored = self.records
        if isinstance(stored, StoredRecords):
            return {(job[2], job[1]): stored.of_job(job) for job in stored.jobs() if job[0] == workload}
        grouped: dict[tuple[str, int], list[Record]] = defaultdict(list)
        for record in stored:
            if record.workload == workload:
                grouped[record.policy, record.budget].append(record)
        return dict(grouped)

    def of_policies(self, policies: Collection[str]) -> list[Record] | StoredRecords:
        """The records of these policies."""
        stored = self.records
        if isinstance(stored, StoredRecords):
            return stored.of_policies(policies)
        return [record for record in stored if record.policy in policies]

    def of_clips(self, clips: Collection[tuple[str, int]]) -> list[Record]:
        """The records of these workloads' clips."""
        if isinstance(self.records, StoredRecords):
            return list(self.records.of_clips(clips))
        return [record for record in self.records if (record.workload, record.clip) in clips]

    def truth_picture(self, workload: str, clip: int) -> Path:
        """PNG of a clip's true frames, context first, side by side; exists for the first ``show_clips`` clips."""
        return self._picture(workload, f"truth_c{clip}.png")

    def picture(self, record: Record) -> Path:
        """PNG of an episode's predicted frames side by side; exists for the first ``show_clips`` clips."""
        name = quote(record.policy, safe="")
        name = name.replace(".", "%2E") if set(name) == {"."} else name  # a run folder named ".." stays inside
        return self._picture(record.workload, f"b{record.budget}", name, f"s{record.seed}_c{record.clip}.png")

    def _picture(self, *parts: str) -> Path:
        if self.folder is None:
            raise ValueError("these results are not in a folder and have no pictures")
        return self.folder.joinpath("frames", *parts)
