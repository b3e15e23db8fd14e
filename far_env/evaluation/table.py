"""Evaluations as tables: text for the terminal, Markdown for files."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from far_env.contract import TRUE
from far_env.evaluation.comparison import Evaluation, pooled_summary
from far_env.evaluation.ranking import metric_format
from far_env.evaluation.statistics import Interval, mean_interval
from far_env.text import markdown_lines, text_table


def results_table(result: Evaluation, reference: str = "recent_fill") -> str:
    """Rows of policies, best first: mean metrics, the paired PSNR difference to ``reference`` with its interval, the cost."""
    metrics = list(next(iter(result.scores.values())))
    formats = {name: metric_format(name) for name in metrics}
    compared = "psnr" in metrics and reference in result.scores
    labels = [f"{metric.label} {metric.unit}".rstrip() for metric in formats.values()]
    header = ["policy", *labels]
    if result.trajectories > 1:
        header = ["policy", *(text for label in labels for text in (f"{label}, mean", f"best of {result.trajectories}"))]
    if result.fvd:
        header.append("FVD")
    if compared:
        header.append(f"PSNR − {reference} [95 %]")
    header.append("ms/decision")
    means = {name: {metric: mean_interval(scores[metric]).mean for metric in metrics} for name, scores in result.scores.items()}
    rows = []
    order = {name: result.fvd[name].mean() for name in result.fvd}
    if metrics:
        sign = 1 if formats[metrics[0]].lower_is_better else -1
        order = {name: sign * means[name][metrics[0]] for name in means}
    for name in sorted(result.scores, key=lambda name: order.get(name, math.inf)):
        row = [name]
        for metric in metrics:
            columns = [means[name][metric]]
            if result.trajectories > 1:
                columns.append(mean_interval(result.best(name, metric)).mean)
            row += [f"{value:.{formats[metric].digits}f}" for value in columns]
        if result.fvd:
            values = result.fvd.get(name, np.zeros(0))
            spread = f" ± {values.std(ddof=1):.1f}" if len(values) > 1 else ""
            row.append(f"{values.mean():.1f}{spread}" if len(values) else "")
        if compared:
            row.append("" if name == reference else signed_interval_text(mean_interval(result.difference(name, reference))))
        row.append(f"{result.decision_ms[name]:.3f}" if name in result.decision_ms else "")
        rows.append(row)
    facts = result.provenance
    footer = "\n{workload}, budget {budget}, ".format(**facts) + source_line(facts)
    if "seconds" in facts:
        footer += f"; {facts['seconds']} s"
    if result.fvd:
        footer += f"; FVD of {facts['clips']} videos to as many true ones, by {facts['fvd']}"
        footer += ", mean over trajectories" * (result.trajectories > 1)
        footer += ", mean and deviation over noise seeds" * any(len(values) > 1 for values in result.fvd.values())
    missing = [f"no {name} column: {reason}" for name, reason in result.unavailable.items()]
    missing += [f"no row {name}: {reason}" for name, reason in result.failed.items()]
    if "damaged_clips" in facts:
        missing.append(f"without the clips {', '.join(map(str, facts['damaged_clips']))}, whose files are damaged")
    return "\n".join([text_table(header, rows), footer, *missing])


def source_line(facts: Mapping[str, object]) -> str:
    """The sources of an evaluation's numbers, from its provenance; all values where its episodes differ.

    Options of the clips are named where there are any, feedback where it is not that of generated frames.
    """
    options = ", ".join(f"{name} {value}" for name, value in facts.get("clip_options", {}).items())
    optional = {
        "with_options": f" with {options}" if options else "",
        "fed_back": ", true frames fed back" if facts.get("feedback") == TRUE else "",
    }
    texts = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in facts.items()}
    return (
        "{clips} {split} clips{with_options}, noise seed {noise_seed}, {ode_steps} ODE steps{fed_back}; host {host} "
        "({weights}), {dtype} on {device}, commit {commit}".format(**texts, **optional)
    )


def markdown_table(summaries: Sequence[Mapping[str, Any]], reference: str = "recent_fill") -> str:
    """Summaries of evaluations (`Evaluation.summary`) as one table: a row per workload, budget and policy, best first.

    Args:
        reference: the policy whose paired PSNR difference the summaries hold.
    """
    head = ["workload", "budget", "policy", "PSNR dB [95 %]", "SSIM [95 %]", f"PSNR − {reference} [95 %]"]
    lines = [head, ["---"] * len(head)]
    for summary in summaries:
        workload = summary["workload"] + " (true frames fed back)" * (summary.get("feedback") == TRUE)
        for name, scores in sorted(summary["policies"].items(), key=lambda item: -item[1]["psnr"]["mean"]):
            psnr, ssim = (Interval(**scores[metric]) for metric in ("psnr", "ssim"))
            difference = scores.get(f"psnr_minus_{reference}")
            paired = "" if difference is None else signed_interval_text(Interval(**difference))
            lines.append([workload, str(summary["budget"]), name, interval_text(psnr, 2), interval_text(ssim, 3), paired])
    return markdown_lines(lines)


def source_lines(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """The sources of the numbers of several summaries; workloads and budgets that have it in common share a line."""
    cells: dict[str, list[str]] = {}
    for summary in summaries:
        machines = summary["machine"] if isinstance(summary["machine"], list) else [summary["machine"]]
        line = f"{source_line(summary)}, {', '.join(machines)}"
        cells.setdefault(line, []).append(f"{summary['workload']} {summary['budget']}")
    return [f"{', '.join(dict.fromkeys(names))}: {line}" for line, names in cells.items()]


def pooled_table(tables: Sequence[Evaluation], reference: str = "recent_fill") -> str:
    """Several tables as one, best policy first; empty where PSNR was not computed or no policy is in all of them."""
    pooled = pooled_summary(tables, reference)
    if not pooled:
        return ""
    difference = f"psnr_minus_{reference}_iqm"
    compared = any(difference in intervals for intervals in pooled.values())
    header = ["policy", "PSNR dB [95 %]", *([f"PSNR − {reference} [95 %]"] if compared else [])]
    rows = []
    for name, intervals in sorted(pooled.items(), key=lambda item: -item[1]["psnr_iqm"].mean):
        row = [name, interval_text(intervals["psnr_iqm"], 2)]
        if compared:
            row.append(signed_interval_text(intervals[difference]) if difference in intervals else "")
        rows.append(row)
    cells = ", ".join(f"{table.provenance['workload']} {table.provenance['budget']}" for table in tables)
    return f"{text_table(header, rows)}\n\ninterquartile means over {cells}"


def interval_text(interval: Interval, digits: int) -> str:
    """Mean and bounds with this many decimals."""
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def signed_interval_text(interval: Interval) -> str:
    """Mean and bounds of a difference in dB, with signs and two decimals."""
    return f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"
