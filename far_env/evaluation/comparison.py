"""One workload and budget of an evaluation: its policies side by side, on the same clips with the same noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from far_env.contract import UNLIMITED_FRAMES
from far_env.errors import short
from far_env.evaluation.aggregate import Episodes, alike, collect_episodes
from far_env.evaluation.records import FRAMES, Results, cell
from far_env.evaluation.statistics import Interval, improvement_interval, iqm_interval, mean_interval, sign_flip_p
from far_env.metrics import LOWER_IS_BETTER
from far_env.policies import TRAINING_ROLLOUTS
from far_env.rollout.intervention import INTERVENTIONS, metric_of
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
        runs: name of a row that is the mean over several training runs → the policies that it stands for, see `with_runs`. Its
            scores are (clips, runs · seeds), those of one run together.
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
    runs: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def num_runs(self, policy: str) -> int:
        """Number of training runs that a row is of."""
        return len(self.runs.get(policy, (policy,)))

    def best(self, policy: str, metric: str) -> np.ndarray:
        """The best of every clip's trajectories, float64 (clips, seeds)."""
        scores = self.scores[policy][metric]
        scores = scores.reshape(len(scores), -1, self.trajectories)
        return scores.min(axis=2) if metric in LOWER_IS_BETTER else scores.max(axis=2)

    def difference(self, policy: str, reference: str, metric: str = "psnr") -> np.ndarray:
        """Paired differences (clips, runs · seeds) of one policy to another, each run with the same other one."""
        return self.scores[policy][metric] - np.tile(self.scores[reference][metric], self.num_runs(policy))

    def summary(self, reference: str = "recent_fill") -> dict[str, object]:
        """Plain values for JSON: per policy and metric mean, low, high and n, and for PSNR the interquartile mean (psnr_iqm).

        The paired PSNR difference to ``reference`` (psnr_minus_…) has a p value (psnr_minus_…_p, of `sign_flip_p`) and a
        probability of improvement (psnr_above_…). With several trajectories, a metric is the mean over them, and ``best_`` with
        its name that of every clip's best.
        """
        policies: dict[str, dict[str, object]] = {}
        for name, columns in self.scores.items():
            runs = self.num_runs(name)
            policies[name] = {metric: asdict(mean_interval(values, runs=runs)) for metric, values in columns.items()}
            if "psnr" in columns:
                policies[name]["psnr_iqm"] = asdict(iqm_interval(columns["psnr"], runs=runs))
            if self.trajectories > 1:
                best = {metric: mean_interval(self.best(name, metric), runs=runs) for metric in columns}
                policies[name] |= {f"best_{metric}": asdict(interval) for metric, interval in best.items()}
            if name in self.fvd:
                policies[name]["fvd"] = {**_mean_and_deviation(self.fvd[name]), "by_seed": self.fvd[name].tolist()}
            if "psnr" in columns and reference in self.scores and name != reference:
                difference = self.difference(name, reference)
                policies[name] |= {
                    f"psnr_minus_{reference}": asdict(mean_interval(difference, runs=runs)),
                    f"psnr_minus_{reference}_p": sign_flip_p(difference),
                    f"psnr_above_{reference}": asdict(improvement_interval(difference, runs=runs)),
                }
        return {
            "policies": policies,
            "decision_ms": self.decision_ms,
            "unavailable": self.unavailable,
            "failed": self.failed,
            "alike": self.alike,
            "policy_facts": self.policies,
            "runs": {name: list(members) for name, members in self.runs.items()},
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
    complete: dict[str, Episodes] = {}
    for episodes in collect_episodes(results, workload, clip_ids, seeds, (budget, UNLIMITED_FRAMES)):
        if not episodes.missing:
            # The budget's come before full history's. The frames are not needed and take most of the memory.
            complete.setdefault(episodes.policy, replace(episodes, frames=episodes.frames[:0], gaps=None))
    if not complete:
        raise ValueError(f"no policy has played all {len(clip_ids)} clips of {workload} under budget {budget}")
    scores = {name: {metric: episodes.scores(metric) for metric in settings.metrics} for name, episodes in complete.items()}
    facts: dict[str, object] = {
        "workload": workload,
        "budget": "full history" if budget >= UNLIMITED_FRAMES else budget if settings.memory == FRAMES else f"{budget} tokens",
        "context": settings.num_context[workload],
        "predict": settings.num_predict[workload],
        "noise_seed": f"{seeds_text(seeds)} + clip id",
        **_common_facts([facts for episodes in complete.values() for facts in episodes.facts]),
        "split": settings.split,
        "clips": len(clip_ids),
        "first_clip": min(requested),
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
        alike=alike(episodes.decided for episodes in complete.values()),
        policies={name: settings.policies[name] for name in complete},
    )


def with_runs(table: Evaluation, rows: Mapping[str, Sequence[str]]) -> Evaluation:
    """The evaluation with one row in place of several training runs of a configuration: the mean over them.

    Intervals of such a row are over clips and runs. A row of which a run has no scores is among the failed ones.

    Args:
        rows: name of the row → its policies.
    """
    scores, facts = dict(table.scores), dict(table.policies)
    costs, failed, fvd, alike = dict(table.decision_ms), dict(table.failed), dict(table.fvd), dict(table.alike)
    for row, members in rows.items():
        if lacking := [name for name in members if name not in table.scores]:
            failed[row] = f"{lacking[0]} has no scores: {table.failed.get(lacking[0], 'it was not played')}"
            continue
        metrics = table.scores[members[0]]
        scores[row] = {metric: np.concatenate([table.scores[name][metric] for name in members], axis=1) for metric in metrics}
        first = table.policies.get(members[0], {})
        facts[row] = {
            **{key: first[key] for key in ("family", "tier", TRAINING_ROLLOUTS) if key in first},
            "note": runs_text(members),
        }
        if timed := [table.decision_ms[name] for name in members if name in table.decision_ms]:
            costs[row] = float(np.mean(timed))
        if all(name in table.fvd for name in members):
            fvd[row] = np.concatenate([table.fvd[name] for name in members])
    replaced = {name for members in rows.values() for name in members}

    def kept(values: dict) -> dict:
        return {name: value for name, value in values.items() if name not in replaced}

    return replace(
        table,
        scores=kept(scores),
        policies=kept(facts),
        decision_ms=kept(costs),
        failed=kept(failed),
        fvd=kept(fvd),
        alike={name: other for name, other in kept(alike).items() if other not in replaced},
        runs={row: tuple(members) for row, members in rows.items() if row in scores},
    )


def with_interventions(summary: dict[str, Any], disturbed: Mapping[str, Any]) -> dict[str, Any]:
    """The first summary with the interventions' PSNR of the second, which has fewer of the same clips.

    Their number is in ``intervention_clips``.
    """
    names = [metric_of(name) for name in INTERVENTIONS]
    policies = {
        policy: scores | {name: disturbed["policies"][policy][name] for name in names if name in disturbed["policies"][policy]}
        for policy, scores in summary["policies"].items()
    }
    return {**summary, "policies": policies, "intervention_clips": disturbed["clips"]}


def check_runs(rows: Mapping[str, object], where: str) -> dict[str, tuple[str, ...]]:
    """The rows of `with_runs` from what a user gave.

    Raises:
        ValueError: naming the place, if a row is no list of two or more different policies.
    """
    for row, members in rows.items():
        is_list = isinstance(members, list | tuple) and all(isinstance(name, str) for name in members)
        if not is_list or len(members) < 2 or len(set(members)) < len(members):
            raise ValueError(f"{where}: {row} needs a list of two or more different policies, got {short(members)}")
    if both := rows.keys() & {name for members in rows.values() for name in members}:
        raise ValueError(f"{where}: {min(both)} is the name of a row and of a policy; give the row another name")
    return {str(row): tuple(members) for row, members in rows.items()}


def runs_text(members: Sequence[str]) -> str:
    """What a row of several training runs is."""
    return f"mean over {len(members)} training runs: {', '.join(members)}"


def pooled_summary(tables: Sequence[Evaluation], reference: str = "recent_fill") -> dict[str, dict[str, Interval]]:
    """All tables as one, for the policies that are in each: interquartile means of PSNR and of its paired difference.

    Returns:
        Policy → ``psnr_iqm`` and, where ``reference`` is there, ``psnr_minus_{reference}_iqm`` and ``psnr_above_{reference}``
        (the probability of improvement), each with its interval; empty where PSNR was not computed.
    """
    workloads: dict[str, list[Evaluation]] = {}
    for table in tables:
        workloads.setdefault(str(table.provenance["workload"]), []).append(table)
    names = [name for name in tables[0].scores if all("psnr" in table.scores.get(name, {}) for table in tables)]
    pooled: dict[str, dict[str, Interval]] = {}
    for name in names:
        runs = tables[0].num_runs(name)
        values = [_side_by_side([table.scores[name]["psnr"] for table in group], runs) for group in workloads.values()]
        pooled[name] = {"psnr_iqm": iqm_interval(*values, runs=runs)}
        if reference in names and name != reference:
            differences = [[table.difference(name, reference) for table in group] for group in workloads.values()]
            changes = [_side_by_side(group, runs) for group in differences]
            pooled[name][f"psnr_minus_{reference}_iqm"] = iqm_interval(*changes, runs=runs)
            pooled[name][f"psnr_above_{reference}"] = improvement_interval(*changes, runs=runs)
    return pooled


def _mean_and_deviation(values: np.ndarray) -> dict[str, float | None]:
    """The mean and, of more than one value, the standard deviation (with n − 1)."""
    return {"mean": float(values.mean()), "deviation": float(values.std(ddof=1)) if len(values) > 1 else None}


def _side_by_side(matrices: Sequence[np.ndarray], runs: int) -> np.ndarray:
    """Several budgets of the same clips, each (clips, runs · seeds), as one (clips, runs · budgets · seeds)."""
    together = np.concatenate([matrix.reshape(len(matrix), runs, -1) for matrix in matrices], axis=2)
    return together.reshape(len(together), -1)


def _common_facts(all_facts: Sequence[Mapping[str, Any]]) -> dict[str, object]:
    """Facts of records; a list of all values where they differ."""
    facts: dict[str, object] = {}
    for name in all_facts[0]:
        distinct: list[object] = []
        for one in all_facts:
            if one.get(name) not in distinct:
                distinct.append(one.get(name))
        facts[name] = distinct[0] if len(distinct) == 1 else distinct
    return facts
