"""The leaderboard's ranking: entries by their mean PSNR over the suite's workloads, as text and as one HTML page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np

from far_env.evaluation.leaderboard_entry import Entry, Suite
from far_env.evaluation.ranking import metric_format
from far_env.evaluation.report import fill_page, triple
from far_env.evaluation.statistics import Interval, mean_intervals
from far_env.evaluation.table import interval_text, signed_interval_text
from far_env.text import text_table

SCRIPTS = ("dom.js", "tables.js", "theme.js", "leaderboard.js")
METRIC = "psnr"
_SHOWN = ("name", "author", "link", "policy", "sha256", "family", "inputs", "source", "note")
"""The keys of an entry that the page shows as they are."""


@dataclass(frozen=True)
class Standing:
    """An entry among the others.

    Attributes:
        place: from 1 on, equal for equal means; None for full history, which ignores the budget.
        mean: mean over the suite's workloads, which count the same.
        gain: mean paired difference to the reference; None without the reference, and for itself.
        cells: mean of each workload.
        cell_gains: difference to the reference of each workload; empty where there is no ``gain``.
        mean_place: mean over workloads of the places there, whatever the range of PSNR in each; None for full history.
    """

    entry: Entry
    place: int | None
    mean: Interval
    gain: Interval | None
    cells: list[Interval]
    cell_gains: list[Interval]
    mean_place: float | None


def ranking(entries: Mapping[str, Entry], suite: Suite) -> list[Standing]:
    """Standings, best first.

    Intervals of means over workloads draw clip numbers, each with its clips of all workloads: these are played with the same
    noise seed, and each workload has as many.
    """
    scores = {name: entry.scores(METRIC) for name, entry in entries.items()}
    limited = [name for name, entry in entries.items() if entry.limited]
    reference = scores.get(suite.reference)
    standings = []
    for name, entry in entries.items():
        own = scores[name]
        gains = None if reference is None or name == suite.reference else own - reference
        mean, *cells = mean_intervals(np.stack([own.mean(axis=0), *own], axis=1))
        gain, *cell_gains = [None] if gains is None else mean_intervals(np.stack([gains.mean(axis=0), *gains], axis=1))
        places = [_place(own[row].mean(), [scores[other][row].mean() for other in limited]) for row in range(len(suite.cells))]
        standings.append(
            Standing(
                entry=entry,
                place=_place(own.mean(), [scores[other].mean() for other in limited]) if entry.limited else None,
                mean=mean,
                gain=gain,
                cells=cells,
                cell_gains=cell_gains,
                mean_place=float(np.mean(places)) if entry.limited else None,
            )
        )
    return sorted(standings, key=lambda standing: (-standing.mean.mean, standing.entry.name))


def ranking_rows(standings: list[Standing], suite: Suite) -> list[list[str]]:
    """The ranking as the cells of a table, its header first."""
    cells = [cell.label for cell in suite.cells]
    rows = [["entry", "#", "inputs", "mean dB", f"− {suite.reference} [95 %]", *cells, "mean place"]]
    for standing in standings:
        rows.append(
            [
                standing.entry.name,
                "–" if standing.place is None else str(standing.place),
                standing.entry.inputs or "–",
                f"{standing.mean.mean:.2f}",
                "" if standing.gain is None else signed_interval_text(standing.gain),
                *(interval_text(interval, 2) for interval in standing.cells),
                "–" if standing.mean_place is None else f"{standing.mean_place:.1f}",
            ]
        )
    return rows


def ranking_text(standings: list[Standing], suite: Suite) -> str:
    """The ranking as a table for the terminal."""
    header, *rows = ranking_rows(standings, suite)
    return f"{text_table(header, rows)}\n\n{suite.text()}; mean PSNR in dB, each workload counts the same"


def ranking_page(standings: list[Standing], suite: Suite) -> str:
    """The ranking as one self-contained HTML page."""
    return fill_page("leaderboard.html", SCRIPTS, "far-env leaderboard", page_data(standings, suite))


def page_data(standings: list[Standing], suite: Suite) -> dict[str, Any]:
    """Everything that the page shows, as plain values for JSON; intervals are [mean, low, high]."""
    metric = metric_format(METRIC)
    return {
        "version": version("far-env"),
        "suite": suite.text(),
        "reference": suite.reference,
        "metric": {"label": metric.label, "unit": metric.unit, "digits": metric.digits},
        "cells": [
            {"workload": cell.workload, "budget": cell.budget, "weights": cell.weights, "steps": cell.ode_steps}
            for cell in suite.cells
        ],
        "rows": [_row(standing) for standing in standings],
    }


def _row(standing: Standing) -> dict[str, Any]:
    entry = standing.entry
    return {
        **{name: getattr(entry, name) for name in _SHOWN},
        "madeWith": entry.made_with,
        "place": standing.place,
        "meanPlace": standing.mean_place,
        "mean": triple(standing.mean),
        "gain": None if standing.gain is None else triple(standing.gain),
        "cells": [triple(interval) for interval in standing.cells],
        "cellGains": [triple(interval) for interval in standing.cell_gains],
    }


def _place(value: float, others: list[float]) -> int:
    """1 plus the number of values that are better, by more than rounding."""
    return 1 + sum(bool(other > value + 1e-9) for other in others)
