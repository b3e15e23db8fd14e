"""Partition policies: the oldest rows, the best rows of the middle, the newest rows. Most published rules have this form and
differ in the split and in the score of the middle."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from far_env.baselines.filling import FillingPolicy, History, best


@dataclass(frozen=True)
class Parts:
    """Row numbers of a history: the sinks, the candidates for the ``places`` of the middle, the newest rows."""

    sink: list[int]
    middle: list[int]
    recent: list[int]
    places: int


MidScore = Callable[[History, Parts], Sequence[float]]
"""Scores of the rows ``parts.middle``; the rows with the highest scores are kept."""


def slots(max_frames: int, sink: int | float, recent: int | float) -> tuple[int, int, int]:
    """Places for sinks, middle and newest rows: together the budget.

    Args:
        sink, recent: a whole number of rows, or a float: that share of the budget. The newest rows come first (at least one),
            then the sinks (at least one, unless none are wanted), then the middle.
    """
    num_wanted = math.floor(recent * max_frames + 0.5) if isinstance(recent, float) else recent
    num_recent = min(max(1, num_wanted), max_frames)
    num_sink = max(1, math.floor(sink * max_frames)) if isinstance(sink, float) else sink
    num_sink = 0 if max_frames == 1 or sink == 0 else min(max_frames - num_recent, num_sink)
    return num_sink, max_frames - num_recent - num_sink, num_recent


class PartitionPolicy(FillingPolicy):
    """Sinks, the middle rows of the highest score, the newest rows.

    Args:
        sink, recent: see `slots`.
        mid_score: scores the middle; None gives its places to the newest rows.
        tier: see `FillingPolicy`.
    """

    family = "anchor"
    tags: ClassVar[dict[str, Any]] = {"anchor_preservation_rule": "first_frames"}

    def __init__(self, sink: int | float, recent: int | float, mid_score: MidScore | None, tier: str | None = None) -> None:
        super().__init__(tier)
        self.sink, self.recent, self.mid_score = sink, recent, mid_score

    def _slots(self, max_frames: int) -> tuple[int, int, int]:
        num_sink, places, num_recent = slots(max_frames, self.sink, self.recent)
        if self.mid_score is None:
            return num_sink, 0, num_recent + places
        return num_sink, places, num_recent

    def _choose(self, history: History) -> tuple[Sequence[int], Sequence[int]]:
        num_sink, places, num_recent = self._slots(history.max_frames)
        rows = list(range(len(history)))
        end = len(rows) - num_recent
        parts = Parts(rows[:num_sink], rows[num_sink:end], rows[end:], places)
        return parts.sink, [*self._choose_middle(history, parts), *parts.recent]

    def _choose_middle(self, history: History, parts: Parts) -> list[int]:
        """The ``places`` rows of the middle that are kept."""
        if self.mid_score is None:
            return []
        return best(parts.middle, self.mid_score(history, parts), parts.places)

    def _tags(self, max_frames: int) -> dict[str, Any]:
        num_sink, places, _ = self._slots(max_frames)
        return {"queue_depth": places, "long_term_budget_fraction": num_sink / max_frames, **self.tags}


def drift_match(history: History, parts: Parts) -> list[float]:
    """1 − |d(i) − d(newest)| with d the distance to the oldest row: an optimistic similarity to the newest, by the triangle
    inequality. Comparable over time only while the oldest row stays."""
    newest = history.rows[-1].feature_drift
    return [1 - abs(history.rows[i].feature_drift - newest) for i in parts.middle]


def evenly_spaced(history: History, parts: Parts) -> list[int]:
    """The rows of the middle that stay when the one whose removal leaves the smallest gap is dropped again and again, of equal
    ones the older. Needs a sink."""
    births = history.births
    remaining = [*parts.sink, *parts.middle, *parts.recent]
    evictable = range(len(parts.sink), len(remaining) - len(parts.recent))
    while len(evictable) > parts.places:
        _, place = min((births[remaining[i + 1]] - births[remaining[i - 1]], i) for i in evictable)
        del remaining[place]
        evictable = evictable[:-1]
    return remaining[len(parts.sink) : -len(parts.recent)]


def over_last(history: History, signal: str, num_frames: int) -> np.ndarray:
    """A signal of each row, summed over the last frames that were denoised: this one and those recorded at earlier calls.

    Returns:
        (rows,), float64. A row that was not in the history of one of these frames counts zero for it.
    """
    now = dict(zip(history.births, map(float, history.signals[signal]), strict=True))
    window = (*history.notes.get(signal, ()), now)[-num_frames:]
    history.notes[signal] = window
    return np.array([sum(values.get(birth, 0.0) for values in window) for birth in history.births])
