"""One workload and budget of an evaluation: its policies side by side, on the same clips with the same noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from far_env.contract import UNLIMITED_FRAMES
from far_env.evaluation.aggregate import alike, collect_episodes
from far_env.evaluation.records import FRAMES, Record, Results, cell
from far_env.evaluation.statistics import Interval, iqm_interval, mean_interval
from far_env.metrics import LOWER_IS_BETTER
from far_env.rollout.noise import seeds_text, trajectory_seeds


@dataclass(frozen=True)
class Evaluation:
    """One workload and budget: metrics of several policies on the same clips with the same noise.

    Attributes:
        scores: policy name → metric name → float64 (clips, seeds), in the order of ``clip_ids``; with several trajectories
            (clips, seeds · trajectories), those of one seed together.
        unavailable: metric name → why it was not computed.
        provenance: the facts of the records (host, weights, versions, …) and the requested clips and seeds.
        decision_ms: policy name → mean milliseconds per decision; a policy that decided nothing is left out.
        failed: policy name → why it has no scores here.
        alike: policy name → an earlier one that made the same decisions in every episode, so that tables show both as one.
        policies: policy name → `far_env.policies.policy_facts`, as far as they are known.
        trajectories: continuations of every clip for each noise seed.
        fvd: policy name → FVD of every noise seed, float64 (seeds,), see `far_env.evaluation.fvd`; empty where it was not asked
            for or cannot be computed.
    """

    clip_ids: list[int]
    scores: dict[str, dict[str, np.ndarray]]
    unavailable: dict[str, str]
    provenance: dict[str, object]
    decision_ms: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    alike: dict[str, str] = field(default_factory=dict)
    policies: dict[str, dict[str, str]] = field(default_factory=dict)
    trajectories: int = 1
    fvd: dict[str, np.ndarray] = field(default_factory=dict)

    def best(self, policy: str, metric: str) -> np.ndarray:
        """The best of every clip's trajectories, float64 (clips, seeds)."""
        scores = self.scores[policy][metric]
        scores = scores.reshape(len(scores), -1, self.trajectories)
        return scores.min(axis=2) if metric in LOWER_IS_BETTER else scores.max(axis=2)

    def difference(self, policy: str, reference: str, metric: str = "psnr") -> np.ndarray:
        """Paired differences (clips, seeds) of one policy to another."""
        return self.scores[policy][metric] - self.scores[reference][metric]

    def summary(self, reference: str = "recent_fill") -> dict[str, object]:
        """Plain values for JSON: per policy and metric mean, low, high, n, and the paired PSNR difference to ``reference``.

        With several trajectories, a metric is the mean over them, and ``best_`` with its name that of every clip's best.
        """
        policies: dict[str, dict[str, object]] = {}
        for name, columns in self.scores.items():
            policies[name] = {metric: asdict(mean_interval(values)) for metric, values in columns.items()}
            if self.trajectories > 1:
                policies[name] |= {f"best_{metric}": asdict(mean_interval(self.best(name, metric))) for metric in columns}
            if name in self.fvd:
                policies[name]["fvd"] = {**_mean_and_deviation(self.fvd[name]), "by_seed": self.fvd[name].tolist()}
            if "psnr" in columns and reference in self.scores and name != reference:
                policies[name][f"psnr_minus_{reference}"] = asdict(mean_interval(self.difference(name, reference)))
        return {
            "policies": policies,
            "decision_ms": self.decision_ms,
            "unavailable": self.unavailable,
            "failed": self.failed,
            "alike": self.alike,
            "policy_facts": self.policies,
            **self.provenance,
        }


def tabulate(
    results: Results,
    workload: str,
    budget: int,
    clip_ids: Sequence[int] | None = None,
    seeds: Sequence[int] | None = None,
    seconds: float | None = None,
    trajectories: int = 1,
) -> Evaluation:
    """One workload and budget of an evaluation: the policies that have played all of these clips and seeds, and full history.

    Clips whose files could not be read are left out, for all policies, and named in the provenance as ``damaged_clips``.

    Args:
        clip_ids, seeds: those to include; all of the evaluation by default.
        trajectories: how many every one of the seeds has.
        seconds: how long the evaluation took, for the provenance.

    Raises:
        ValueError: if no policy has played them all.
    """
    settings = results.settings
    requested = settings.clips if clip_ids is None else [int(i) for i in clip_ids]
    left_out = [i for i in requested if (workload, i) in results.unreadable]
    clip_ids = [i for i in requested if i not in left_out]
    seeds = settings.seeds if seeds is None else [seed for first in seeds for seed in trajectory_seeds(first, trajectories)]
    budget = min(budget, UNLIMITED_FRAMES)
    complete = {
        episodes.policy: episodes
        for episodes in reversed(collect_episodes(results, workload, clip_ids, seeds))  # the budget's replace full history's
        if episodes.budget in (budget, UNLIMITED_FRAMES) and not episodes.missing
    }
    complete = {name: complete[name] for name in settings.policies if name in complete}
    if not complete:
        raise ValueError(f"no policy has played all {len(clip_ids)} clips of {workload} under budget {budget}")
    scores = {name: {metric: episodes.scores(metric) for metric in settings.metrics} for name, episodes in complete.items()}
    facts: dict[str, object] = {
        "workload": workload,
        "budget": "full history" if budget >= UNLIMITED_FRAMES else budget if settings.memory == FRAMES else f"{budget} tokens",
        "context": settings.num_context[workload],
        "predict": settings.num_predict[workload],
        "noise_seed": f"{seeds_text(seeds)} + clip id",
        **_common_facts([record for episodes in complete.values() for record in episodes.records.values()]),
        "split": settings.split,
        "clips": len(clip_ids),
        "trajectories": trajectories,
    }
    if left_out:
        facts["damaged_clips"] = left_out
    if seconds is not None:
        facts["seconds"] = round(seconds, 1)
    costs = {name: episodes.decision_ms() for name, episodes in complete.items()}
    decision_ms = {name: cost for name, cost in costs.items() if cost is not None}
    reasons = {name: where.get(cell(workload, budget)) for name, where in settings.failed.items() if name not in complete}
    failed = {name: reason for name, reason in reasons.items() if reason is not None}
    return Evaluation(
        clip_ids,
        scores,
        settings.unavailable,
        facts,
        decision_ms,
        failed,
        trajectories=trajectories,
        alike=alike(complete.values()),
        policies={name: settings.policies[name] for name in complete},
    )


def pooled_summary(tables: Sequence[Evaluation], reference: str = "recent_fill") -> dict[str, dict[str, Interval]]:
    """All tables as one, for the policies that are in each: interquartile means of PSNR and of its paired difference.

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
        values = [_side_by_side([table.scores[name]["psnr"] for table in group]) for group in workloads.values()]
        pooled[name] = {"psnr_iqm": iqm_interval(*values)}
        if reference in names and name != reference:
            changes = [_side_by_side([table.difference(name, reference) for table in group]) for group in workloads.values()]
            pooled[name][f"psnr_minus_{reference}_iqm"] = iqm_interval(*changes)
    return pooled


def _mean_and_deviation(values: np.ndarray) -> dict[str, float | None]:
    """The mean and, of more than one value, the standard deviation (with n − 1)."""
    return {"mean": float(values.mean()), "deviation": float(values.std(ddof=1)) if len(values) > 1 else None}


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
