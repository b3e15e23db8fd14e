"""The leaderboard: a policy is played on the suite for its entry, and an entry's decisions are played again to check it."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path

from far_env.contract import UNLIMITED_FRAMES, RetentionPolicy, tier, wanted_signals
from far_env.evaluation.evaluate import evaluate_grid
from far_env.evaluation.facts import record_facts
from far_env.evaluation.leaderboard_entry import (
    FORMAT,
    Cell,
    Entry,
    Episode,
    Suite,
    check_link,
    check_name,
    check_texts,
    replayable,
)
from far_env.evaluation.plans import dropped_frames
from far_env.evaluation.records import Record, Results, Settings
from far_env.evaluation.validate import Finding, choose, validate
from far_env.policies import is_tuned_form
from far_env.workload import Workload
from far_env.workloads import WORKLOADS

TOLERANCE = 1e-2
"""In dB of PSNR and in SSIM: other processors and versions of torch change the last digits of a rollout."""
_DIGITS = 4
_VERSIONS = ("far-env", "torch", "diffusers", "numpy")
_MADE_WITH = ("commit", "device", "machine")


def entry_name(policy: str) -> str:
    """The name of a policy's entry, if no other is given: the last part of its path, without ``.py``."""
    last = policy.rstrip("/").rpartition("/")[2].removesuffix(".py").removesuffix(".json")
    return re.sub(r"[^\w.-]+", "_", last, flags=re.ASCII)[:64]


def new_entry(
    suite: Suite,
    name: str,
    policy_name: str,
    policy: RetentionPolicy | None,
    facts: dict[str, str],
    author: str = "",
    link: str = "",
) -> Entry:
    """An entry without cells, from facts about the policy (`far_env.policies.policy_facts`).

    Raises:
        ValueError: on a name or link that an entry may not have.
        PolicyError: if the policy requests an unknown signal.
    """
    check_name(name)
    check_link(link)
    # Of what is known by a path, where it lies on this machine is nobody else's business.
    is_path = Path(facts.get("source", "")).is_absolute()
    entry = Entry(
        format=FORMAT,
        suite=suite.version,
        name=name,
        author=author,
        link=link,
        policy=Path(policy_name).name if is_path or is_tuned_form(policy_name) else policy_name,
        sha256=facts.get("sha256", ""),
        family=facts.get("family", ""),
        inputs="" if policy is None else facts.get("tier") or tier(wanted_signals(policy)),
        source="" if is_path else facts.get("source", ""),
        note=facts.get("note", ""),
        limited=policy is not None,
        made_with={},
        cells=(),
    )
    check_texts(entry, Path(f"{name}.json"))
    return entry


def play_suite(
    suite: Suite, entry: Entry, policy: RetentionPolicy | None, workspace: Path, device: str = "auto", batch_size: int = 64
) -> Entry:
    """The entry with the cells of the suite, which are played now.

    Args:
        entry: facts about the policy; its cells do not count.
        policy: None is full history.
        workspace: folder for finished episodes, from which a stopped evaluation resumes; removed at the end.

    Raises:
        PolicyError: if the policy raises or answers an invalid plan.
        ValueError: if the host is not that of the suite, or the folder cannot be used.
    """
    cells, made_with = [], {}
    for cell in suite.cells:
        workload = suite.workload(cell, device)
        results = evaluate_grid(
            [workload],
            [cell.budget],
            {entry.name: policy},
            range(suite.clips),
            seeds=[suite.seed],
            split=suite.split,
            metrics=suite.metrics,
            batch_size=batch_size,
            out=workspace,
        )
        if results.unreadable:
            raise ValueError(next(iter(results.unreadable.values())))
        budget = cell.budget if entry.limited else UNLIMITED_FRAMES
        own = (cell.workload, budget)
        records = {record.clip: record for record in results.records if (record.workload, record.budget) == own}
        episodes = [_episode(records[clip], workload) for clip in range(suite.clips)]
        cells.append(Cell(cell.workload, cell.budget, workload.host.weights_hash, tuple(episodes)))
        facts = record_facts(workload)
        versions = {name: facts["versions"][name] for name in _VERSIONS}
        made_with = versions | {name: str(facts[name]) for name in _MADE_WITH}
    shutil.rmtree(workspace)
    return replace(entry, made_with=made_with, cells=tuple(cells))


def replayed(
    entry: Entry,
    suite: Suite,
    sample: int | None = None,
    seed: int = 0,
    device: str = "auto",
    tolerance: float = TOLERANCE,
    progress: bool = True,
) -> list[Finding]:
    """Play episodes of an entry again, by the decisions that it holds, and compare clips and metrics.

    Args:
        sample: clips of each cell, drawn by ``seed``; all by default.
        tolerance: largest difference of a metric that counts as equal.

    Raises:
        ValueError: on a sample below 1, or if the host is not that of the suite.
    """
    records = [
        record
        for wanted, cell in zip(suite.cells, entry.cells, strict=True)
        for record in choose([replayable(entry, wanted, suite, episode) for episode in cell.episodes], sample, seed)
    ]
    specs = {cell.workload: WORKLOADS[cell.workload] for cell in suite.cells}
    settings = Settings(
        workloads=list(specs),
        budgets=sorted({record.budget for record in records}),
        policies={entry.name: {}},
        seeds=[suite.seed],
        split=suite.split,
        clips=list(range(suite.clips)),
        metrics=list(suite.metrics),
        unavailable={},
        num_context={name: spec.num_context for name, spec in specs.items()},
        num_predict={name: spec.num_predict for name, spec in specs.items()},
        frame_size={},
    )
    by_workload = {cell.workload: cell for cell in suite.cells}
    return validate(
        Results(settings, records),
        records,
        lambda name: suite.workload(by_workload[name], device),
        tolerance=tolerance,
        progress=progress,
    )


def _episode(record: Record, workload: Workload) -> Episode:
    metrics = {name: round(value, _DIGITS) for name, value in record.metrics.items()}
    return Episode(record.clip, dropped_frames(record, workload.num_context, workload.num_predict), metrics, record.clip_sha256)
