"""Results as figures for papers, PNG and SVG: quality against budget, PSNR per predicted frame, ranking with intervals."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from far_env.contract import UNLIMITED_FRAMES
from far_env.evaluation.gaps import NEW, gap_bins
from far_env.evaluation.ranking import Group, Metric, Row, choose_reference, facts, highlighted, make_groups, metric_format
from far_env.evaluation.records import FRAMES, Results
from far_env.evaluation.statistics import Interval
from far_env.evaluation.table import policy_labels
from far_env.io import replacing
from far_env.progress import show_progress
from far_env.rollout.noise import seeds_text

COLOURS = ("#1f6fd1", "#b65100", "#17823f", "#8748c4", "#c62f3c", "#0b7d87", "#80631c", "#b8387f")
MARKERS = "osD^vPX*"
QUIET = "#c3c9d0"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e7ea",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "savefig.dpi": 200,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "far-env",  # the same results give the same file
}


@dataclass(frozen=True)
class _Style:
    """The style of a policy's curve: full history black and dashed, the highlighted ones in colour, others thin and grey."""

    colour: str
    marker: str = ""
    line: str = "-"
    named: bool = True

    @property
    def width(self) -> float:
        return 1.6 if self.named else 0.8


def save_plots(results: Results, folder: Path, reference: str | None = None, progress: bool = True) -> list[Path]:
    """Write every figure that the results allow into a folder that exists; returns the files, two per figure.

    Raises:
        ValueError: if the reference was not evaluated, or a file cannot be written.
    """
    chosen = choose_reference(list(results.settings.policies), reference)
    labels = policy_labels(results.settings.policies)
    chosen, settings = labels[chosen], results.settings
    groups = [_labelled(group, labels) for group in make_groups(results)]
    coloured = highlighted(groups, settings.metrics[0], chosen, count=len(COLOURS))
    source = "; ".join(_source(results, workload) for workload in settings.workloads)
    written: list[Path] = []
    jobs = list(_figures(results, groups, coloured, chosen))
    with rc_context(STYLE):
        for name, make in show_progress(jobs, description="plots", unit="plots", delay=1, disable=not progress):
            figure = make()
            if figure is not None:
                written += [save_figure(figure, folder / f"{_file_name(name)}.{kind}", kind, source) for kind in ("png", "svg")]
    return written


def _figures(
    results: Results, groups: Sequence[Group], coloured: Sequence[str], reference: str
) -> Iterator[tuple[str, Callable[[], Figure | None]]]:
    """Names of the files and what draws them."""
    styles = {name: _Style(COLOURS[i], MARKERS[i]) for i, name in enumerate(coloured)}
    metrics = [metric_format(name) for name in results.settings.metrics]
    for workload in results.settings.workloads:
        of_workload = [group for group in groups if group.workload == workload]
        for metric in metrics:
            yield (
                f"budget_{workload}_{metric.name}",
                partial(budget_figure, of_workload, metric, styles, results.settings.memory),
            )
    for group in groups:
        where = f"{group.workload}_{_budget(group.budget)}"
        first = results.settings.num_context[group.workload]
        yield f"frames_{where}", partial(frame_figure, group, first, styles)
        yield f"gaps_{where}", partial(gap_figure, group, styles)
        for metric in metrics:
            yield f"ranking_{where}_{metric.name}", partial(ranking_figure, group, metric, reference)


def budget_figure(groups: Sequence[Group], metric: Metric, styles: dict[str, _Style], unit: str = FRAMES) -> Figure | None:
    """Mean metric of one workload's policies against the budget, with intervals; None without limited budgets or scores."""
    points: dict[str, dict[int, Interval]] = defaultdict(dict)
    for row in (row for group in groups for row in group.rows):
        interval = row.intervals[metric.name]
        if not isinstance(interval, str):
            points[row.policy][row.budget] = interval
    budgets = [group.budget for group in groups if group.budget < UNLIMITED_FRAMES]
    if not points or not budgets:
        return None
    figure, axes = _axes(5.6, 3.4)
    spread = [name for name in styles if name in points]
    for name, curve in points.items():
        style = _style(name, min(curve) >= UNLIMITED_FRAMES, styles)
        if min(curve) >= UNLIMITED_FRAMES:
            (interval,) = curve.values()
            axes.axhspan(interval.low, interval.high, color=style.colour, alpha=0.1, linewidth=0)
            axes.axhline(interval.mean, color=style.colour, linestyle=style.line, linewidth=1.2, label=name)
            continue
        # Slightly shifted, so that intervals do not overlap.
        factor = 1 + 0.012 * (spread.index(name) - (len(spread) - 1) / 2) if name in spread else 1
        places = sorted(curve)
        means = [curve[budget].mean for budget in places]
        errors = [[curve[b].mean - curve[b].low for b in places], [curve[b].high - curve[b].mean for b in places]]
        axes.errorbar(
            [budget * factor for budget in places],
            means,
            yerr=errors if style.named else None,
            color=style.colour,
            marker=style.marker,
            markersize=4.5,
            linewidth=style.width,
            elinewidth=1,
            label=name if style.named else "others",
            zorder=3 if style.named else 1,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set(xlabel=f"budget ({unit})", ylabel=_axis_label(metric), title=groups[0].workload)
    _legend(figure, axes)
    return figure


def frame_figure(group: Group, first_frame: int, styles: dict[str, _Style]) -> Figure | None:
    """Mean PSNR of every predicted frame with intervals, frames numbered from ``first_frame``; None where there is none."""
    rows = [row for row in group.rows if not isinstance(row.per_frame, str)]
    if not rows:
        return None
    figure, axes = _axes(5.6, 3.4)
    for row in rows:
        style = _style(row.policy, row.budget >= UNLIMITED_FRAMES, styles)
        frames = range(first_frame, first_frame + len(row.per_frame))
        means = [interval.mean for interval in row.per_frame]
        axes.plot(
            frames,
            means,
            color=style.colour,
            linestyle=style.line,
            linewidth=style.width,
            marker=style.marker if len(frames) <= 24 else "",
            markersize=4,
            label=row.policy if style.named else "others",
            zorder=3 if style.named else 1,
        )
        if style.named:
            low, high = [i.low for i in row.per_frame], [i.high for i in row.per_frame]
            axes.fill_between(frames, low, high, color=style.colour, alpha=0.1, linewidth=0)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(xlabel="frame", ylabel="PSNR (dB)", title=_title(group, rows))
    _legend(figure, axes)
    return figure


def gap_figure(group: Group, styles: dict[str, _Style]) -> Figure | None:
    """Mean PSNR of frames against how long ago their evidence was last in view; None where there is none.

    The frames that were not in view before are apart from the curves. Intervals are over the clips that have frames of a gap.
    """
    rows = [row for row in group.rows if not isinstance(row.by_gap, str)]
    names = gap_bins(rows)
    if not names:
        return None
    figure, axes = _axes(5.6, 3.4)
    coloured = [row for row in rows if _style(row.policy, row.budget >= UNLIMITED_FRAMES, styles).named]
    for row in rows:
        style = _style(row.policy, row.budget >= UNLIMITED_FRAMES, styles)
        # Slightly shifted, so that intervals do not overlap.
        shift = 0.05 * (coloured.index(row) - (len(coloured) - 1) / 2) if row in coloured else 0.0
        for part in ([name for name in names if name != NEW], [NEW]):
            found = [(place, row.by_gap[name]) for place, name in enumerate(names) if name in part and name in row.by_gap]
            if not found:
                continue
            means = [interval.mean for _, interval in found]
            errors = [[i.mean - i.low for _, i in found], [i.high - i.mean for _, i in found]]
            axes.errorbar(
                [place + shift for place, _ in found],
                means,
                yerr=errors if style.named else None,
                color=style.colour,
                linestyle=style.line,
                marker=style.marker or ("." if style.named else ""),
                markersize=4.5,
                linewidth=style.width,
                elinewidth=1,
                label=row.policy if style.named else "others",
                zorder=3 if style.named else 1,
            )
    axes.set_xticks(range(len(names)), names)
    axes.set(xlabel="gap: frames since the evidence was last in view", ylabel="PSNR (dB)", title=_title(group, rows))
    _legend(figure, axes)
    return figure


def ranking_figure(group: Group, metric: Metric, reference: str) -> Figure | None:
    """Policies from best to worst, mean and interval; the dotted line is the reference's mean. None without scores."""
    rows = [row for row in group.ranked(metric.name) if not isinstance(row.intervals[metric.name], str)]
    if not rows:
        return None
    figure, axes = _axes(5.6, 0.9 + 0.21 * len(rows))
    places = range(len(rows))
    intervals = [row.intervals[metric.name] for row in rows]
    means = [interval.mean for interval in intervals]
    errors = [[i.mean - i.low for i in intervals], [i.high - i.mean for i in intervals]]
    axes.errorbar(means, places, xerr=errors, fmt="o", color="#1c2025", markersize=4, elinewidth=1.2)
    for row, mean in zip(rows, means, strict=True):
        if row.policy == reference:
            axes.axvline(mean, color="#8b949e", linestyle=":", linewidth=1.2, zorder=1)
    axes.set_yticks(places, [row.policy for row in rows])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.set(xlabel=_axis_label(metric), title=_title(group, rows))
    return figure


def _labelled(group: Group, labels: Mapping[str, str]) -> Group:
    """A group whose policies are called as in tables."""
    rows = [replace(row, policy=labels[row.policy]) for row in group.rows]
    return replace(group, rows=rows, alike={labels[name]: labels[other] for name, other in group.alike.items()})


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")  # without pyplot: no global state, no window
    return figure, figure.subplots()


def _style(policy: str, unlimited: bool, styles: dict[str, _Style]) -> _Style:
    return _Style("#1c2025", line="--") if unlimited else styles.get(policy, _Style(QUIET, named=False))


def _legend(figure: Figure, axes: Axes) -> None:
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    entries = {label: handles[label] for label in sorted(handles, key="others".__eq__)}  # the grey curves share the last entry
    figure.legend(entries.values(), entries.keys(), loc="outside right upper")


def _axis_label(metric: Metric) -> str:
    return f"{metric.label} ({metric.unit})" if metric.unit else metric.label


def _budget(budget: int) -> str:
    return "full" if budget >= UNLIMITED_FRAMES else f"b{budget}"


def _title(group: Group, rows: Sequence[Row]) -> str:
    clips = {len(row.clips) for row in rows}
    count = f"{min(clips)}" if len(clips) == 1 else f"{min(clips)} to {max(clips)}"
    budget = "full history" if group.budget >= UNLIMITED_FRAMES else f"budget {group.budget}"
    return f"{group.workload}, {budget}, {count} clips"


def _source(results: Results, workload: str) -> str:
    counts = facts(results).get(workload, {})
    facts_text = ", ".join(f"{name.replace('_', ' ')} {' and '.join(counts[name])}" for name in counts if name != "versions")
    seeds = seeds_text(results.settings.seeds)
    return f"{workload}: {len(results.settings.clips)} {results.settings.split} clips, noise seeds {seeds}, {facts_text}"


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]", "_", name)


def save_figure(figure: Figure, path: Path, kind: str, source: str) -> Path:
    """Write a figure as a "png" or "svg" whose metadata name the source of its numbers. Raises ValueError if that fails."""
    metadata = {"Title": path.stem, "Description": source} | ({"Date": None} if kind == "svg" else {})
    with replacing(path) as temporary:
        figure.savefig(temporary, format=kind, metadata=metadata)
    return path
