"""One workload and budget of an evaluation: its policies side by side, on the same clips with the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from far_env.contract import UNLIMITED_FRAMES
from far_env.evaluation.records import Record, Results
from far_env.evaluation.statistics import Interval, iqm_interval, mean_interval


@dataclass(frozen=True)
class Evaluation:
    """One workload and budget: metrics of several policies on the same clips with the same noise.

    Attributes:
        scores: policy name → metric name → float64 (clips, seeds), in the order of ``clip_ids``.
        unavailable: metric name → why it was not computed.
        provenance: what was run on what: the records' facts, and what was asked for.
        decision_ms: policy name → mean milliseconds per decision; a policy that decided nothing is left out.
    """

    clip_ids: list[int]
    scores: dict[str, dict[str, np.ndarray]]
    unavailable: dict[str, str]
    provenance: dict[str, object]
    decision_ms: dict[str, float] = field(default_factory=dict)

    def difference(self, policy: str, reference: str, metric: str = "psnr") -> np.ndarray:
        """Paired differences (clips, seeds) of one policy to another."""
        return self.scores[policy][metric] - self.scores[reference][metric]

    def summary(self, reference: str = "recent_fill") -> dict[str, object]:
        """Plain values for JSON: per policy and metric mean, low, high, n, and the paired PSNR difference to ``reference``."""
        policies: dict[str, dict[str, object]] = {}
        for name, columns in self.scores.items():
            policies[name] = {metric: asdict(mean_interval(values)) for metric, values in columns.items()}
            if "psnr" in columns and reference in self.scores and name != reference:
                policies[name][f"psnr_minus_{reference}"] = asdict(mean_interval(self.difference(name, reference)))
        return {
            "policies": policies,
            "decision_ms": self.decision_ms,
            "unavailable": self.unavailable,
            **self.provenance,
        }


def tabulate(
    results: Results,
    workload: str,
    budget: int,
    clip_ids: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    seconds: float | None = None,
) -> Evaluation:
    """One workload and budget of an evaluation: the policies that have played all of these clips and seeds, and full history.

    Args:
        clip_ids, seeds: all of the evaluation's by default.
        seconds: how long it took, for the provenance.

    Raises:
        ValueError: if no policy has.
    """
    settings = results.settings
    clip_ids = settings.clips if clip_ids is None else [int(i) for i in clip_ids]
    seeds = settings.seeds if seeds is None else list(seeds)
    budget = min(budget, UNLIMITED_FRAMES)
    shown = {(i, s) for i in clip_ids for s in seeds}
    episodes: dict[str, dict[tuple[int, int], Record]] = {name: {} for name in settings.policies}
    for record in results.records:
        here = record.workload == workload and record.budget in (budget, UNLIMITED_FRAMES)
        if here and (record.clip, record.seed) in shown:
            episodes[record.policy][record.clip, record.seed] = record
    episodes = {name: own for name, own in episodes.items() if len(own) == len(shown)}
    if not episodes:
        raise ValueError(f"no policy has played all {len(clip_ids)} clips of {workload} under budget {budget}")
    scores = {
        name: {
            metric: np.array([[own[i, s].metrics[metric] for s in seeds] for i in clip_ids], dtype=np.float64)
            for metric in settings.metrics
        }
        for name, own in episodes.items()
    }
    costs = {name: [r.decision_ms for r in own.values() if r.decision_ms is not None] for name, own in episodes.items()}
    facts: dict[str, object] = {
        "workload": workload,
        "budget": "full history" if budget >= UNLIMITED_FRAMES else budget,
        "context": settings.num_context[workload],
        "predict": settings.num_predict[workload],
        "noise_seed": f"{', '.join(map(str, seeds))} + clip id",
        **_common_facts([record for own in episodes.values() for record in own.values()]),
        "split": settings.split,
        "clips": len(clip_ids),
    }
    if seconds is not None:
        facts["seconds"] = round(seconds, 1)
    means = {name: float(np.mean(own)) for name, own in costs.items() if own}
    return Evaluation(clip_ids, scores, settings.unavailable, facts, means)


def pooled_summary(tables: Sequence[Evaluation], reference: str = "recent_fill") -> dict[str, dict[str, Interval]]:
    """All tables as one, for the policies that stand in each: interquartile means of PSNR and of its paired difference.

    Returns:
        Policy → ``psnr_iqm`` and, where ``reference`` is there, ``psnr_minus_{reference}_iqm``, each with its interval; empty
        where PSNR was not computed.
    """
    workloads: dict[str, list[Evaluation]] = {}
    for table in tables:
        workloads.setdefault(str(table.provenance["workload"]), []).append(table)
    names = [name for name in tables[0].scores if all("psnr" in table.scores.get(name, {}) for table in tables)]
    pooled: dict[str, dict[str, Interval]] = {}
    for name in names:
        values = [_side_by_side([table.scores[name]["psnr"] for table in own]) for own in workloads.values()]
        pooled[name] = {"psnr_iqm": iqm_interval(*values)}
        if reference in names and name != reference:
            changes = [_side_by_side([table.difference(name, reference) for table in own]) for own in workloads.values()]
            pooled[name][f"psnr_minus_{reference}_iqm"] = iqm_interval(*changes)
    return pooled


def _side_by_side(matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Several budgets of the same clips as one (clips, budgets × seeds)."""
    return np.concatenate(matrices, axis=1)


def _common_facts(records: Sequence[Record]) -> dict[str, object]:
    """Facts of the records; a list of all values where they differ."""
    facts: dict[str, object] = {}
    for name in records[0].facts:
        distinct: list[object] = []
        for record in records:
            if record.facts.get(name) not in distinct:
                distinct.append(record.facts.get(name))
        facts[name] = distinct[0] if len(distinct) == 1 else distinct
    return facts
