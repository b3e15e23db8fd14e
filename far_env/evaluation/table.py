"""Evaluations as tables: text for the terminal, Markdown for files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from far_env.contract import TRUE
from far_env.evaluation.comparison import Evaluation, pooled_summary, runs_text
from far_env.evaluation.ranking import metric_format
from far_env.evaluation.statistics import Interval, holm, improvement_interval, iqm_interval, mean_interval, sign_flip_p
from far_env.policies import TRAINING_ROLLOUTS, VALIDATION_ROLLOUTS
from far_env.rollout.intervention import INTERVENTIONS, metric_of
from far_env.text import markdown_lines, text_table

FAMILY_WISE_LEVEL = 0.05


def results_table(result: Evaluation, reference: str = "recent_fill", robust: bool = False) -> str:
    """Rows of policies, best first: mean metrics, the paired PSNR difference to ``reference`` with its interval, the cost.

    Policies that decided alike share a row. Where a policy was tuned, a column has the validation rollouts that each received.

    Args:
        robust: add columns of the interquartile mean of PSNR and of the probability of improvement over the reference.
    """
    metrics = list(next(iter(result.scores.values())))
    formats = {name: metric_format(name) for name in metrics}
    compared = "psnr" in metrics and reference in result.scores
    labels = [f"{metric.label} {metric.unit}".rstrip() for metric in formats.values()]
    header = ["policy", *labels]
    if result.trajectories > 1:
        header = ["policy", *(text for label in labels for text in (f"{label}, mean", f"best of {result.trajectories}"))]
    if result.fvd:
        header.append("FVD")
    robust = robust and "psnr" in metrics
    header += ["PSNR IQM dB [95 %]"] * robust
    if compared:
        header += [f"PSNR − {reference} [95 %]", *["P(better) [95 %]"] * robust]
    header.append("ms/decision")
    tuned = {name: facts for name, facts in result.policies.items() if VALIDATION_ROLLOUTS in facts}
    header += ["validation rollouts"] * bool(tuned)
    means = {name: {metric: mean_interval(scores[metric]).mean for metric in metrics} for name, scores in result.scores.items()}
    rows, comparisons = [], []
    order = {name: result.fvd[name].mean() for name in result.fvd}
    if metrics:
        sign = 1 if formats[metrics[0]].lower_is_better else -1
        order = {name: sign * means[name][metrics[0]] for name in means}
    together = rows_of(result.scores, result.alike)
    for name in sorted(together, key=lambda name: order.get(name, math.inf)):
        row = [row_label(together[name], result.policies)]
        for metric in metrics:
            columns = [means[name][metric]]
            if result.trajectories > 1:
                columns.append(mean_interval(result.best(name, metric)).mean)
            row += [f"{value:.{formats[metric].digits}f}" for value in columns]
        if result.fvd:
            values = result.fvd.get(name, np.zeros(0))
            spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            row.append(f"{values.mean():.1f}{spread}" if len(values) else "")
        runs = result.num_runs(name)
        if robust:
            row.append(interval_text(iqm_interval(result.scores[name]["psnr"], runs=runs), 2))
        if compared and reference in together[name]:
            row += [""] * (1 + robust)
        elif compared:
            difference = result.difference(name, reference)
            interval = mean_interval(difference, runs=runs)
            comparisons.append(Comparison("", row[0], interval, sign_flip_p(difference)))
            row.append(signed_interval_text(interval))
            row += [interval_text(improvement_interval(difference, runs=runs), 2)] * robust
        row.append(f"{result.decision_ms[name]:.3f}" if name in result.decision_ms else "")
        if tuned:
            row.append(_rollouts(together[name], result.policies))
        rows.append(row)
    facts = result.provenance
    footer = "\n{workload}, budget {budget}, ".format(**facts) + source_line(facts)
    if "seconds" in facts:
        footer += f"; {facts['seconds']} s"
    if result.fvd:
        footer += f"; FVD of {facts['clips']} videos to as many true ones, by {facts['fvd']}"
        footer += ", mean over trajectories" * (result.trajectories > 1)
        footer += ", mean and deviation over noise seeds" * any(len(values) > 1 for values in result.fvd.values())
    notes = [family_line(comparisons, reference)] * bool(comparisons)
    notes += [f"{name}: {runs_text(members)}" for name, members in result.runs.items()]
    notes += [f"{policy_label(name, facts)} is {name}: {facts.get('parameters', '')}" for name, facts in tuned.items()]
    missing = [f"no {name} column: {reason}" for name, reason in result.unavailable.items()]
    missing += [f"no row {name}: {reason}" for name, reason in result.failed.items()]
    if "damaged_clips" in facts:
        missing.append(f"without the clips {', '.join(map(str, facts['damaged_clips']))}, whose files are damaged")
    return "\n".join([text_table(header, rows), footer, *notes, *missing])


@dataclass(frozen=True)
class Comparison:
    """A policy's paired difference to the reference in one workload and budget, with the p value of `sign_flip_p`."""

    cell: str
    policy: str
    difference: Interval
    p: float


def family_line(comparisons: Sequence[Comparison], reference: str) -> str:
    """How many comparisons a table makes, and which differences stay clear of zero when all of them are counted.

    Those are the differences whose p value, adjusted for the number of comparisons by `holm`, is at most 5 %, and whose
    interval does not hold zero either (for training runs it is wider than the p value, which is of the mean of these runs).
    """
    adjusted = holm([comparison.p for comparison in comparisons])
    names: dict[bool, list[str]] = {True: [], False: []}
    for comparison, p in zip(comparisons, adjusted, strict=True):
        holds_zero = comparison.difference.low <= 0 <= comparison.difference.high
        names[p <= FAMILY_WISE_LEVEL and not holds_zero].append(f"{comparison.cell} {comparison.policy}".strip())
    clear, unclear = names[True], names[False]
    text = "none" if not clear else "all" if not unclear else ", ".join(clear)
    if clear and unclear and len(unclear) < len(clear):
        text = f"all but {', '.join(unclear)}"
    count = f"{len(comparisons)} comparison{'s' * (len(comparisons) > 1)} with {reference}"
    level = f"{100 * FAMILY_WISE_LEVEL:.0f} %"
    return f"{count}; clear of zero by Holm–Bonferroni at a family-wise {level} (sign-flip p values): {text}"


def comparisons_of(summaries: Sequence[Mapping[str, Any]], reference: str) -> list[Comparison]:
    """The comparisons of `markdown_table`: one for each row but the reference's, in its order."""
    comparisons = []
    for summary in summaries:
        cell = f"{_workload_label(summary)} {summary['budget']}" if len(summaries) > 1 else ""
        for names in _ranked(summary):
            scores = summary["policies"][names[0]]
            if reference not in names and (difference := scores.get(f"psnr_minus_{reference}")) is not None:
                label = row_label(names, summary.get("policy_facts", {}))
                p = scores[f"psnr_minus_{reference}_p"]
                comparisons.append(Comparison(cell, label, Interval(**difference), p))
    return comparisons


def _ranked(summary: Mapping[str, Any]) -> list[list[str]]:
    """The policies of each row of a summary, best row first."""
    together = rows_of(summary["policies"], summary.get("alike", {}))
    return [together[name] for name in sorted(together, key=lambda name: -summary["policies"][name]["psnr"]["mean"])]


def rows_of(names: Iterable[str], alike: Mapping[str, str]) -> dict[str, list[str]]:
    """The policies of each row of a table, by the first of them: ``alike`` names those that an earlier one stands for."""
    rows: dict[str, list[str]] = {}
    for name in names:
        first = alike.get(name, name)
        rows.setdefault(first, [first]).extend([name] * (name != first))
    return rows


def row_label(names: Sequence[str], policies: Mapping[str, Mapping[str, str]]) -> str:
    """The first cell of a row of policies that decided alike."""
    return " = ".join(policy_label(name, policies.get(name, {})) for name in names)


def policy_label(name: str, facts: Mapping[str, str]) -> str:
    """A policy's name in tables; with the fact ``remark`` where there is one, such as "reconstruction"."""
    remark = f" ({facts['remark']})" if "remark" in facts else ""
    return facts.get("label", name) + remark


def source_line(facts: Mapping[str, object]) -> str:
    """The sources of an evaluation's numbers, from its provenance; all values where its episodes differ.

    The first clip is named where it is not that of the split, options of the clips where there are any, feedback where it is
    not that of generated frames.
    """
    options = ", ".join(f"{name} {value}" for name, value in facts.get("clip_options", {}).items())
    first = facts.get("first_clip", 0)
    optional = {
        "from_first": f" from {first} on" if first else "",
        "with_options": f" with {options}" if options else "",
        "fed_back": ", true frames fed back" if facts.get("feedback") == TRUE else "",
    }
    texts = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in facts.items()}
    return (
        "{clips} {split} clips{from_first}{with_options}, noise seed {noise_seed}, {ode_steps} ODE steps{fed_back}; "
        "host {host} ({weights}), {dtype} on {device}, commit {commit}".format(**texts, **optional)
    )


def markdown_table(
    summaries: Sequence[Mapping[str, Any]], reference: str = "recent_fill", robust: bool = False, tiers: bool = False
) -> str:
    """Summaries of evaluations (`Evaluation.summary`) as one table: a row per workload, budget and policy, best first.

    Policies that decided alike share a row. PSNR under interventions has columns. Where a policy was tuned, a column has the
    validation rollouts that each received.

    Args:
        reference: the policy whose paired PSNR difference the summaries hold.
        robust: as for `results_table`; the summaries need them.
        tiers: add a column of what the policies read.
    """
    head = ["workload", "budget", "policy", "PSNR dB [95 %]", "SSIM [95 %]", f"PSNR − {reference} [95 %]"]
    facts = {name: values for summary in summaries for name, values in summary.get("policy_facts", {}).items()}
    measured = [scores for summary in summaries for scores in summary["policies"].values()]
    disturbed = [metric_of(name) for name in INTERVENTIONS if any(metric_of(name) in scores for scores in measured)]
    head += ["PSNR IQM dB [95 %]", "P(better) [95 %]"] * robust
    head += [f"{metric_format(name).label} dB [95 %]" for name in disturbed]
    is_tuned = any(VALIDATION_ROLLOUTS in values for values in facts.values())
    head += ["validation rollouts"] * is_tuned + ["tier"] * tiers
    lines = [head]
    for summary in summaries:
        workload = _workload_label(summary)
        for names in _ranked(summary):
            scores = summary["policies"][names[0]]
            psnr, ssim = (Interval(**scores[metric]) for metric in ("psnr", "ssim"))
            difference = scores.get(f"psnr_minus_{reference}")
            is_compared = difference is not None and reference not in names
            paired = signed_interval_text(Interval(**difference)) if is_compared else ""
            label = row_label(names, summary.get("policy_facts", {}))
            cells = [workload, str(summary["budget"]), label, interval_text(psnr, 2), interval_text(ssim, 3), paired]
            if robust:
                better = interval_text(Interval(**scores[f"psnr_above_{reference}"]), 2) if is_compared else ""
                cells += [interval_text(Interval(**scores["psnr_iqm"]), 2), better]
            cells += [interval_text(Interval(**scores[metric]), 2) if metric in scores else "" for metric in disturbed]
            cells += [_rollouts(names, facts)] * is_tuned
            cells += [" = ".join(dict.fromkeys(facts.get(name, {}).get("tier", "") for name in names))] * tiers
            lines.append(cells)
    return markdown_lines(lines)


def _workload_label(summary: Mapping[str, Any]) -> str:
    """A workload's name, with the split where it is another than test, and feedback where it is of true frames."""
    split = summary.get("split", "test")
    remarks = [split] * (split != "test") + ["true frames fed back"] * (summary.get("feedback") == TRUE)
    return summary["workload"] + f" ({', '.join(remarks)})" * bool(remarks)


def policy_labels(policies: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """`policy_label` of every policy; its name where two labels would be the same."""
    labels = {name: policy_label(name, facts) for name, facts in policies.items()}
    return {name: label if list(labels.values()).count(label) == 1 else name for name, label in labels.items()}


def _rollouts(names: Sequence[str], policies: Mapping[str, Mapping[str, str]]) -> str:
    """The validation rollouts by which the policies of a row were chosen.

    Of a rule those of its tuning, for this workload and budget: 0 for defaults. Of a learned policy those of its whole
    training, or "trained" where they are not known.
    """
    texts = []
    for name in names:
        facts = policies.get(name, {})
        untuned = "trained" if facts.get("family") == "learned" else "0"
        texts.append(facts.get(VALIDATION_ROLLOUTS) or facts.get(TRAINING_ROLLOUTS) or untuned)
    return " = ".join(dict.fromkeys(texts))


def source_lines(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sources of the numbers of several summaries; workloads and budgets that have it in common share a line."""
    cells: dict[str, list[str]] = {}
    for summary in summaries:
        machines = summary["machine"] if isinstance(summary["machine"], list) else [summary["machine"]]
        line = f"{source_line(summary)}, {', '.join(machines)}"
        if "intervention_clips" in summary:
            line += f"; interventions on the first {summary['intervention_clips']} clips"
        cells.setdefault(line, []).append(f"{summary['workload']} {summary['budget']}")
    return [f"{', '.join(dict.fromkeys(names))}: {line}" for line, names in cells.items()]


def pooled_table(tables: Sequence[Evaluation], reference: str = "recent_fill", robust: bool = False) -> str:
    """Several tables as one, best policy first; empty where PSNR was not computed or no policy is in all of them.

    Args:
        robust: add the probability of improvement over the reference.
    """
    pooled = pooled_summary(tables, reference)
    if not pooled:
        return ""
    difference = f"psnr_minus_{reference}_iqm"
    compared = any(difference in intervals for intervals in pooled.values())
    header = ["policy", "PSNR dB [95 %]"]
    if compared:
        header += [f"PSNR − {reference} [95 %]", *["P(better) [95 %]"] * robust]
    rows = []
    alike = {name: first for name, first in tables[0].alike.items() if all(t.alike.get(name) == first for t in tables)}
    together = rows_of(pooled, alike)
    for name in sorted(together, key=lambda name: -pooled[name]["psnr_iqm"].mean):
        intervals = pooled[name]
        row = [row_label(together[name], tables[0].policies), interval_text(intervals["psnr_iqm"], 2)]
        if compared:
            is_compared = difference in intervals and reference not in together[name]
            row.append(signed_interval_text(intervals[difference]) if is_compared else "")
            if robust:
                row.append(interval_text(intervals[f"psnr_above_{reference}"], 2) if is_compared else "")
        rows.append(row)
    cells = ", ".join(f"{table.provenance['workload']} {table.provenance['budget']}" for table in tables)
    return f"{text_table(header, rows)}\n\ninterquartile means over {cells}"


def interval_text(interval: Interval, digits: int) -> str:
    """Mean and bounds with this many decimals."""
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def signed_interval_text(interval: Interval) -> str:
    """Mean and bounds of a difference in dB, with signs and two decimals."""
    return f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
