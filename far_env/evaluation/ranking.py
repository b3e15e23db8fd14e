"""Results as comparable numbers: per workload and budget, every policy's means with intervals and the paired differences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from far_env.contract import UNLIMITED_FRAMES, NewestFrames
from far_env.errors import unknown_name
from far_env.evaluation.aggregate import Episodes, alike, collect_episodes
from far_env.evaluation.gaps import psnr_by_gap
from far_env.evaluation.records import Results
from far_env.evaluation.statistics import Interval, iqm_interval, mean_intervals, sign_flip_ps
from far_env.metrics import LOWER_IS_BETTER
from far_env.rollout.intervention import interventions_of

_NO_CLIP = "no clip is finished with every noise seed"
_FORMATS = {
    "psnr": ("PSNR", "dB", 2),
    "ssim": ("SSIM", "", 3),
    "lpips": ("LPIPS", "", 3),
    "kept_ssim": ("SSIM with kept frames", "", 3),
    "kept_lpips": ("LPIPS to kept frames", "", 3),
    "colour_drift": ("colour drift", "", 3),
    "far_psnr": ("FAR's PSNR", "dB", 2),
    "far_lpips": ("FAR's LPIPS", "", 3),
}


@dataclass(frozen=True)
class Metric:
    """A metric: its label, its unit, its digits and whether lower is better."""

    name: str
    label: str
    unit: str
    digits: int
    lower_is_better: bool


def metric_format(name: str) -> Metric:
    """Label, unit and decimals of a metric."""
    if interventions_of([name]):
        name_of, _, intervention = name.partition("_")
        base = metric_format(name_of)
        return replace(base, name=name, label=f"{base.label} {intervention}")
    label, unit, digits = _FORMATS.get(name, (name.upper(), "", 3))
    return Metric(name, label, unit, digits, name in LOWER_IS_BETTER)


@dataclass(frozen=True)
class Row:
    """One policy in a group.

    Attributes:
        budget: that of the policy; full history has the same row in the groups of every budget.
        clips: those that are finished with every noise seed. The value of a clip is the mean over its seeds.
        missing: episodes that were requested and are not finished.
        episodes: metric → float64 (clips, seeds), or why there is none.
        scores: the same as means over seeds, float64 (clips,).
        intervals: metric → mean over clips with its interval, or why there is none.
        iqm: metric → interquartile mean of all episodes with its interval, or why there is none.
        per_frame: PSNR of every predicted frame, or why there is none.
        by_gap: PSNR of the frames whose evidence was last in view so long ago, see `psnr_by_gap`, or why there is none.
        decision_ms: mean milliseconds per decision, or None.
    """

    policy: str
    budget: int
    clips: tuple[int, ...]
    missing: int
    episodes: dict[str, np.ndarray | str]
    scores: dict[str, np.ndarray | str]
    intervals: dict[str, Interval | str]
    iqm: dict[str, Interval | str]
    per_frame: list[Interval] | str
    by_gap: dict[str, Interval] | str
    decision_ms: float | None


@dataclass(frozen=True)
class Difference:
    """A row against a reference, on the clips that both have.

    Attributes:
        interval: mean of the paired differences, row minus reference.
        p: see `far_env.evaluation.statistics.sign_flip_p`.
        better: the probability that the row is better, see `far_env.evaluation.statistics.improvement_interval`.
    """

    interval: Interval
    p: float
    better: Interval

    def reversed(self) -> Difference:
        """The reference against the row."""
        interval, better = self.interval, self.better
        return Difference(
            Interval(-interval.mean, -interval.high, -interval.low, interval.n),
            self.p,
            Interval(1 - better.mean, 1 - better.high, 1 - better.low, better.n),
        )


@dataclass(frozen=True)
class Group:
    """The policies that are compared: those of one workload under one budget, and full history.

    Attributes:
        alike: policy → an earlier one that made the same decisions in every episode.
    """

    workload: str
    budget: int
    rows: list[Row]
    alike: dict[str, str] = field(default_factory=dict)

    def ranked(self, metric: str) -> list[Row]:
        """Rows by their mean, best first; rows without this metric last."""
        sign = 1 if metric in LOWER_IS_BETTER else -1

        def place(row: Row) -> float:
            interval = row.intervals[metric]
            return np.inf if isinstance(interval, str) else sign * interval.mean

        return sorted(self.rows, key=place)

    def differences(self, metric: str) -> list[list[Difference | None]]:
        """Paired differences [row][reference], row minus reference on the clips that both have; None where there are none."""
        table: list[list[Difference | None]] = [[None] * len(self.rows) for _ in self.rows]
        sign = -1 if metric in LOWER_IS_BETTER else 1
        by_clips: dict[tuple[int, ...], list[tuple[int, int, np.ndarray]]] = defaultdict(list)
        for i, row in enumerate(self.rows):
            for j, reference in enumerate(self.rows[:i]):
                scores, others = row.episodes[metric], reference.episodes[metric]
                if isinstance(scores, str) or isinstance(others, str):
                    continue
                clips, at, reference_at = np.intersect1d(row.clips, reference.clips, assume_unique=True, return_indices=True)
                if len(clips):
                    by_clips[tuple(clips)].append((i, j, scores[at] - others[reference_at]))
        for pairs in by_clips.values():
            changes = np.stack([values.mean(axis=1) for _, _, values in pairs], axis=1)
            better = np.stack([np.heaviside(sign * values, 0.5).mean(axis=1) for _, _, values in pairs], axis=1)
            columns = zip(pairs, mean_intervals(changes), sign_flip_ps(changes), mean_intervals(better), strict=True)
            for (i, j, _), *values in columns:
                table[i][j] = Difference(*values)
                table[j][i] = table[i][j].reversed()
        return table


def select_policies(results: Results, names: Sequence[str]) -> Results:
    """Results of these policies alone, in this order; of all if no name is given.

    Raises:
        ValueError: on a policy that was not evaluated, or if no episode is left.
    """
    settings = results.settings
    for name in names:
        if name not in settings.policies:
            raise ValueError(f"{results.folder}: {unknown_name('policy', name, list(settings.policies))}")
    chosen = {name: settings.policies[name] for name in names or settings.policies}
    records = results.of_policies(chosen)
    if not records:
        raise ValueError(f"{results.folder} holds no finished episode{' of these policies' if names else ''}; evaluate first")
    return replace(results, settings=replace(settings, policies=chosen), records=records)


def make_groups(results: Results) -> list[Group]:
    """Every workload × budget that has episodes, in the order of the settings.

    A workload whose only policies are unlimited is one group with the budget `UNLIMITED_FRAMES`.
    """
    groups = []
    for workload in results.settings.workloads:
        rows: dict[int, list[Row]] = defaultdict(list)
        decided: dict[int, list[tuple[str, int, bytes]]] = defaultdict(list)
        for episodes in collect_episodes(results, workload):
            budget = min(episodes.budget, UNLIMITED_FRAMES)
            rows[budget].append(_row(results, episodes))
            decided[budget].append(episodes.decided)
        unlimited = rows.pop(UNLIMITED_FRAMES, [])
        groups += [Group(workload, budget, [*rows[budget], *unlimited], alike(decided[budget])) for budget in sorted(rows)]
        if unlimited and not rows:
            groups.append(Group(workload, UNLIMITED_FRAMES, unlimited))
    return groups


def _row(results: Results, episodes: Episodes) -> Row:
    scores = {metric: _scores(metric, episodes) for metric in results.settings.metrics}
    means = {metric: values if isinstance(values, str) else values.mean(axis=1) for metric, values in scores.items()}
    intervals: dict[str, Interval | str] = {}
    for metric, values in means.items():
        intervals[metric] = values if isinstance(values, str) else mean_intervals(values[:, None])[0]
    return Row(
        policy=episodes.policy,
        budget=min(episodes.budget, UNLIMITED_FRAMES),
        clips=episodes.clips,
        missing=episodes.missing,
        episodes=scores,
        scores=means,
        intervals=intervals,
        iqm={metric: values if isinstance(values, str) else iqm_interval(values) for metric, values in scores.items()},
        per_frame=_per_frame(episodes),
        by_gap=psnr_by_gap(episodes),
        decision_ms=episodes.decision_ms(),
    )


def _scores(metric: str, episodes: Episodes) -> np.ndarray | str:
    """Scores (clips, seeds), or one sentence why there are none."""
    if not episodes.clips:
        return _NO_CLIP
    values = episodes.scores(metric)
    for row, column in np.argwhere(~np.isfinite(values)):
        where = f"clip {episodes.clips[row]}, seed {episodes.seeds[column]}"
        return f"{metric_format(metric).label} is {values[row, column]} on {where}"
    return values


def _per_frame(episodes: Episodes) -> list[Interval] | str:
    if not episodes.clips:
        return _NO_CLIP
    values = episodes.psnr_per_frame()
    if values.shape[-1] == 0:
        return "the clips have no true frames"
    for row, column, _ in np.argwhere(~np.isfinite(values)):
        return f"the PSNR of a frame is not finite on clip {episodes.clips[row]}, seed {episodes.seeds[column]}"
    return mean_intervals(values.mean(axis=1))


def highlighted(groups: Sequence[Group], metric: str, reference: str, count: int = 7) -> list[str]:
    """Limited policies to draw in colour: those with the best mean place over all groups, and the reference last."""
    places: dict[str, list[float]] = defaultdict(list)
    for group in groups:
        limited = [row.policy for row in group.ranked(metric) if row.budget < UNLIMITED_FRAMES]
        for place, policy in enumerate(limited):
            places[policy].append(place / len(limited))
    best = sorted(places, key=lambda policy: float(np.mean(places[policy])))
    with_reference = [reference] if reference in places else []
    return [policy for policy in best if policy != reference][: count - len(with_reference)] + with_reference


def choose_reference(policies: Sequence[str], reference: str | None) -> str:
    """The policy that others are compared with: the requested one, else ``recent_fill``, else the first.

    Raises:
        ValueError: if the requested one was not evaluated.
    """
    if reference is None:
        return NewestFrames.name if NewestFrames.name in policies else policies[0]
    if reference not in policies:
        raise ValueError(unknown_name("reference", reference, policies))
    return reference


def facts(results: Results) -> dict[str, dict[str, dict[str, int]]]:
    """Workload → fact → value as text → number of episodes that have it."""
    counts: dict[str, dict[str, dict[str, int]]] = defaultdict(lambda: defaultdict(lambda: defaultdict(int)))
    for workload, of_records, count in results.counted_facts():
        for name, value in of_records.items():
            text = ", ".join(f"{k} {v}" for k, v in sorted(value.items())) if isinstance(value, dict) else str(value)
            counts[workload][name][text] += count
    return {workload: {name: dict(values) for name, values in facts.items()} for workload, facts in counts.items()}
