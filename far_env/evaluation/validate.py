"""Validation: the plans of a results folder, played again on the same host, clips and noise, must give the same numbers."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from far_env.errors import VideoError
from far_env.evaluation.batches import TokenMemory, play_tokens, replay_frames
from far_env.evaluation.facts import clip_hash, latents_hash, record_facts
from far_env.evaluation.plans import histories
from far_env.evaluation.records import TOKENS, Record, Results
from far_env.evaluation.scores import partner_clip, scores_of, undisturbed
from far_env.metrics import UNREFERENCED, require_metrics
from far_env.progress import Progress, show_progress
from far_env.rollout.intervention import IntervenedFrames, interventions_of
from far_env.rollout.memo import FrameMemo
from far_env.rollout.token_policy import TokenPolicy
from far_env.workload import Workload

TOLERANCE = 1e-3
_SAME_BITS = ("device", "machine", "dtype", "versions")
"""On a CPU the latents of two runs that agree in these are equal to the last bit, whatever the batch."""


@dataclass(frozen=True)
class Finding:
    """The outcome of playing one record again.

    Attributes:
        identical: the latents are equal to the last bit.
        difference: None if the record is confirmed, else what differs.
    """

    record: Record
    identical: bool
    difference: str | None


def choose(records: Sequence[Record], sample: int | None, seed: int = 0) -> list[Record]:
    """All records, or a random sample of this size. Raises ValueError on a sample below 1 or without records."""
    if not records:
        raise ValueError("there is no record to validate; evaluate first")
    if sample is not None and sample < 1:
        raise ValueError(f"a sample needs at least 1 record, got {sample}")
    return list(records) if sample is None or sample >= len(records) else random.Random(seed).sample(list(records), sample)


def check_host(record: Record, workload: Workload) -> None:
    """Raise ValueError unless the workload's host is the one that the record was made with."""
    recorded_hash, host_hash = record.facts.get("weights"), workload.host.weights_hash
    if recorded_hash != host_hash:
        raise ValueError(
            f"the records of {record.workload} were made with host {record.facts.get('host')} ({recorded_hash}); "
            f"the host here is {workload.host.name} ({host_hash}), with which they cannot be validated; give theirs with --host"
        )


def validate(
    results: Results,
    records: Sequence[Record],
    make: Callable[[str], Workload],
    *,
    load_policy: Callable[[str], TokenPolicy | None] | None = None,
    tolerance: float = TOLERANCE,
    batch_size: int = 64,
    progress: bool = True,
) -> list[Finding]:
    """Play records again, by their plans, and compare latents and metrics.

    Those of a memory of tokens are played again by their policies, whose plans must be the same too.

    Metrics must agree within ``tolerance`` (dB for PSNR, also of every frame). On a CPU, where device, machine, dtype and
    versions are those of the record, the latents must be equal to the last bit as well; on a GPU, and with a memory of tokens,
    sums depend on the batch.

    Args:
        make: workload by name, in the dtype of the records.
        load_policy: token policy by name, where the memory is of tokens.

    Raises:
        ValueError: on a record of another host, or one whose metrics cannot be computed here.
    """
    require_metrics(undisturbed(results.settings.metrics), UNREFERENCED)
    workloads = {name: make(name) for name in dict.fromkeys(record.workload for record in records)}
    for record in records:
        check_host(record, workloads[record.workload])
    findings: dict[tuple, Finding] = {}
    memo = FrameMemo()
    in_tokens = results.settings.memory == TOKENS

    def together(record: Record) -> tuple[object, ...]:
        """What records that are played together have in common."""
        job = (record.policy, record.budget) if in_tokens else ()
        return record.workload, record.facts["ode_steps"], *job

    # Neighbouring episodes of the same clip and noise share frames.
    ordered = sorted(records, key=lambda record: (*together(record), record.seed, record.clip))
    total = sum(results.settings.num_predict[record.workload] for record in records)
    with show_progress(total=total, unit="frames", description="validate", disable=not progress) as bar:
        while ordered:
            first = ordered[0]
            batch = [record for record in ordered[:batch_size] if together(record) == together(first)]
            ordered = ordered[len(batch) :]
            workload = replace(workloads[first.workload], num_steps=first.facts["ode_steps"])
            policy = load_policy(first.policy) if in_tokens else None
            for finding in _play_again(results, batch, workload, policy, tolerance, memo, bar):
                findings[finding.record.key] = finding
    return [findings[record.key] for record in records]


def _play_again(
    results: Results,
    records: Sequence[Record],
    workload: Workload,
    policy: TokenPolicy | None,
    tolerance: float,
    memo: FrameMemo,
    bar: Progress,
) -> list[Finding]:
    settings = results.settings
    clips, partners, readable, findings = [], [], [], []
    for record in records:
        try:
            partner = partner_clip(workload, settings.split, record.clip, settings.metrics)
            clips.append(workload.clips.clip(settings.split, record.clip))
            partners.append(partner)
        except VideoError as error:
            findings.append(Finding(record, False, f"its clip cannot be read: {error}"))
        else:
            readable.append(record)
    if not readable:
        return findings
    records = readable
    seeds = [record.seed + record.clip for record in records]
    intervened = IntervenedFrames(interventions_of(settings.metrics), workload, seeds, partners, memo)
    in_tokens = settings.memory == TOKENS
    if in_tokens:
        memory = TokenMemory(settings.made_with[workload.name]["max_gap"])
        played = play_tokens(workload, clips, seeds, policy, records[0].budget, memory, bar.update)
    else:
        kept = [histories(record, *settings.plan_sizes(workload.name, record.budget)) for record in records]
        played = replay_frames(workload, clips, seeds, kept, memo, intervened, bar.update)
    scores, by_frame = scores_of(
        workload, clips, played.predicted, settings.metrics, intervened, [record.plan for record in records]
    )
    facts = record_facts(workload)
    for row, record in enumerate(records):
        identical = latents_hash(played.latents[row]) == record.latents_sha256
        exact = workload.host.device.type == "cpu" and all(record.facts.get(name) == facts[name] for name in _SAME_BITS)
        if clip_hash(workload, clips[row]) != record.clip_sha256:
            difference = "its clip is a different one here: the data are not those that it was made with"
        elif exact and not identical and not in_tokens:
            difference = "its latents are different, though machine, dtype and versions are the same"
        elif in_tokens and played.plans[row] != record.plan:
            difference = f"its policy {record.policy} keeps other tokens when it is played again"
        else:
            difference = _difference(record, scores[row], by_frame[row], tolerance)
        findings.append(Finding(record, identical, difference))
    return findings


def _difference(record: Record, scores: dict[str, float], by_frame: list[float], tolerance: float) -> str | None:
    """The first metric that differs from the record, in one sentence; None if all agree."""
    recorded = {**record.metrics, **{f"PSNR of frame {i}": value for i, value in enumerate(record.psnr_per_frame)}}
    replayed = {**scores, **{f"PSNR of frame {i}": value for i, value in enumerate(by_frame)}}
    for name, value in recorded.items():
        if not (value == replayed[name] or abs(value - replayed[name]) <= tolerance):
            return f"its {name} is {value:.4f}, and {replayed[name]:.4f} when played again"
    return None


def report(findings: Sequence[Finding], tolerance: float, num_records: int) -> str:
    """The outcome in a few lines."""
    differing = [finding for finding in findings if finding.difference is not None]
    identical = sum(finding.identical for finding in findings if finding.difference is None)
    matching = len(findings) - len(differing)
    lines = []
    for finding in differing[:10]:
        record = finding.record
        where = f"{record.workload}, budget {record.budget}, {record.policy}, clip {record.clip}, noise seed {record.seed}"
        lines.append(f"{where}: {finding.difference}")
    if len(differing) > len(lines):
        lines.append(f"… and {len(differing) - len(lines)} more")
    lines.append(
        f"{len(findings)} of {num_records} records played again: {matching} match ({identical} to the last bit of the latents, "
        f"{matching - identical} within {tolerance:g} in every metric), {len(differing)} differ"
    )
    return "\n".join(lines)
