"""Records of an evaluation as arrays: what one policy scored on the clips of one workload under one budget."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from far_env.evaluation.records import Record, Results


@dataclass(frozen=True)
class Episodes:
    """The finished episodes of one policy on one workload under one budget, as numbers.

    Attributes:
        rows: (clip, seed) → row of ``metrics``, ``frames`` and ``gaps``.
        metrics: name → float64 (N,). frames: PSNR in dB of every predicted frame, float64 (N, frames).
        gaps: of every predicted frame, float64 (N, frames), NaN for what was not in view before; None if a record has none.
        costs: mean milliseconds per decision of the episodes that have decisions.
        facts: the different facts of the records, in their order.
        decisions: a hash of all decisions and metrics.
        clips: the clips that are finished with every seed, in the requested order.
        seeds: the requested noise seeds.
        missing: number of requested episodes that are not finished.
    """

    policy: str
    budget: int
    rows: dict[tuple[int, int], int]
    metrics: dict[str, np.ndarray]
    frames: np.ndarray
    gaps: np.ndarray | None
    costs: list[float]
    facts: list[Mapping[str, Any]]
    decisions: bytes
    clips: tuple[int, ...]
    seeds: tuple[int, ...]
    missing: int

    @property
    def decided(self) -> tuple[str, int, bytes]:
        """Policy, budget and hash of the decisions, by which `alike` compares."""
        return self.policy, self.budget, self.decisions

    def scores(self, metric: str) -> np.ndarray:
        """A metric of ``clips``, float64 (clips, seeds)."""
        return self.metrics[metric][self._places()]

    def psnr_per_frame(self) -> np.ndarray:
        """PSNR in dB of every predicted frame of ``clips``, float64 (clips, seeds, frames)."""
        return self.frames[self._places()]

    def evidence_gaps(self) -> np.ndarray | None:
        """The gap of every predicted frame of ``clips``, float64 (clips, frames), NaN for what was not in view before.

        None if a record has none.
        """
        return None if self.gaps is None else self.gaps[self._places()[:, 0]]

    def decision_ms(self) -> float | None:
        """Mean milliseconds per decision over all finished episodes; None if no episode has decisions."""
        return float(np.mean(self.costs)) if self.costs else None

    def _places(self) -> np.ndarray:
        places = [[self.rows[clip, seed] for seed in self.seeds] for clip in self.clips]
        return np.array(places, dtype=np.int64).reshape(len(self.clips), len(self.seeds))


def collect_episodes(
    results: Results,
    workload: str,
    clips: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    budgets: Sequence[int] | None = None,
) -> Iterator[Episodes]:
    """The episodes on a workload, by policy (in the order of the settings) and budget (ascending).

    Those of a large folder are read one after the other, so that nothing of them need stay in memory.

    Args:
        clips, seeds, budgets: the requested ones; all of the evaluation by default.
    """
    clips = results.settings.clips if clips is None else clips
    seeds = results.settings.seeds if seeds is None else seeds
    wanted = {(clip, seed) for clip in clips for seed in seeds}
    order = {policy: place for place, policy in enumerate(results.settings.policies)}
    by_policy = results.by_policy(workload)
    for policy, budget in sorted(by_policy, key=lambda key: (order[key[0]], key[1])):
        if budgets is not None and budget not in budgets:
            continue
        records = (record for record in by_policy[policy, budget] if (record.clip, record.seed) in wanted)
        rows, *numbers = _columns(records)
        if rows:
            finished = tuple(clip for clip in clips if all((clip, seed) in rows for seed in seeds))
            yield Episodes(policy, budget, rows, *numbers, finished, tuple(seeds), len(wanted) - len(rows))


def alike(decided: Iterable[tuple[str, int, bytes]]) -> dict[str, str]:
    """Policies that kept the same frames as an earlier one at every decision, and so have its scores → that one.

    Args:
        decided: `Episodes.decided` of each.
    """
    first: dict[tuple, str] = {}
    same = {}
    for policy, budget, decisions in decided:
        if (other := first.setdefault((budget, decisions), policy)) != policy:
            same[policy] = other
    return same


def _columns(records: Iterable[Record]) -> tuple:
    """The fields of `Episodes` from ``rows`` to ``decisions``."""
    rows: dict[tuple[int, int], int] = {}
    metrics: dict[str, list[float]] = defaultdict(list)
    frames, gaps, costs, decisions = [], [], [], []
    facts: list[Mapping[str, Any]] = []
    for record in records:
        rows[record.clip, record.seed] = len(rows)
        for name, value in record.metrics.items():
            metrics[name].append(value)
        frames.append(np.array(record.psnr_per_frame, dtype=np.float64))
        gaps.append(None if record.evidence_gaps is None else np.array(record.evidence_gaps, dtype=np.float64))
        if record.decision_ms is not None:
            costs.append(record.decision_ms)
        if record.facts not in facts:
            facts.append(record.facts)
        kept = [(entry["step"], *sorted({*entry["kept"], *entry["demoted"]})) for entry in record.plan]
        decisions.append((record.clip, record.seed, hashlib.sha256(repr((record.metrics, kept)).encode()).digest()))
    columns = {name: np.array(values, dtype=np.float64) for name, values in metrics.items()}
    all_gaps = None if any(one is None for one in gaps) or not gaps else np.stack(gaps)
    digest = hashlib.sha256(repr(sorted(decisions)).encode()).digest()
    return rows, columns, np.stack(frames) if frames else np.zeros((0, 0)), all_gaps, costs, facts, digest
