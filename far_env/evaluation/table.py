"""Evaluations as tables: text for the terminal, Markdown for files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from far_env.evaluation.comparison import Evaluation, pooled_summary
from far_env.evaluation.statistics import Interval, mean_interval
from far_env.metrics import LOWER_IS_BETTER

_FORMATS = {"psnr": "{:.2f}", "ssim": "{:.3f}", "lpips": "{:.3f}"}


def results_table(result: Evaluation, reference: str = "recent_fill") -> str:
    """Rows of policies, best first: mean metrics, the paired PSNR difference to ``reference`` with its interval, the cost."""
    metrics = list(next(iter(result.scores.values())))
    compared = "psnr" in metrics and reference in result.scores
    header = ["policy", *(f"{name.upper()}{' dB' if name == 'psnr' else ''}" for name in metrics)]
    if compared:
        header.append(f"PSNR − {reference} [95 %]")
    header.append("ms/decision")
    means = {name: {metric: mean_interval(own[metric]).mean for metric in metrics} for name, own in result.scores.items()}
    rows = []
    sign = 1 if metrics[0] in LOWER_IS_BETTER else -1
    for name in sorted(result.scores, key=lambda own: sign * means[own][metrics[0]]):
        row = [name, *(_FORMATS[metric].format(means[name][metric]) for metric in metrics)]
        if compared:
            row.append("" if name == reference else signed_interval_text(mean_interval(result.difference(name, reference))))
        row.append(f"{result.decision_ms[name]:.3f}" if name in result.decision_ms else "")
        rows.append(row)
    facts = result.provenance
    footer = "\n{workload}, budget {budget}, ".format(**facts) + source_line(facts)
    if "seconds" in facts:
        footer += f"; {facts['seconds']} s"
    missing = [f"no {name} column: {reason}" for name, reason in result.unavailable.items()]
    if "damaged_clips" in facts:
        missing.append(f"without the clips {', '.join(map(str, facts['damaged_clips']))}, whose files are damaged")
    return "\n".join([text_table(header, rows), footer, *missing])


def source_line(facts: Mapping[str, object]) -> str:
    """What an evaluation's numbers were made with, from its provenance; all values where its episodes differ."""
    told = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in facts.items()}
    return (
        "{clips} {split} clips, noise seed {noise_seed}, {ode_steps} ODE steps; host {host} ({weights}), {dtype} on {device}, "
        "commit {commit}".format(**told)
    )


def markdown_table(summaries: Sequence[Mapping[str, Any]], reference: str = "recent_fill") -> str:
    """Summaries of evaluations (`Evaluation.summary`) as one table: a row per workload, budget and policy, best first.

    Args:
        reference: the policy whose paired PSNR difference the summaries hold.
    """
    head = ["workload", "budget", "policy", "PSNR dB [95 %]", "SSIM [95 %]", f"PSNR − {reference} [95 %]"]
    lines = [head, ["---"] * len(head)]
    for summary in summaries:
        for name, scores in sorted(summary["policies"].items(), key=lambda item: -item[1]["psnr"]["mean"]):
            psnr, ssim = (Interval(**scores[metric]) for metric in ("psnr", "ssim"))
            difference = scores.get(f"psnr_minus_{reference}")
            told = "" if difference is None else signed_interval_text(Interval(**difference))
            lines.append(
                [summary["workload"], str(summary["budget"]), name, interval_text(psnr, 2), interval_text(ssim, 3), told]
            )
    return markdown_lines(lines)


def markdown_lines(rows: Sequence[Sequence[str]]) -> str:
    """Cells as the lines of a Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def source_lines(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the numbers of several summaries were made with: a line for all workloads and budgets that have it in common."""
    cells: dict[str, list[str]] = {}
    for summary in summaries:
        machines = summary["machine"] if isinstance(summary["machine"], list) else [summary["machine"]]
        line = f"{source_line(summary)}, {', '.join(machines)}"
        cells.setdefault(line, []).append(f"{summary['workload']} {summary['budget']}")
    return [f"{', '.join(dict.fromkeys(own))}: {line}" for line, own in cells.items()]


def pooled_table(tables: Sequence[Evaluation], reference: str = "recent_fill") -> str:
    """Several tables as one, best policy first; empty where PSNR was not computed or no policy stands in all of them."""
    pooled = pooled_summary(tables, reference)
    if not pooled:
        return ""
    difference = f"psnr_minus_{reference}_iqm"
    compared = any(difference in own for own in pooled.values())
    header = ["policy", "PSNR dB [95 %]", *([f"PSNR − {reference} [95 %]"] if compared else [])]
    rows = []
    for name, own in sorted(pooled.items(), key=lambda item: -item[1]["psnr_iqm"].mean):
        quality = own["psnr_iqm"]
        row = [name, interval_text(quality, 2)]
        if compared:
            row.append(signed_interval_text(own[difference]) if difference in own else "")
        rows.append(row)
    cells = ", ".join(f"{table.provenance['workload']} {table.provenance['budget']}" for table in tables)
    return f"{text_table(header, rows)}\n\ninterquartile means over {cells}"


def interval_text(interval: Interval, digits: int) -> str:
    """Mean and bounds with so many decimals."""
    return f"{interval.mean:.{digits}f} [{interval.low:.{digits}f}, {interval.high:.{digits}f}]"


def signed_interval_text(interval: Interval) -> str:
    """Mean and bounds of a difference in dB, with signs and two decimals."""
    return f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def text_table(header: list[str], rows: list[list[str]]) -> str:
    """Rows under a header, in columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(map(_align, row, widths, range(len(row)))) for row in [header, *rows]]
    return "\n".join([lines[0], "─" * len(lines[0]), *lines[1:]])


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)
