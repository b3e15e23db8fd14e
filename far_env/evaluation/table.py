"""An evaluation as a table for the terminal."""

from __future__ import annotations

from far_env.evaluation.evaluate import Evaluation
from far_env.evaluation.statistics import mean_interval
from far_env.metrics import LOWER_IS_BETTER

_FORMATS = {"psnr": "{:.2f}", "ssim": "{:.3f}", "lpips": "{:.3f}"}


def results_table(result: Evaluation, reference: str = "recent_fill") -> str:
    """Rows of policies, best first: mean metrics and the paired PSNR difference to ``reference`` with its 95 % interval."""
    metrics = list(next(iter(result.scores.values())))
    compared = "psnr" in metrics and reference in result.scores
    header = ["policy", *(f"{name.upper()}{' dB' if name == 'psnr' else ''}" for name in metrics)]
    if compared:
        header.append(f"PSNR − {reference} [95 %]")
    rows = []
    sign = 1 if metrics[0] in LOWER_IS_BETTER else -1
    for name in sorted(result.scores, key=lambda own: sign * result.scores[own][metrics[0]].mean()):
        row = [name, *(_FORMATS[metric].format(result.scores[name][metric].mean()) for metric in metrics)]
        if compared:
            row.append("" if name == reference else _interval(result, name, reference))
        rows.append(row)
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(map(_align, row, widths, range(len(row)))) for row in [header, *rows]]
    lines.insert(1, "─" * len(lines[0]))
    facts = result.provenance
    lines.append(
        "\n{workload}, budget {budget}, {clips} {split} clips, noise seed {noise_seed}, {ode_steps} ODE steps; host {host} "
        "({weights}), {dtype} on {device}, commit {commit}; {seconds} s".format(**facts)
    )
    lines += [f"no {name} column: {reason}" for name, reason in result.unavailable.items()]
    return "\n".join(lines)


def _interval(result: Evaluation, name: str, reference: str) -> str:
    interval = mean_interval(result.difference(name, reference))
    return f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def _align(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)
