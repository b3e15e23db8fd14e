"""Records of an evaluation as arrays: what one policy scored on the clips of one workload under one budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from far_env.evaluation.records import Record, Results


@dataclass(frozen=True)
class Episodes:
    """The finished episodes of one policy on one workload under one budget.

    Attributes:
        records: (clip, seed) → record.
        clips: the clips that are finished with every seed, in the requested order.
        seeds: the requested noise seeds.
        missing: number of requested episodes that are not finished.
    """

    policy: str
    budget: int
    records: dict[tuple[int, int], Record]
    clips: tuple[int, ...]
    seeds: tuple[int, ...]
    missing: int

    def scores(self, metric: str) -> np.ndarray:
        """A metric of ``clips``, float64 (clips, seeds)."""
        return np.array([[record.metrics[metric] for record in row] for row in self._rows()], dtype=np.float64)

    def psnr_per_frame(self) -> np.ndarray:
        """PSNR in dB of every predicted frame of ``clips``, float64 (clips, seeds, frames)."""
        return np.array([[record.psnr_per_frame for record in row] for row in self._rows()], dtype=np.float64)

    def evidence_gaps(self) -> np.ndarray | None:
        """The gap of every predicted frame of ``clips``, float64 (clips, frames), NaN for what was not in view before.

        None if a record has none.
        """
        rows = [record.evidence_gaps for record, *_ in self._rows()]
        return None if any(gaps is None for gaps in rows) else np.array(rows, dtype=np.float64)

    def decision_ms(self) -> float | None:
        """Mean milliseconds per decision over all finished episodes; None if no episode has decisions."""
        costs = [record.decision_ms for record in self.records.values() if record.decision_ms is not None]
        return float(np.mean(costs)) if costs else None

    def _rows(self) -> list[list[Record]]:
        return [[self.records[clip, seed] for seed in self.seeds] for clip in self.clips]


def collect_episodes(
    results: Results, workload: str, clips: Sequence[int] | None = None, seeds: Sequence[int] | None = None
) -> list[Episodes]:
    """The episodes on a workload, by policy (in the order of the settings) and budget (ascending).

    Args:
        clips, seeds: the requested ones; all of the evaluation by default.
    """
    clips = results.settings.clips if clips is None else clips
    seeds = results.settings.seeds if seeds is None else seeds
    wanted = {(clip, seed) for clip in clips for seed in seeds}
    by_policy: dict[tuple[str, int], dict[tuple[int, int], Record]] = defaultdict(dict)
    for record in results.records:
        if record.workload == workload and (record.clip, record.seed) in wanted:
            by_policy[record.policy, record.budget][record.clip, record.seed] = record
    order = {policy: place for place, policy in enumerate(results.settings.policies)}
    return [
        Episodes(
            policy,
            budget,
            records,
            tuple(clip for clip in clips if all((clip, seed) in records for seed in seeds)),
            tuple(seeds),
            len(wanted) - len(records),
        )
        for (policy, budget), records in sorted(by_policy.items(), key=lambda item: (order[item[0][0]], item[0][1]))
    ]


def alike(all_episodes: Iterable[Episodes]) -> dict[str, str]:
    """Policies that kept the same frames as an earlier one at every decision, and so have its scores → that one."""
    first: dict[tuple, str] = {}
    same = {}
    for episodes in all_episodes:
        decisions = tuple(
            (key, (*record.metrics.values(),), *((e["step"], *sorted({*e["kept"], *e["demoted"]})) for e in record.plan))
            for key, record in sorted(episodes.records.items())
        )
        if (other := first.setdefault((episodes.budget, decisions), episodes.policy)) != episodes.policy:
            same[episodes.policy] = other
    return same
